"""The log of a training run: metrics.jsonl, and TensorBoard's curves and pictures."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from pmm.artifacts.run_folder import METRICS_FILE
from pmm.utils.files import cannot_write, write_file

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


class RunLogger:
    """Writes a line per epoch to metrics.jsonl, the same values as curves, and pictures."""

    def __init__(self, path: Path, log: IO[str], board: SummaryWriter) -> None:
        self._path, self._log, self._board = path, log, board

    def write(self, record: Mapping[str, Any]) -> None:
        """Add an epoch's record. Raises CannotWrite if the disk is full."""
        try:
            self._log.write(json.dumps(record) + "\n")
            self._log.flush()
            for name, value in record.items():
                self._board.add_scalar(name, value, record["epoch"])
        except OSError as error:
            raise cannot_write(self._path, error) from error

    def add_picture(self, name: str, picture: Image.Image, epoch: int) -> None:
        """Add an RGB picture."""
        with contextlib.suppress(OSError):  # a full disk ends the run where a checkpoint or a record would be lost
            self._board.add_image(name, np.asarray(picture), epoch, dataformats="HWC")


@contextlib.contextmanager
def open_run_logger(out: Path, epochs: int) -> Iterator[RunLogger]:
    """The logger of the run in `out`, which continues after `epochs`: records of later epochs are dropped.

    Raises CannotWrite if the log cannot be written.
    """
    from torch.utils.tensorboard import SummaryWriter

    path = out / METRICS_FILE
    lines = path.read_text().splitlines(keepends=True)[:epochs] if path.exists() and epochs else []
    write_file(path, "".join(lines))
    try:
        log = path.open("a")
        board = SummaryWriter(str(out / "tensorboard"), purge_step=epochs + 1)
    except OSError as error:
        raise cannot_write(path, error) from error
    try:
        yield RunLogger(path, log, board)
    finally:
        for part in (board, log):
            with contextlib.suppress(OSError):
                part.close()
