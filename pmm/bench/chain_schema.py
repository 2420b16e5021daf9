"""The part of report.json about the chain from the checkpoint to the index; units as in `pmm.bench.schema`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Range = tuple[float, float]
"""A 95 % interval."""
TARGETS = (1e-2, 1e-3, 1e-4)
"""False match rates that a threshold is found for."""
INDEX_NAMES = (
    "certified",
    "certified-fp16",
    "pca-64",
    "ivf-sq8",
    "ivf-pq",
    "ivf-pq-rescored",
    "hnsw-16",
    "hnsw-64",
    "hnsw-256",
    "usearch-64",
)
"""See `pmm.bench.chain.index_builder`."""
REQUIRED = ("stored fp32", "certified")
"""Links of the chain that is deployed: a gate that they fail fails the run."""
LinkKind = Literal["checkpoint", "artifact", "stored", "list", "index"]


@dataclass(frozen=True, kw_only=True)
class ChainLoss:
    """What one link loses against another, over the queries with a relevant row; below 0 is a loss."""

    map_delta: float
    map_delta_interval: Range
    """Paired bootstrap over queries."""
    rank1_delta: float
    rank1_delta_interval: Range
    minp_delta: float
    minp_delta_interval: Range
    rank1_lost: int
    """Queries whose first row is right before, and wrong after."""
    rank1_gained: int
    top10_overlap: float
    """Mean share of the first ten rows before that are among the first ten after."""
    newly_accepted: int
    """Verification flips: pairs within the threshold after, and not before."""
    newly_rejected: int


@dataclass(frozen=True, kw_only=True)
class ChainLink:
    """One link. Every figure is None where it could not be measured."""

    name: str
    """Unique in the chain."""
    kind: LinkKind
    """list: the exact ranking, of which only the first rows are taken, as an index lists them."""
    parent: str | None
    """Name of the link that it takes its vectors from; None for the first."""
    status: Literal["ok", "failed", "unavailable"] = "ok"
    reason: str = ""
    settings: str = ""
    knob: str = ""
    """What to raise where it misses rows; empty where nothing helps."""
    required: bool = False
    """A gate that it fails fails the run: it belongs to the chain that is deployed, or was named."""
    exact: bool = False
    """It promises the rows and the distances of brute force, ties by row."""
    mAP: float | None = None  # noqa: N815
    rank1: float | None = None
    mINP: float | None = None  # noqa: N815
    fmr: float | None = None
    """Share of the pairs of two identities that lie within the deployed threshold."""
    tpr: float | None = None
    """The same of the pairs of one identity."""
    loss: ChainLoss | None = None
    """Against the parent; None for the first link."""
    total: ChainLoss | None = None
    """Against the first link."""
    build_s: float | None = None
    alone_ms: float | None = None
    """Median of one query, the first ten of it."""
    alone_per_s: float | None = None
    batch_per_s: float | None = None
    """Queries per second in batches of 64."""
    resident_bytes: int | None = None
    disk_bytes: int | None = None
    findings: tuple[str, ...] = ()
    """Faults that its answers show, a line each."""
    failed_gates: tuple[str, ...] = ()
    """Flags of the gates that it fails."""


@dataclass(frozen=True, kw_only=True)
class ChainReport:
    """The chain of one artifact, on the data set of the report and, if asked for, distractors."""

    artifact: str
    """Name of the result that made the embeddings of the second link and of all that follow."""
    gallery: int
    """Rows, distractors included."""
    distractors: int
    """Rows that were made up; see `pmm.bench.chain.distractors`."""
    impostor_quantiles: tuple[tuple[float, float, float], ...] = ()
    """Quantile, distance of that share of the pairs of two identities on the data set, and with made-up rows alone."""
    depth: int
    """Rows that a list has where average precision is measured."""
    genuine: int
    """Pairs of one identity."""
    impostor: int
    """Pairs of two identities."""
    target_fmr: float
    threshold: float
    """Deployed: the Euclidean distance at which the artifact has the target rate on the data set."""
    links: tuple[ChainLink, ...]
    seconds: float

    def link(self, name: str) -> ChainLink | None:
        """The link of that name."""
        return next((each for each in self.links if each.name == name), None)

    def path(self, name: str) -> list[ChainLink]:
        """The links from the first one to the named one."""
        found: list[ChainLink] = []
        link = self.link(name)
        while link is not None:
            found.insert(0, link)
            link = self.link(link.parent) if link.parent else None
        return found
