"""The figures of the paper's Tables 1 and 2, which a reproduction is compared with, and what is doubtful about them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from pmm.models.registry import METHODS

Dataset: TypeAlias = Literal["market1501", "dukemtmc-reid", "cuhk03-np-detected", "cuhk03-np-labeled"]

PAPER_AP = "truncated50"
"""Definition of average precision in the paper's code; see `pmm.evaluation.metrics`."""
OWN_RUN = "a run of the PMM paper's authors"
QUOTED = "quoted in the PMM paper from the method's own"


@dataclass(frozen=True, kw_only=True)
class Reported:
    """Published figures, in %."""

    rank1: float
    mAP: float  # noqa: N815
    source: str


@dataclass(frozen=True, kw_only=True)
class PaperRow:
    """A method as the tables of the PMM paper have it (Zhang, He, Sun, Li; ICASSP 2021; arXiv 2007.08779)."""

    title: str = ""
    """Its name there; empty if it is in neither table."""
    table: str = ""
    """Where it is."""
    source: str = ""
    figures: Mapping[Dataset, tuple[float, float]] = field(default_factory=dict)
    """Data set -> rank-1 and mAP in %. The paper's CUHK03 is CUHK03-NP with detected boxes."""
    note: str = ""
    """What is doubtful about the figures, or is our reading."""
    elsewhere: Mapping[Dataset, Reported] = field(default_factory=dict)
    """Figures of the same method in another paper, by the single-query protocol of `pmm evaluate`."""


def _three(
    cuhk03: tuple[float, float], duke: tuple[float, float], market: tuple[float, float]
) -> dict[Dataset, tuple[float, float]]:
    """In the order of the paper's columns."""
    return {"cuhk03-np-detected": cuhk03, "dukemtmc-reid": duke, "market1501": market}


_AOS = (
    "the paper's row mixes protocols. Its Market-1501 figures are probably those of the multi-query protocol, and its "
    "CUHK03 figures, with mAP above rank-1, those after re-ranking: pmm evaluate has one query at a time, and no "
    "re-ranking unless asked"
)
_WBC = "single query, as a comparison in the journal version of arXiv 1803.08580 has it"
_PCB = "the G embedding in PCB's paper, as two later papers quote it"

PAPER_ROWS: dict[str, PaperRow] = {
    "baseline": PaperRow(),
    "bdb": PaperRow(
        title="BDB",
        table="Table 1",
        source=f"{OWN_RUN}, of BDB",
        figures=_three((73.5, 69.8), (87.1, 74.5), (94.0, 84.9)),
    ),
    "cutout-batch": PaperRow(
        title="CutOut",
        table="Table 2",
        source=OWN_RUN,
        figures=_three((73.5, 69.8), (87.1, 74.5), (94.1, 84.7)),
        note="our reading: PMM's three stages with a rectangle of zeros per batch in place of each mix; four of the "
        "paper's six figures equal BDB's",
    ),
    "cutmix": PaperRow(
        title="CutMix",
        table="Table 2",
        source=OWN_RUN,
        figures=_three((74.3, 69.9), (85.8, 72.0), (92.8, 82.4)),
        note="our reading: it acts on PMM's stages, partners are of another identity, and the triplet loss keeps the "
        "anchor's label",
    ),
    "a-cutmix": PaperRow(
        title="A-CutMix",
        table="Table 2",
        source=OWN_RUN,
        figures=_three((65.6, 62.8), (83.8, 68.7), (91.6, 78.1)),
        note="our reading: the attentive blocks of the anchor are overwritten (--direction replace)",
    ),
    "pmm": PaperRow(
        title="PMM (A-HardMix)",
        table="Tables 1 and 2",
        source=OWN_RUN,
        figures=_three((76.3, 73.0), (88.0, 74.6), (94.1, 85.2)),
    ),
    "pcb": PaperRow(
        elsewhere={
            "market1501": Reported(rank1=92.3, mAP=77.4, source=_PCB),
            "dukemtmc-reid": Reported(rank1=81.8, mAP=66.1, source=_PCB),
        },
    ),
    "pcb-rpp": PaperRow(
        title="PCB+RPP", table="Table 1", source=QUOTED, figures=_three((62.8, 56.7), (83.3, 69.2), (93.8, 81.6))
    ),
    "aos": PaperRow(
        title="AOS",
        table="Table 1",
        source=QUOTED,
        figures=_three((54.6, 56.1), (79.2, 62.1), (91.3, 78.3)),
        note=_AOS,
        elsewhere={
            "market1501": Reported(rank1=86.5, mAP=70.4, source=_WBC),
            "dukemtmc-reid": Reported(rank1=79.2, mAP=62.1, source=_WBC),
        },
    ),
    "cama": PaperRow(
        title="CAMA",
        table="Table 1",
        source=QUOTED,
        figures=_three((66.6, 64.2), (85.8, 72.9), (94.7, 84.5)),
        note=METHODS["cama"].note,
    ),
}
"""Method -> its row, in the order of a reproduction."""
