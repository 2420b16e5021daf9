"""The crops that an int8 file is calibrated on: training crops, never test crops. Loads no torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pmm.data.bad_images import load_readable
from pmm.data.folders import PLAIN, POOL, parts_in
from pmm.data.left_out import is_image_name
from pmm.data.preprocessing import Crops
from pmm.data.readers import DEFAULT_DATASET, read_dataset
from pmm.data.samples import evenly_spaced
from pmm.export.options import MIN_CALIBRATION_CROPS, ExportOptions
from pmm.export.source import ExportSource
from pmm.utils.errors import InvalidFile, UserError

TEST_FOLDERS = ("query", "gallery", "test", "probe", "bounding_box_test")


def calibration_crops(source: ExportSource, options: ExportOptions) -> Crops:
    """The crops [N, H, W, 3] that `options` calibrates an int8 file of `source` on. Raises InvalidFile without any."""
    root = options.calibration_root or source.data.root
    try:
        if not root:
            raise InvalidFile("no data set is named")
        dataset = options.calibration_dataset or source.data.name or DEFAULT_DATASET
        files = calibration_files(root, dataset, options.calibration_images)
    except UserError as error:
        hints = error.hint, f"give {'another ' if options.calibration_root else ''}--calibration-root DIR"
        raise InvalidFile(
            f"no crops to calibrate on ({error.problem})",
            path=error.path or root or None,
            expected=error.expected,
            hint="; or ".join(filter(None, hints)),
        ) from error
    return load_readable(files, source.preprocessing, least=MIN_CALIBRATION_CROPS)


def calibration_files(root: str | Path, dataset: str, images: int) -> list[Path]:
    """At most `images` files, evenly over the training part of the data set at `root`, or over one folder of crops.

    Args:
        dataset: layout of `root`, if it is the root of a data set.

    Raises:
        InvalidFile: a folder of test crops, fewer than 32 crops, or neither a data set nor crops.
    """
    folder = Path(root)
    if not folder.is_dir():
        raise InvalidFile("not a folder", path=folder, expected="a data set or a folder of crops")
    if dataset == "folder":  # who is on the crops does not matter, so they may lie under cameras or dates
        dataset = f"folder:{'/'.join(PLAIN)}"
    try:
        files = [sample.path for sample in read_dataset(dataset, folder, flags="calibration").train]
        if parts_in(folder) == (POOL,):  # any folder of folders is such a data set, also one of queries
            _refuse_test_crops(folder, files)
    except UserError:
        files = sorted(entry for entry in folder.iterdir() if is_image_name(entry.name) and entry.is_file())
        if not files:
            raise  # its message names what a data set needs
        _refuse_test_crops(folder, files)
    if len(files) < MIN_CALIBRATION_CROPS:
        enough = f"at least {MIN_CALIBRATION_CROPS}, better several hundred"
        raise InvalidFile(f"{len(files)} crops to calibrate on", path=folder, expected=enough)
    return [files[index] for index in evenly_spaced(len(files), images)]


def _refuse_test_crops(folder: Path, files: Sequence[Path]) -> None:
    for path in {folder.absolute(), *(file.resolve().parent for file in files)}:  # links too
        below = path.relative_to(folder.resolve()).parts if path.is_relative_to(folder.resolve()) else ()
        for part in (*path.parts[-2:], *below):  # folders farther above are not about these crops
            if part.casefold() in TEST_FOLDERS:
                problem = f"it is in '{part}': a model that is calibrated on its test crops seems better than it is"
                raise InvalidFile(problem, path=folder, expected="training crops or a data set's root")
