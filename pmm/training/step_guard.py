"""What happens between two steps: the run goes on, is saved, or ends, in all its processes alike."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from pmm.data.batches import TrainBatch
from pmm.training.distributed import Processes
from pmm.training.failures import LossWatch, not_finite, with_way_on, write_bad_batch
from pmm.training.progress import Meter
from pmm.training.saver import Saver
from pmm.utils.errors import TrainingInterrupted, UserError

CONTINUE, SAVE, STOP, REFUSE, FAIL = range(5)
"""What to do before the next step: the largest of what the processes want."""


@dataclass(frozen=True, kw_only=True)
class Epoch:
    """An epoch in progress, in one process."""

    number: int
    """From 1."""
    label: str
    """What messages call it."""
    steps: int
    """All that it has."""
    meter: Meter
    watch: LossWatch


class SaveMidEpoch(Protocol):
    """Saves a run in the middle of an epoch: last.pth, and what it leaves behind where it `ends` here."""

    def __call__(self, meter: Meter, *, ends: bool) -> None: ...


class StepGuard:
    """Looks, before each step of the run in `out`, whether it has to be saved or to end."""

    def __init__(
        self,
        out: Path,
        files: Sequence[Path],
        processes: Processes,
        saver: Saver,
        *,
        skips_bad: bool,
        divergence_hint: str,
    ) -> None:
        """
        Args:
            files: the training images, in the order of the batches' `indices`.
            skips_bad: whether images that cannot be read are left out.
            divergence_hint: what to do about a loss that is not finite.
        """
        self.out, self.files, self.processes, self.saver = out, files, processes, saver
        self.skips_bad, self.divergence_hint = skips_bad, divergence_hint

    def before_step(
        self,
        batch: TrainBatch | UserError | None,
        epoch: Epoch,
        save: SaveMidEpoch,
        pending_signal: Callable[[], int] = lambda: 0,
    ) -> None:
        """`save` the run, or end it, if any process has to; then all processes do.

        `batch` is what the step takes, or the error in its place; None after the last step of the epoch.

        Raises TrainingInterrupted if `pending_signal` returns the number of a signal, and UserError for an image that
        cannot be read, a loss that is not finite, or a file that could not be written.
        """
        failure, number, action = epoch.watch.not_finite(), pending_signal(), CONTINUE
        if failure or self.saver.failed:
            action = FAIL
        elif isinstance(batch, UserError):
            action = REFUSE
        elif number:
            action = STOP
        elif batch is not None and self.processes.main and self.saver.due:
            action = SAVE
        action = self.processes.all_reduce_max(action)
        if action == FAIL:
            self.processes.run_on_all(lambda: self._fail(failure, epoch))
        if action in (SAVE, STOP, REFUSE):
            save(epoch.meter, ends=action != SAVE)
        if action == REFUSE:
            self.processes.run_on_all(lambda: self._raise_unreadable(batch))
        if action == STOP:
            where = f"{epoch.label}, after step {epoch.meter.steps} of {epoch.steps}"
            raise TrainingInterrupted(self.processes.all_reduce_max(number), where)

    def _fail(self, failure: Any, epoch: Epoch) -> None:
        """Raise UserError for a file that could not be written, or the step whose loss is not finite."""
        self.saver.check()
        if failure:
            losses, indices, step = failure
            files = [str(self.files[index]) for index in indices.tolist()]
            name = "bad-batch.json" if self.processes.main else f"bad-batch-{self.processes.rank}.json"
            report, lr = self.out / name, epoch.meter.lr
            write_bad_batch(report, epoch.number, step, lr, losses, files)
            raise not_finite(epoch.label, step, losses, lr, report, self.divergence_hint)

    def _raise_unreadable(self, batch: object) -> None:
        """Raise the UserError in place of a batch, if it is one."""
        if isinstance(batch, UserError):
            raise with_way_on(batch, self.files, skips_bad=self.skips_bad)
