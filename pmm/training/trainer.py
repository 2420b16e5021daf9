"""A training run from its start, or from where it was stopped, to its end; nothing of it is lost."""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from pmm.artifacts import checkpoint
from pmm.artifacts.pretrained import load_weights
from pmm.config import Config
from pmm.data.batches import TrainBatch
from pmm.data.crops import load_crops
from pmm.data.loader import train_batches
from pmm.data.preprocessing import preprocessing_of
from pmm.data.samples import ReidDataset, class_indices
from pmm.data.splits import without_unreadable
from pmm.models.registry import build_model
from pmm.training.announce import Announcer
from pmm.training.data_setup import refuse_changes
from pmm.training.distributed import Processes
from pmm.training.failures import explained, not_finite
from pmm.training.flags import TrainOptions
from pmm.training.progress import LossWatch, Meter, epoch_line, mean_of_records, mean_of_states, warn
from pmm.training.resume import restore_training, snapshot
from pmm.training.run_logger import RunLogger, journal
from pmm.training.state import check_device, make_train_state
from pmm.training.step import Validation, be_deterministic, train_step
from pmm.utils.errors import TrainingInterrupted, UserError
from pmm.utils.files import sweep, write_file
from pmm.visualize.mixing import has_hard_mix, mix_picture

GO, SAVE, STOP, FAIL = range(4)
"""What is to be done before the next step; of several wishes the largest."""
PICTURES, SHOWN = 10, 16
"""Pictures of the mix in a run, and the identities in each."""


