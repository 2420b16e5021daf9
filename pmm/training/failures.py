"""What ends a training run early: a loss that is not finite, a full GPU, a lost process."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pmm.artifacts.run_folder import LAST
from pmm.data.bad_images import naming_all
from pmm.data.loader import LOST_WORKER
from pmm.training.distributed import report_failed_communication
from pmm.utils.errors import BackendUnavailable, CannotWrite, InvalidFile, OutOfMemory, UserError
from pmm.utils.files import write_file

NO_CODE = "no kernel image is available"
"""Of CUDA's message where a library has neither machine code nor PTX for the GPU."""


@contextlib.contextmanager
def explain_errors(out: Path, world: int) -> Iterator[None]:
    """Raises a UserError for those of torch's errors that a user, not a programmer, can do something about, and says of
    a file that cannot be written how the run goes on.

    `out` is the run's folder, `world` the number of its processes.
    """
    try:
        yield
    except CannotWrite as error:
        if (out / LAST).exists():
            error.hint = "; ".join(filter(None, (error.hint, "then go on with --resume")))
        raise
    except RuntimeError as error:
        if explanation := _explanation(error, out):
            raise explanation from error
        if world > 1:
            report_failed_communication(error)
        raise


def _explanation(error: RuntimeError, out: Path) -> UserError | None:
    text = str(error).strip().splitlines()[0] if str(error).strip() else ""
    if isinstance(error, torch.OutOfMemoryError):
        again = "go on with --resume" if (out / LAST).exists() else "start again"
        other = "or start a new run with --accumulate 2, --amp bf16 or a smaller --batch-size"
        hint = f"free some of it and {again}, {other}"
        return OutOfMemory(f"the GPU's memory is full ({text[:200]})", hint=hint)
    if LOST_WORKER in text:
        problem = f"a process that loads images has ended ({text}), probably because memory ran out"
        return UserError(problem, hint="use fewer --workers")
    if NO_CODE in text:
        problem = f"torch {torch.__version__} has no code for this GPU ({text})"
        return BackendUnavailable(problem, hint="torch's warning names builds that have, or use --device cpu")
    return None


def with_way_on(unreadable: UserError, files: Sequence[Path], *, skips_bad: bool) -> UserError:
    """The error of one of the training images `files` that ended the run, or of all that cannot be read, with what to
    do next."""
    if isinstance(unreadable, InvalidFile) and not skips_bad:
        unreadable = naming_all(unreadable, files, hint=unreadable.hint)
    mend = f"mend what cannot be read (pmm check lists it){'' if skips_bad else ' or add --skip-bad-images'}"
    go_on = f"the run is saved: {mend}, and go on with --resume"
    unreadable.hint = "; ".join(filter(None, (unreadable.hint, go_on)))
    return unreadable


def write_bad_batch(
    path: Path, epoch: int, step: int, lr: float, losses: Mapping[str, float], files: Sequence[str]
) -> None:
    """Write what is known of a step whose loss is not finite, as JSON, which has no number for NaN."""
    values = {name: value if math.isfinite(value) else str(value) for name, value in losses.items()}
    report = {"epoch": epoch, "step": step, "lr": lr, "losses": values, "files": files}
    write_file(path, json.dumps(report, indent=1, allow_nan=False) + "\n")


def not_finite(label: str, step: int, losses: Mapping[str, float], lr: float, report: Path, advice: str) -> UserError:
    """The error for a loss that is NaN or Inf; `report` lists the batch's files, `advice` says what to try."""
    parts = ", ".join(f"{name} {value:.3g}" for name, value in losses.items() if name != "loss")
    return UserError(
        f"{label}, step {step}: the loss is {losses['loss']} ({parts}; lr {lr:.2g})",
        hint=f"{advice}, then start again; {report} lists the batch's files; last.pth is from before this step",
    )


class LossWatch:
    """Checks the loss of a step when the next one is about to begin, while a GPU still works on the step's backward."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._last: tuple[dict[str, Tensor], Any, int] | None = None
        self._loss: Tensor | None = None
        self._copied: torch.cuda.Event | None = None

    def watch(self, losses: Mapping[str, Tensor], batch: Any, step: int) -> None:
        """Remember a step's losses (detached, from before backward), and `batch`, which tells of which images."""
        self._last = dict(losses), batch, step
        self._loss = losses["loss"]
        if self.device.type == "cuda":
            self._loss = torch.empty((), dtype=self._loss.dtype, pin_memory=True)
            self._loss.copy_(losses["loss"], non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record(torch.cuda.current_stream(self.device))

    def not_finite(self) -> tuple[dict[str, float], Any, int] | None:
        """The last step's losses, batch and number if its loss is NaN or Inf."""
        if self._last is None or self._loss is None:
            return None
        if self._copied is not None:
            self._copied.synchronize()
        if bool(torch.isfinite(self._loss)):
            return None
        losses, batch, step = self._last
        return {name: float(value) for name, value in losses.items()}, batch, step
