"""The distance at which two crops count as one person, and what it was found for."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from pmm.gallery.storage.source import EmbeddingSource
from pmm.utils.errors import InvalidInput, InvalidValue

ThresholdKind = Literal["bench", "cameras", "given"]


@dataclass(frozen=True, kw_only=True)
class Threshold:
    """A match is what lies at most `distance` away. Raises InvalidValue for values that no threshold has."""

    fmr: float | None
    """False match rate that it is for: the share of pairs of different people that it takes for one; None for one that
    was given without."""
    distance: float
    """As a gallery gives distances: Euclidean, or 1 - cos."""
    tpr: float | None = None
    """Share of pairs of one person that it finds, where that was measured."""
    upper: float | None = None
    """Upper confidence bound of the false match rate, where there is one."""
    kind: ThresholdKind
    """Found on labelled people, on people seen at once in one camera, or given by hand."""
    precision: str
    """That the artifact ran in."""
    stored: Literal["fp32", "fp16"]
    """Precision that embeddings were stored in."""
    checkpoint_sha256: str = ""
    """Of the model."""
    data: str = ""
    """What it was found on."""

    def __post_init__(self) -> None:
        if self.fmr is None and self.kind != "given":
            raise InvalidValue("fmr", self.fmr, "a rate, as it was measured")
        if self.fmr is not None and not 0 < self.fmr < 1:
            raise InvalidValue("fmr", self.fmr, "a rate above 0 and below 1")
        if not (math.isfinite(self.distance) and self.distance >= 0):
            raise InvalidValue("distance", self.distance, "0 or more")
        for name in ("tpr", "upper"):
            rate = getattr(self, name)
            if rate is not None and not 0 <= rate <= 1:
                raise InvalidValue(name, rate, "a rate from 0 to 1")

    @classmethod
    def of_source(
        cls,
        source: EmbeddingSource | None,
        stored: Literal["fp32", "fp16"],
        kind: ThresholdKind,
        *,
        fmr: float | None,
        distance: float,
        tpr: float | None = None,
        upper: float | None = None,
        data: str = "",
    ) -> Threshold:
        """One for embeddings of this source, stored in this precision."""
        return cls(
            fmr=fmr, distance=distance, tpr=tpr, upper=upper, kind=kind, stored=stored, data=data,
            precision=source.precision if source else "", checkpoint_sha256=source.checkpoint_sha256 if source else "",
        )  # fmt: skip

    def is_for(self, fmr: float | None) -> bool:
        """Whether it is for this false match rate."""
        return self.fmr == fmr if self.fmr is None or fmr is None else math.isclose(self.fmr, fmr)

    def __str__(self) -> str:
        rate = "" if self.fmr is None else f" for a false match rate of {self.fmr:g}"
        return f"threshold {self.distance:.4f}{rate}"

    def check_fits(self, source: EmbeddingSource | None, stored: str) -> None:
        """Raise InvalidInput unless it is for embeddings of this source, stored in this precision."""
        facts: list[tuple[str, str, str]] = [("stored precision", self.stored, stored)]
        if source:
            facts += [("precision", self.precision, source.precision)]
            facts += [("checkpoint", self.checkpoint_sha256[:12], source.checkpoint_sha256[:12])]
        for name, own, expected in facts:
            if own != expected:
                raise InvalidInput(
                    f"the {self} is for {name} {own or 'unknown'}",
                    expected=f"{name} {expected}, as in the gallery", hint="pmm threshold measures it again",
                )  # fmt: skip


def thresholds_for(thresholds: Sequence[Threshold], fmr: float | None) -> list[Threshold]:
    """Those for a false match rate; without one the one that was given without, or all."""
    return [each for each in thresholds if each.is_for(fmr)] or ([] if fmr else list(thresholds))
