"""How many images, identities and cameras a data set has, beside what its authors published. Loads no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from pmm.data.dataset_specs import DATASETS, Published
from pmm.data.samples import DISTRACTOR
from pmm.data.scan import Scan


@dataclass(frozen=True, kw_only=True)
class Counts:
    """Counts of one part: images without junk, identities without distractors, 0 cameras if they are unknown."""

    images: int
    identities: int
    cameras: int
    junk: int
    distractors: int


class Figure(NamedTuple):
    """One count: its field in `Published`, its name in words, the count on disk and the published one."""

    key: str
    words: str
    found: int
    published: int


def has_distractors(scan: Scan) -> bool:
    """Whether identity 0 is a distractor; other data sets have an identity 0, or are numbered by the reader."""
    return scan.spec.layout == "market"


def counts_of(scan: Scan) -> dict[str, Counts]:
    """Counts by part: train, query, gallery."""
    counts = {}
    for name, part in scan.without_junk().items():
        distractors = sum(s.pid == DISTRACTOR for s in part) if has_distractors(scan) else 0
        counts[name] = Counts(
            images=len(part),
            identities=len({s.pid for s in part}) - bool(distractors),
            cameras=len({s.camid for s in part}) if scan.cameras_known else 0,
            junk=len(scan.parts()[name]) - len(part),
            distractors=distractors,
        )
    return counts


def cameras_of(scan: Scan) -> int:
    """Cameras of the whole data set; 0 if they are unknown."""
    return len({s.camid for part in scan.without_junk().values() for s in part}) if scan.cameras_known else 0


def published_figures(scan: Scan) -> list[Figure]:
    """The counts on disk beside the published ones; empty for data sets without published counts."""
    return _figures(scan, scan.spec.published) if scan.spec.published else []


def matching_counts(scan: Scan) -> list[str]:
    """Names of the data sets whose published counts all equal those of `scan`."""
    return [
        name
        for name, spec in DATASETS.items()
        if spec.published and all(figure.found == figure.published for figure in _figures(scan, spec.published))
    ]


def _figures(scan: Scan, published: Published) -> list[Figure]:
    counts = counts_of(scan)
    return [
        Figure("train", "train images", counts["train"].images, published.train),
        Figure("query", "query images", counts["query"].images, published.query),
        Figure("gallery", "gallery images", counts["gallery"].images, published.gallery),
        Figure("train_ids", "train identities", counts["train"].identities, published.train_ids),
        Figure("test_ids", "query identities", counts["query"].identities, published.test_ids),
        Figure("cameras", "cameras", cameras_of(scan), published.cameras),
    ]
