"""Mean and spread of the colours of a model's training crops: who feeds it other colours, or another scale, sees it."""

from __future__ import annotations

from dataclasses import dataclass

from pmm.utils.errors import InvalidValue


@dataclass(frozen=True, kw_only=True)
class CropStatistics:
    """Of training crops as they are resized, before they are normalised. Raises InvalidValue for what no pixels
    have."""

    mean: tuple[float, float, float]
    """Of all pixels of all crops, per channel (RGB), in grey levels of 0 to 255."""
    std: tuple[float, float, float]
    """Standard deviation of the same pixels."""
    crops: int
    """That it was measured on."""

    def __post_init__(self) -> None:
        for name in ("mean", "std"):
            if not all(0 <= level <= 255 for level in getattr(self, name)):
                raise InvalidValue(name, getattr(self, name), "grey levels of red, green and blue, each 0 to 255")
        if self.crops < 1:
            raise InvalidValue("crops", self.crops, "1 or more")
