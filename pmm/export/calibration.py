"""Which crops an int8 file is calibrated on: training crops, never those it will be judged by. Loads no torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pmm.data.folders import POOL, form_of
from pmm.data.readers import read_dataset
from pmm.data.samples import evenly
from pmm.data.scan import IMAGE_SUFFIXES
from pmm.export.options import LEAST_CALIBRATION_CROPS
from pmm.utils.errors import UserError

JUDGED_BY = ("query", "gallery", "test", "probe", "bounding_box_test")


def calibration_files(root: str | Path, dataset: str, images: int) -> list[Path]:
    """At most `images` files, evenly over the training part of the data set at `root`, or over one folder of crops.

    Args:
        dataset: layout of `root`, if it is the root of a data set.

    Raises:
        UserError: a folder of test crops, fewer than 32 crops, or neither a data set nor crops.
    """
    folder = Path(root)
    if not folder.is_dir():
        raise UserError(f"--calibration-root {folder} is not a folder; expected a data set or a folder of crops")
    try:
        files = [sample.path for sample in read_dataset(dataset, folder).train]
        if form_of(folder) == (POOL,):  # any folder of folders is a data set of one's own, one of queries too
            _refuse_test_crops(folder, files)
    except UserError:
        files = sorted(entry for entry in folder.iterdir() if entry.suffix.lower() in IMAGE_SUFFIXES)
        if not files:
            raise  # it says what it expected and found
        _refuse_test_crops(folder, files)
    if len(files) < LEAST_CALIBRATION_CROPS:
        raise UserError(
            f"{folder} holds {len(files)} crops to calibrate on; at least {LEAST_CALIBRATION_CROPS} are needed, "
            "several hundred are better"
        )
    return [files[index] for index in evenly(len(files), images)]


def _refuse_test_crops(folder: Path, files: Sequence[Path]) -> None:
    for path in {folder.absolute(), *(file.resolve().parent for file in files)}:  # links too
        below = path.relative_to(folder.resolve()).parts if path.is_relative_to(folder.resolve()) else ()
        for part in (*path.parts[-2:], *below):  # what lies farther above is not about these crops
            if part.casefold() in JUDGED_BY:
                raise UserError(
                    f"--calibration-root {folder} lies in '{part}': calibrating on the crops that a model is judged by "
                    "flatters it; give the training part, or the root of the data set"
                )
