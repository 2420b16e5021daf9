"""What a search on the command line asks for, in terms of its gallery: rows, threshold, cameras. Loads no torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from pmm.gallery.crop_metadata import TIME_EXPECTED, parse_time
from pmm.gallery.filters import RowFilter
from pmm.gallery.gallery import Gallery
from pmm.gallery.storage.thresholds import Threshold, thresholds_for
from pmm.utils.errors import InvalidFile, InvalidInput, InvalidValue, one_of


def row_filter(
    gallery: Gallery, *, cameras: Sequence[str] = (), since: str = "", until: str = "", where: Sequence[str] = ()
) -> RowFilter | None:
    """The rows that all of the flags keep; None if there are none of them.

    Args:
        cameras: any of these.
        since, until: times, as `parse_time` reads them.
        where: NAME=VALUE of the gallery's columns or `id`; of one NAME any of its values.

    Raises InvalidValue for a column that the gallery does not have, or a value that it cannot hold.
    """
    if not (cameras or since or until or where):
        return None
    wanted: dict[str, list[str | int | float]] = {}
    for text in where:
        name, equals, value = text.partition("=")
        if not equals:
            raise InvalidValue("--where", text, "NAME=VALUE, as floor=3")
        if name == "time":
            raise InvalidValue("--where", text, hint="give --time-from and --time-to")
        wanted.setdefault(name, []).append(_value(gallery, "--where", name, value))
    return RowFilter(
        cameras=[_value(gallery, "--camera", "camera", camera) for camera in cameras],  # type: ignore[misc]
        since=_time(gallery, "--time-from", since),
        until=_time(gallery, "--time-to", until),
        ids=wanted.pop("id", []),  # type: ignore[arg-type]
        columns=wanted,
    )


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
