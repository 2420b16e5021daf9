"""What a bench run found: the schema of report.json, field by field.

Fractions are in 0..1, latencies in ms, memory and sizes in bytes, times in s. An interval is [low, high], at 95 %. None
(null) is a figure that was not measured, or cannot be told from so few samples.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from pmm.utils.errors import UserError
from pmm.utils.from_dict import from_dict

SCHEMA = "pmm-bench-2"
EMBED_BATCH = 64
"""Crops per call where accuracy is measured."""

Interval = tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A figure and how sure it is."""

    value: float
    interval: Interval | None
    """None: too few samples for one."""


@dataclass(frozen=True, kw_only=True)
class Timing:
    """One backend at one batch size."""

    batch: int
    """Images per call."""
    samples_ms: tuple[float, ...]
    """By the host's clock, in the order taken: a whole call on images in place, until its result is complete."""
    block: int
    """Samples in a row, before another backend's turn."""
    turns_s: tuple[float, ...]
    """When each turn began, seconds after the first of all."""
    warmup_s: float
    steady: bool
    """Warm-up ended because the samples no longer changed, not because its time was up."""
    p50_ms: float
    p50_interval_ms: Interval | None
    p90_ms: float | None
    """Percentiles are samples (nearest rank), None where there are too few for an interval: 36, 72 and 368."""
    p90_interval_ms: Interval | None
    p95_ms: float | None
    p95_interval_ms: Interval | None
    p99_ms: float | None
    p99_interval_ms: Interval | None
    speedup: Estimate | None
    """Times as fast as the reference at this batch: the ratio of the medians, paired over rounds."""
    images_per_s: float
    """Throughput, measured: calls submitted without waiting for the one before, where the backend can."""
    in_flight: int
    """Calls submitted before the first must be complete, for the throughput."""
    device_ms: float | None
    """Median by the GPU's own clock, of work on the GPU alone."""
    upload_ms: float | None
    """Median of copying the images to the GPU; not in `samples_ms`."""
    download_ms: float | None
    """Median of copying the embeddings back; not in `samples_ms`."""
    end_to_end_ms: float | None
    """Median from JPEG files to embeddings in host memory: read, decode, resize, copy, infer, copy."""
    decode_ms: float | None
    """Median of the part of it before inference: read, decode, resize."""
    flags: tuple[str, ...]
    """Why these figures are not to be trusted: drift, noise, no steady state."""
    profile: int | None = None
    """Of an engine: the batch that the optimisation profile in which this ran is made for; None elsewhere."""


@dataclass(frozen=True, kw_only=True)
class Tracker:
    """The load of a tracker: calls of a number of crops that changes from one to the next, from and to host memory."""

    least: int
    most: int
    """The crops of a call are drawn evenly from `least` to `most`."""
    calls: int
    mean_ms: float
    p99_ms: float | None
    """Nearest rank; None for fewer than 100 calls."""
    images_per_s: float
    in_order_images_per_s: float
    """Of the same calls in order of their size: what the change from call to call costs is the rest."""


@dataclass(frozen=True, kw_only=True)
class Camera:
    """The queries of one camera."""

    camid: int
    queries: int
    """Evaluable ones."""
    mAP: float  # noqa: N815
    map_delta: float


@dataclass(frozen=True, kw_only=True)
class LostQuery:
    """A query that this backend ranks worse than the reference does."""

    path: str
    pid: int
    camid: int
    ap_reference: float
    ap: float
    first_reference: tuple[str, ...]
    """Paths of the gallery crops that the reference ranks first."""
    first: tuple[str, ...]
    """The same of this backend."""
    right_reference: tuple[bool, ...]
    """Which of `first_reference` show the query's person."""
    right: tuple[bool, ...]


@dataclass(frozen=True, kw_only=True)
class OperatingPoint:
    """Accept a pair as one person where its distance is at most the threshold."""

    fpr: float
    """Share of the pairs of two people that are accepted (the aim)."""
    threshold: float | None
    """Of Euclidean distance; None: too few pairs of two people to set it."""
    tpr: float | None
    """Share of the pairs of one person that are accepted."""
    flips: int | None
    """Pairs decided otherwise than by the reference, both at the reference's threshold."""
    newly_accepted: int | None
    newly_rejected: int | None


@dataclass(frozen=True, kw_only=True)
class Thresholds:
    """Verification: is this pair of crops one person? Every query with every gallery crop that counts for it."""

    genuine: int
    """Pairs of one person."""
    impostor: int
    """Pairs of two people."""
    eer: float
    """Equal error rate: the share of wrong decisions where both kinds of error are as frequent."""
    eer_threshold: float
    points: tuple[OperatingPoint, ...]


