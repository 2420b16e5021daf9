"""What a search on the command line asks for, in terms of its gallery: rows, threshold, cameras. Loads no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pmm.gallery.crop_metadata import TIME_EXPECTED, parse_time
from pmm.gallery.filters import RowFilter
from pmm.gallery.gallery import Gallery
from pmm.gallery.storage.thresholds import Threshold, thresholds_for
from pmm.utils.arguments import Arg
from pmm.utils.errors import ConflictingOptions, InvalidFile, InvalidInput, InvalidValue, one_of


@dataclass(frozen=True, kw_only=True)
class RowFilterFlags:
    """Which crops of a gallery count; all by default."""

    camera: Annotated[tuple[str, ...], Arg("NAME")] = ()
    """Only crops of these cameras."""
    time_from: Annotated[str, Arg("TIME")] = ""
    """Only crops from this time on: seconds, or a date as 2026-05-01T14:30:00 (UTC where it names no zone)."""
    time_to: Annotated[str, Arg("TIME")] = ""
    """Only crops up to this time, inclusive."""
    where: Annotated[tuple[str, ...], Arg("NAME=VALUE")] = ()
    """Only crops with this value in column NAME; repeat for alternatives."""

    def row_filter(self, gallery: Gallery) -> RowFilter | None:
        """The rows that all of the flags keep; None if none is given.

        Raises InvalidValue for a column that the gallery does not have, or a value that it cannot hold.
        """
        if not (self.camera or self.time_from or self.time_to or self.where):
            return None
        wanted: dict[str, list[str | int | float]] = {}
        for text in self.where:
            name, equals, value = text.partition("=")
            if not equals:
                raise InvalidValue("--where", text, "NAME=VALUE, as floor=3")
            if name == "time":
                raise InvalidValue("--where", text, hint="give --time-from and --time-to")
            wanted.setdefault(name, []).append(_value(gallery, "--where", name, value))
        return RowFilter(
            cameras=[_value(gallery, "--camera", "camera", camera) for camera in self.camera],  # type: ignore[misc]
            since=_time(gallery, "--time-from", self.time_from),
            until=_time(gallery, "--time-to", self.time_to),
            ids=wanted.pop("id", []),  # type: ignore[arg-type]
            columns=wanted,
        )


@dataclass(frozen=True, kw_only=True)
class SearchFilterFlags(RowFilterFlags):
    """Those of a search, which can also leave out the camera of each query. Raises ConflictingOptions for half of
    that."""

    not_same_camera: bool = False
    """Exclude the query's own camera (from --query-camera or --names)."""
    query_camera: Annotated[str, Arg("NAME")] = ""
    """Camera of all queries."""
    names: Annotated[str, Arg("NAME|REGEX")] = ""
    """Camera of each query from its file name, as of pmm embed."""

    def __post_init__(self) -> None:
        if self.not_same_camera and not (self.query_camera or self.names):
            options = ("not_same_camera", "query_camera", "names")
            raise ConflictingOptions("{not_same_camera} needs {query_camera} or {names}", *options)
        for name in ("query_camera", "names"):
            if getattr(self, name) and not self.not_same_camera:
                raise ConflictingOptions(f"{{{name}}} needs {{not_same_camera}}", name, "not_same_camera")
        if self.query_camera and self.names:
            problem = "{query_camera} and {names} both tell the query's camera"
            raise ConflictingOptions(problem, "query_camera", "names", hint="leave one of them out")


def camera_of(gallery: Gallery, flag: str, camera: str) -> str | int:
    """A camera as the gallery names it. Raises InvalidValue if it has none."""
    return _value(gallery, flag, "camera", camera)  # type: ignore[return-value]


def threshold_of(gallery: Gallery, text: str, fmr: float | None) -> tuple[float, Threshold | None]:
    """The distance of `--threshold`: a number, or `auto` for that of the gallery, and then what the gallery says of it.

    Raises InvalidValue, InvalidFile if the gallery has none, or several and no `fmr` to choose by.
    """
    if text != "auto":
        try:
            distance = float(text)
        except ValueError:
            distance = math.nan
        if not (math.isfinite(distance) and distance >= 0):
            raise InvalidValue("--threshold", text, "auto, or a distance of 0 or more")
        if fmr is not None:
            raise InvalidValue("--fmr", fmr, "--threshold auto with it")
        return distance, None
    known = gallery.thresholds
    if not known:
        hint = f"find one with pmm threshold {gallery.path}, or give --threshold T"
        raise InvalidFile("it has no threshold", path=gallery.path, hint=hint)
    rates = [f"{rate:g}" for rate in sorted({threshold.fmr for threshold in known if threshold.fmr})]
    chosen = thresholds_for(known, fmr)
    if not chosen:
        expected = one_of(rates) if rates else "left out: the gallery's threshold was given without a rate"
        raise InvalidValue("--fmr", fmr, expected)
    if len(chosen) > 1:
        problem = f"it has thresholds for false match rates {', '.join(rates)}"
        raise InvalidFile(problem, path=gallery.path, hint="give --fmr")
    chosen[0].check_fits(gallery.source, gallery.precision)
    return chosen[0].distance, chosen[0]


def check_threshold(threshold: Threshold | None, precision: str, model: Path) -> None:
    """Raise InvalidInput for a threshold that was found for another precision than the queries' model runs in."""
    if threshold and threshold.precision != precision:
        problem = f"the gallery's threshold was found in {threshold.precision}, the model runs in {precision}"
        raise InvalidInput(problem, path=model, hint="use the file that made the gallery, or give --threshold T")


def _value(gallery: Gallery, flag: str, name: str, value: str) -> str | int | float:
    """`value` as the column holds it."""
    kinds = {"id": gallery.manifest.ids, **gallery.manifest.columns}
    if name not in kinds:
        known = ", ".join(("id", *gallery.columns))
        shown = value if flag == "--camera" or flag == "--query-camera" else f"{name}={value}"
        raise InvalidValue(flag, shown, f"a column of the gallery; {gallery.path} has {known}")
    kind = kinds[name]
    try:
        return value if kind == "text" else int(value) if kind == "int64" else float(value)
    except ValueError:
        expected = f"a {'whole ' * (kind == 'int64')}number, as the column {name} holds"
        raise InvalidValue(flag, value, expected) from None


def _time(gallery: Gallery, flag: str, text: str) -> float | None:
    if not text:
        return None
    if "time" not in gallery.columns:
        raise InvalidValue(flag, text, f"a gallery with times; {gallery.path} has none")
    try:
        return parse_time(text)
    except (ValueError, OverflowError):
        raise InvalidValue(flag, text, TIME_EXPECTED) from None