class Trainer:
    """The run in `out`; all its processes do the same, the first alone writes."""

    def __init__(
        self,
        config: Config,
        split: ReidDataset,
        out: Path,
        device: torch.device,
        processes: Processes,
        options: TrainOptions,
    ) -> None:
        """Raises UserError for a batch that the data or the processes do not make, or weights that do not fit."""
        self.config, self.split, self.out, self.device, self.processes = config, split, out, device, processes
        self.options = options
        check_device(config, device)
        be_deterministic(device)
        torch.manual_seed(config.seed)
        self.batches, self.sampler = train_batches(
            split.train, config, rank=processes.rank, world=processes.world, skip_bad=options.skip_bad_images
        )
        self.model = build_model(config)
        self.finished, self.best = 0, -1.0
        self.done: Mapping[str, Any] = {}
        self.announcer = Announcer(config, split, out)
        self.saved_at = time.monotonic()

    def run(self, signalled: Callable[[], int]) -> Path:
        """Train to the end, from the beginning or from last.pth as the options say; returns out/best.pth.

        `signalled` says which signal asks for an end, 0 for none: the run is then saved, TrainingInterrupted raised.
        Raises UserError for weights that do not fit, a run of another configuration, a bad image, a loss that is not
        finite, or a disk that is full; last.pth is then intact.
        """
        if self.options.resume:
            self._resume()
        else:
            self._start()
        epochs, best = self.config.recipe.epochs, self.out / "best.pth"
        if self.finished >= epochs:
            print(f"{self.out}: the run is finished ({self.finished} epochs); nothing to do")
            return best
        step = self.done.get("steps", 0)
        self.announcer.start(self.model, self.device, self.processes.world, self.finished, step)
        try:
            with explained(self.out, self.processes.world):
                self._run(signalled)
        finally:
            self.batches.close()
        print(f"{self.out}: finished {epochs} epochs; best.pth and last.pth are ready")
        return best

    def _start(self) -> None:
        """From the beginning. Raises UserError for weights that do not fit, or a folder that cannot be written."""
        self.processes.together(lambda: load_weights(self.model.backbone, self.config.model))  # type: ignore[arg-type]
        with explained(self.out, self.processes.world):
            self._ready()
        self.processes.together(self._begin)
        self.processes.together(self._save)  # shows that there is room, and from here on a run can be resumed

    def _resume(self) -> None:
        """From last.pth. Raises UserError if it is of another configuration or nothing to resume from."""
        state = self.processes.together(self._last)
        with explained(self.out, self.processes.world):
            self._ready()
            self.processes.together(lambda: restore_training(state, self.trainee))
        self.processes.together(self._begin)
        self.finished, self.best, self.done = state["epoch"], state["best"], state["progress"] or {}
        self.batches.skipped |= self.done.get("skipped", {})
        self.announcer.named |= set(self.batches.skipped)
        before = self.done.get("world", self.processes.world)
        if before != self.processes.world and self.processes.main:
            warn(
                f"so far {before} processes shared each batch, from now on {self.processes.world} do: batch "
                "statistics, partners and triplets are found in other parts of it"
            )

    def _run(self, signalled: Callable[[], int]) -> None:
        recipe, validation = self.config.recipe, self._validation()
        with journal(self.out, self.finished) if self.processes.main else contextlib.nullcontext() as log:
            begin, first = time.perf_counter(), self.finished
            for epoch in range(self.finished + 1, recipe.epochs + 1):
                label = f"epoch {epoch}/{recipe.epochs}"
                records = self.processes.gathered(self._epoch(epoch, label, signalled))
                result = None
                if validation and (epoch % recipe.val_every == 0 or epoch == recipe.epochs):
                    result = validation.evaluate(self.model, self.device)
                skipped = self._skipped()
                self.finished, self.done = epoch, {"skipped": skipped} if skipped else {}
                record = {"epoch": epoch, **(mean_of_records(records) if records else {})}
                is_best = validation is None
                if result:
                    record |= {"val_mAP": result.mAP, "val_rank1": result.rank1}
                    is_best = result.mAP > self.best
                    self.best = max(self.best, result.mAP)
                if skipped:
                    record["skipped_images"] = len(skipped)
                self.processes.together(partial(self._save, is_best, partial(log.write, record) if log else None))
                if log:
                    left = (time.perf_counter() - begin) / (epoch - first) * (recipe.epochs - epoch)
                    print(epoch_line(label, record, len(self.sampler), left), flush=True)
                    self.announcer.warn(record, skipped, epoch - first)
                    self._show(log, epoch)

    def _validation(self) -> Validation | None:
        """The held-out identities, without those of their images that are to be left out; None without any."""
        split = self.split
        if self.options.skip_bad_images:
            split, bad = without_unreadable(split)
            if bad and self.processes.main:
                warn(f"{len(bad)} held-out images skipped; {'; '.join(bad[:3])}")
        if not split.query:
            return None
        return self.processes.together(lambda: Validation(split, preprocessing_of(self.config), self.processes))

    def _last(self) -> dict[str, Any]:
        state = checkpoint.load(self.out / "last.pth")
        refuse_changes(self.out, Config.from_dict(state["config"]), self.config)
        return state

    def _begin(self) -> None:
        """What stands in the folder whichever step the run is at."""
        if self.processes.main:
            sweep(self.out, ("last.pth", "best.pth", "config.json", "metrics.jsonl"))
            write_file(self.out / "config.json", json.dumps(self.config.to_dict(), indent=2) + "\n")

    def _ready(self) -> None:
        self.trainee = make_train_state(self.model, self.config, self.device, len(self.sampler), self.processes)
        self.model = self.trainee.model

    def _epoch(self, epoch: int, label: str, signalled: Callable[[], int]) -> dict[str, Any]:
        """The record of this process's share of an epoch, or of what is left of it."""
        meter, watch = Meter(self.device, self.done), LossWatch(self.device)
        self.sampler.epoch, self.sampler.first = epoch, meter.steps
        self.model.train()
        for batch in meter.batches(self.batches, label, len(self.sampler)):
            self._before_step(batch, meter, watch, label, signalled)
            assert not isinstance(batch, UserError)
            lr = self.trainee.lr
            losses = train_step(
                self.trainee,
                batch,
                self.config,
                self.device,
                self.processes,
                epoch=epoch,
                step=meter.steps,
                found=partial(watch.note, batch=batch.indices, step=meter.steps + 1),
            )
            meter.step(losses, len(batch.labels), lr)
        self._before_step(None, meter, watch, label, lambda: 0)
        return meter.record()

    def _before_step(
        self,
        batch: TrainBatch | UserError | None,
        meter: Meter,
        watch: LossWatch,
        label: str,
        signalled: Callable[[], int],
    ) -> None:
        """Save, stop or fail if any process wants to; all of them do the same."""
        lost = watch.bad()
        number = signalled()
        word = FAIL if lost or isinstance(batch, UserError) else STOP if number else GO
        if word == GO and batch is not None and time.monotonic() > self.saved_at + 60 * self.options.save_minutes:
            word = SAVE
        word = self.processes.agree(word)
        if word == FAIL:
            self.processes.together(lambda: self._refuse(batch, lost, meter, label))
        if word in (SAVE, STOP):
            states = self.processes.gathered(meter.state())
            self.done = mean_of_states(states) if states else {}
            if skipped := self._skipped():
                self.done = {**self.done, "skipped": skipped}
            self.processes.together(self._save)
        if word == STOP:
            where = f"{label}, after step {meter.steps} of {len(self.sampler)}"
            raise TrainingInterrupted(self.processes.agree(number), where)

    def _skipped(self) -> dict[int, str]:
        """Of the training images that any process could not read so far: index and why; in the first process."""
        found = self.processes.gathered(self.batches.skipped)
        return {index: why for skipped in found for index, why in skipped.items()}

    def _refuse(self, batch: Any, lost: Any, meter: Meter, label: str) -> None:
        """Raise UserError for a batch that could not be loaded, or the step whose loss is not finite."""
        if lost:
            losses, indices, step = lost
            files = [str(self.split.train[index].path) for index in indices.tolist()]
            finite = {name: value if math.isfinite(value) else str(value) for name, value in losses.items()}
            report = {"epoch": self.finished + 1, "step": step, "lr": meter.lr, "losses": finite, "files": files}
            path = self.out / ("bad-batch.json" if self.processes.main else f"bad-batch-{self.processes.rank}.json")
            write_file(path, json.dumps(report, indent=1, allow_nan=False) + "\n")  # JSON has no word for NaN
            raise not_finite(label, step, losses, meter.lr, str(path), self.config.recipe.gentler)
        if isinstance(batch, UserError):
            raise batch

    def _save(self, is_best: bool = False, log: Callable[[], None] | None = None) -> None:
        """best.pth, what `log` writes, and last.pth at last: a run killed before it does again what is lost."""
        self.saved_at = time.monotonic()
        if not self.processes.main:
            return
        progress = {"world": self.processes.world, **self.done}
        state = snapshot(self.trainee, self.config, self.finished, self.best, progress)
        if is_best:
            checkpoint.save(self.out / "best.pth", checkpoint.for_deployment(state))
        if log:
            log()
        checkpoint.save(self.out / "last.pth", state)

    def _show(self, log: RunLogger, epoch: int) -> None:
        """A few times in a run, what the mix does to a few training crops."""
        epochs, size = self.config.recipe.epochs, preprocessing_of(self.config)
        if not has_hard_mix(self.model) or epoch not in {1 + (epochs - 1) * n // PICTURES for n in range(PICTURES + 1)}:
            return
        index, readable = class_indices(self.split.train), set(range(len(self.split.train))) - set(self.batches.skipped)
        some = sorted({self.split.train[i].pid: self.split.train[i] for i in readable}.values(), key=lambda s: s.pid)
        with contextlib.suppress(UserError):  # one that cannot be read has not been met in training yet
            crops = load_crops([sample.path for sample in some[:SHOWN]], size.height, size.width)
            labels = [index[sample.pid] for sample in some[:SHOWN]]
            log.show("mix", mix_picture(self.model, crops, labels, size, rows=4, seed=epoch, height=128), epoch)