@dataclass(frozen=True, kw_only=True)
class Result:
    """One backend in one precision. Every figure of accuracy is None where the backend could not run."""

    name: str
    """Unique in the report: backend and precision, as typed, and what else tells it apart."""
    backend: str
    device: str
    """cpu or cuda."""
    gpu: str = ""
    """Name of the GPU that it ran on."""
    precision: str
    cuda_graph: bool | None
    """Runs are replayed CUDA graphs; None where there is no such thing."""
    status: Literal["ok", "failed", "unavailable"]
    """unavailable: this machine cannot run it. failed: it could, and went wrong."""
    reason: str
    """Of a failure or absence, one line."""
    notes: tuple[str, ...] = ()
    """What else went wrong or differs: a batch size that could not be timed, embeddings of length 1."""
    provider: str = ""
    """The library and version that executed, and where."""
    artifact: str | None = None
    """Path of the file that ran (or was built)."""
    artifact_sha256: str | None = None
    artifact_bytes: int | None = None
    build_s: float | None = None
    """Export, quantisation, engine build or compilation ahead of time; None where an earlier run's file was used."""
    load_s: float | None = None
    """Opening the file."""
    first_inference_s: float | None = None
    """The first call, batch 1; what compiles or tunes itself already on opening is in `load_s`."""
    peak_memory: int | None = None
    """Of the worker process in host memory, over the whole run."""
    gpu_memory: int | None = None
    """Held on the GPU by the worker process at the end."""

    mAP: float | None = None  # noqa: N815
    rank1: float | None = None
    mINP: float | None = None  # noqa: N815
    skipped_queries: int | None = None
    """Queries without a relevant gallery item."""
    map_delta: float | None = None
    """Minus the reference's; below 0 is a loss."""
    map_delta_interval: Interval | None = None
    """Paired bootstrap over queries."""
    rank1_delta: float | None = None
    rank1_delta_interval: Interval | None = None
    minp_delta: float | None = None
    minp_delta_interval: Interval | None = None

    min_cosine: float | None = None
    """Of each crop's embedding with the reference's: the worst crop, the 1st percentile, the median."""
    p1_cosine: float | None = None
    median_cosine: float | None = None
    worst_crop: str | None = None
    """The crop with `min_cosine`."""
    max_abs: float | None = None
    """Largest absolute difference of an element."""
    max_length_error: float | None = None
    """Largest relative difference of a row's length from the reference's, or of a crop's own in another batch."""
    batch_min_cosine: float | None = None
    """Of crops embedded alone and in batches of 1, odd and ragged sizes, with the same crops in batches of 64."""

    rank1_lost: int | None = None
    """Queries whose first item is right with the reference, and wrong here."""
    rank1_gained: int | None = None
    top1_changed: int | None = None
    """Queries whose first item is another crop, right or wrong."""
    top10_overlap: float | None = None
    """Mean share of the reference's first ten items among this backend's first ten."""
    kendall_tau: float | None = None
    """Mean rank correlation over the reference's first 50 items: 1 is the same order, -1 the reverse."""

    per_query_ap: tuple[float | None, ...] = ()
    """Average precision of each query, in the data set's order; None for a skipped one."""
    cameras: tuple[Camera, ...] = ()
    worst_queries: tuple[LostQuery, ...] = ()
    """Those that lost most AP, the worst first."""
    thresholds: Thresholds | None = None
    batches: tuple[Timing, ...] = ()
    tracker: Tracker | None = None


@dataclass(frozen=True, kw_only=True)
class GateFailure:
    """A bound that was not kept, or whose figure could not be measured."""

    result: str
    """Name of the result."""
    gate: str
    """The flag, as --max-map-drop."""
    said: str
    """What was found and what is allowed, one line."""


@dataclass(frozen=True, kw_only=True)
class Gates:
    """The bounds that were applied. None is off."""

    max_map_drop: float | None
    max_rank1_flips: float | None
    """Share of the queries whose first item turned from right to wrong or back."""
    min_cosine: dict[str, float]
    """Per precision."""
    max_p95_ms: float | None
    """At the smallest batch."""
    max_length_error: dict[str, float] | None = None
    """Per precision; of an embedding's length, relative."""
    failures: tuple[GateFailure, ...] = ()


@dataclass(frozen=True, kw_only=True)
class CheckpointFacts:
    path: str
    sha256: str
    method: str
    epoch: int
    embedding_dim: int
    parameters_m: float
    """Millions of trained numbers."""
    height: int
    width: int


@dataclass(frozen=True, kw_only=True)
class DatasetFacts:
    name: str
    root: str
    queries: int
    gallery: int
    distractors: int
    identities: int
    cameras: int
    digest: str
    """Of names and contents of query and gallery, to tell two data sets apart."""


@dataclass(frozen=True, kw_only=True)
class Method:
    """How latency was measured."""

    samples: int
    """Most samples per backend and batch."""
    seconds: float
    """Most time per backend and batch."""
    block: int
    threads: int
    """CPU threads of each backend."""
    matrix_tflops: dict[str, float]
    """Rate of the GPU's matrix product per precision, measured; empty without one."""
    gflop_per_image: float | None
    """Multiplications and additions of the deployed graph, for one image."""


@dataclass(frozen=True, kw_only=True)
class BenchReport:
    """report.json."""

    schema: str
    created: str
    seconds: float
    """Wall time of the run, exports included."""
    checkpoint: CheckpointFacts
    dataset: DatasetFacts
    environment: dict[str, Any]
    """See `pmm.utils.environment.describe_environment`."""
    method: Method
    reference: str
    """Name of the result that the others are compared with."""
    results: tuple[Result, ...]
    gates: Gates

    def to_json(self) -> str:
        """Figures that are not finite raise ValueError: JSON has no word for them."""
        return json.dumps(asdict(self), indent=1, allow_nan=False) + "\n"

    def result(self, name: str) -> Result | None:
        """The result of that name."""
        return next((r for r in self.results if r.name == name), None)


def read_report(path: Path) -> BenchReport:
    """report.json as `BenchReport`. Raises UserError for a file that is none, or one of another schema."""
    try:
        values = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not a report of pmm bench ({type(error).__name__})") from error
    found = values.get("schema") if isinstance(values, dict) else None
    if found != SCHEMA:
        raise UserError(f"{path}: schema {found!r}; this version reads {SCHEMA!r}: measure again")
    try:
        return from_dict(BenchReport, values)
    except (ValueError, TypeError) as error:
        raise UserError(f"{path}: not a report of pmm bench ({error})") from error
