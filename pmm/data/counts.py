"""How many images, identities and cameras a data set has, beside what its authors published. Loads no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from pmm.data.layouts import DATASETS, Published
from pmm.data.samples import DISTRACTOR
from pmm.data.scan import Scan


@dataclass(frozen=True, kw_only=True)
class Counts:
    """Of one part. Images are those without junk, identities those without distractors too; unknown cameras are 0."""

    images: int
    identities: int
    cameras: int
    junk: int
    distractors: int


class Figure(NamedTuple):
    """One published figure: its field in `Published`, what it is in words, what was found and what was published."""

    key: str
    words: str
    found: int
    published: int


def has_distractors(scan: Scan) -> bool:
    """Whether identity 0 means a distractor; elsewhere identities are numbered from 0, or by the reader."""
    return scan.layout.kind == "market"


def counts_of(scan: Scan) -> dict[str, Counts]:
    """Counts by part: train, query, gallery."""
    counts = {}
    people = scan.people()
    for name, part in scan.parts().items():
        distractors = sum(s.pid == DISTRACTOR for s in people[name]) if has_distractors(scan) else 0
        counts[name] = Counts(
            images=len(people[name]),
            identities=len({s.pid for s in people[name]}) - bool(distractors),
            cameras=len({s.camid for s in people[name]}) if scan.cameras_known else 0,
            junk=len(part) - len(people[name]),
            distractors=distractors,
        )
    return counts


def cameras_of(scan: Scan) -> int:
    """Different cameras of the whole data set; 0 if they are unknown."""
    return len({s.camid for part in scan.people().values() for s in part}) if scan.cameras_known else 0


def beside_published(scan: Scan) -> list[Figure]:
    """What was found and what was published, of data sets that have published counts."""
    return _figures(scan, scan.layout.published) if scan.layout.published else []


def counted_as(scan: Scan) -> list[str]:
    """Names of the data sets whose published counts these are, every one of them."""
    return [
        name
        for name, layout in DATASETS.items()
        if layout.published and all(figure.found == figure.published for figure in _figures(scan, layout.published))
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
