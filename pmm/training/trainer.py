"""A training run from its start, or from where it was interrupted, to its end."""

from __future__ import annotations

import contextlib
import dataclasses
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
from pmm.data.readers import read_dataset
from pmm.data.samples import ReidDataset, class_indices
from pmm.data.splits import without_unreadable
from pmm.models.registry import build_model
from pmm.training.announce import Announcer
from pmm.training.data_setup import check_unchanged
from pmm.training.distributed import Processes
from pmm.training.failures import LossWatch, explain_errors, not_finite
from pmm.training.flags import TrainOptions, saved_config
from pmm.training.precision import with_resolved_amp
from pmm.training.progress import Meter, epoch_line, mean_of_records, mean_of_states, warn
from pmm.training.run_logger import METRICS, RunLogger, open_run_logger
from pmm.training.state import check_device, in_train_mode, make_train_state, restore_training, snapshot
from pmm.training.step import set_deterministic, train_step
from pmm.training.validation import Validation
from pmm.utils.errors import TrainingInterrupted, UserError
from pmm.utils.files import sweep, write_file
from pmm.visualize.mixing import has_hard_mix, mix_picture

CONTINUE, SAVE, STOP, FAIL = range(4)
"""What to do before the next step: the largest of what the processes want."""
PICTURES, PICTURE_IDENTITIES = 10, 16
"""Pictures of the mix in a run, and the identities in each."""


class Trainer:
    """The run in `out`; all its processes do the same, only the first writes."""

    def __init__(
        self,
        config: Config,
        split: ReidDataset,
        out: Path,
        device: torch.device,
        processes: Processes,
        options: TrainOptions,
    ) -> None:
        """Raises UserError for a batch size that does not suit the data or the processes, or blocks that do not fit."""
        asked, config = config, with_resolved_amp(config, device, processes)
        self.config, self.split, self.out, self.device, self.processes = config, split, out, device, processes
        self.options = options
        check_device(config, device)
        set_deterministic(device, config.recipe.deterministic)
        torch.manual_seed(config.seed)
        self.batches, self.sampler = train_batches(
            split.train, config, rank=processes.rank, world=processes.world, skip_bad=options.skip_bad_images
        )
        self.model: torch.nn.Module = build_model(config)
        self.epochs_done, self.best = 0, -1.0
        self.progress: Mapping[str, Any] = {}
        """Of the epoch that was interrupted, `Meter.state` and more; see `_save_progress`."""
        self.announcer = Announcer(config, split, out, asked.recipe.amp)
        self.saved_at = time.monotonic()

    def run(self, pending_signal: Callable[[], int]) -> Path:
        """Train to the end, from the beginning or from last.pth as the options say; returns out/best.pth.

        `pending_signal` returns the number of the signal that ends the run, 0 for none: the run is then saved, and
        TrainingInterrupted raised. Raises UserError for weights that do not fit, a run of another configuration, a bad
        image, a loss that is not finite, or a full disk; last.pth is then intact.
        """
        if self.options.resume:
            self._resume()
        else:
            self._start()
        epochs, best = self.config.recipe.epochs, self.out / "best.pth"
        if self.epochs_done >= epochs:
            more = "train on with --extend --epochs N, or start another run"
            print(f"{self.out}: the run is finished ({self.epochs_done} epochs), nothing to do; {more}")
            return best
        step = self.progress.get("steps", 0)
        self.announcer.start(self.model, self.device, self.processes.world, self.epochs_done, step)
        try:
            with explain_errors(self.out, self.processes.world):
                self._train_epochs(pending_signal)
        finally:
            self.batches.close()
        print(f"{self.out}: finished {epochs} epochs; best.pth and last.pth are ready")
        return best

    def _start(self) -> None:
        """From the beginning. Raises UserError for weights that do not fit, or a folder that cannot be written."""
        self.processes.run_on_all(lambda: load_weights(self.model.backbone, self.config.model))  # type: ignore[arg-type]
        with explain_errors(self.out, self.processes.world):
            self._make_state()
        self.processes.run_on_all(self._write_config)
        self.processes.run_on_all(self._save)  # proves that there is room; from here on the run can be resumed

    def _resume(self) -> None:
        """From last.pth. Raises UserError if it is of another configuration or cannot be resumed from."""
        saved = self.processes.run_on_all(self._load_last)
        with explain_errors(self.out, self.processes.world):
            self._make_state()
            self.processes.run_on_all(lambda: restore_training(saved, self.state, self.out / "last.pth"))
        self.processes.run_on_all(self._write_config)
        self.epochs_done, self.best, self.progress = saved["epoch"], saved["best"], saved["progress"] or {}
        self.announcer.resume(Config.from_dict(saved["config"]).recipe, self.state)
        self.batches.skipped |= self.progress.get("skipped", {})
        self.announcer.reported |= set(self.batches.skipped)
        before = self.progress.get("world", self.processes.world)
        if before != self.processes.world and self.processes.main:
            warn(
                f"{before} processes shared each batch so far, now {self.processes.world} do: batch statistics, "
                "partners and triplets come from shares of another size"
            )

    def _train_epochs(self, pending_signal: Callable[[], int]) -> None:
        recipe, validation, test = self.config.recipe, self._validation(self.split, "held-out"), self._test()
        with open_run_logger(self.out, self.epochs_done) if self.processes.main else contextlib.nullcontext() as log:
            begin, first = time.perf_counter(), self.epochs_done
            for epoch in range(self.epochs_done + 1, recipe.epochs + 1):
                label = f"epoch {epoch}/{recipe.epochs}"
                records = self.processes.gather(self._train_epoch(epoch, label, pending_signal))
                result = None
                if validation and (epoch % recipe.val_every == 0 or epoch == recipe.epochs):
                    result = validation.evaluate(self.state.deployed, self.device)
                tested = test.evaluate(self.state.deployed, self.device) if test and self._tests_at(epoch) else None
                skipped = self._skipped()
                self.epochs_done, self.progress = epoch, {"skipped": skipped} if skipped else {}
                record = {"epoch": epoch, **(mean_of_records(records) if records else {})}
                is_best = validation is None
                if result:
                    record |= {"val_mAP": result.mAP, "val_rank1": result.rank1}
                    is_best = result.mAP > self.best
                    self.best = max(self.best, result.mAP)
                if tested:
                    record |= {"test_mAP": tested.mAP, "test_rank1": tested.rank1}
                if skipped:
                    record["skipped_images"] = len(skipped)
                self.processes.run_on_all(partial(self._save, is_best, partial(log.write, record) if log else None))
                if log:
                    left = (time.perf_counter() - begin) / (epoch - first) * (recipe.epochs - epoch)
                    print(epoch_line(label, record, len(self.sampler), left), flush=True)
                    self.announcer.warn(record, skipped, epoch - first)
                    self._log_picture(log, epoch)

    def _validation(self, split: ReidDataset, name: str) -> Validation | None:
        """Queries and gallery of `split`, without unreadable images if those are to be skipped; None if there are
        none."""
        if self.options.skip_bad_images:
            split, bad = without_unreadable(split)
            if bad and self.processes.main:
                warn(f"{len(bad)} {name} images skipped; {'; '.join(bad[:3])}")
        if not split.query:
            return None
        size = preprocessing_of(self.config)
        return self.processes.run_on_all(lambda: Validation(split, size, self.processes, name=name))

    def _test(self) -> Validation | None:
        """The test split, if it is to be evaluated during training; it chooses nothing."""
        if not self.config.recipe.eval_every:
            return None
        data = read_dataset(self.config.data.dataset, Path(self.config.data.root))
        return self._validation(dataclasses.replace(data, train=()), "test")

    def _tests_at(self, epoch: int) -> bool:
        return epoch % self.config.recipe.eval_every == 0 or epoch == self.config.recipe.epochs

    def _load_last(self) -> dict[str, Any]:
        saved = checkpoint.load(self.out / "last.pth")
        # a run that was ended before its first save as an extended one is in config.json as one
        extend = self.options.extend or saved_config(self.out).recipe.epochs == self.config.recipe.epochs
        check_unchanged(self.out, Config.from_dict(saved["config"]), self.config, extend=extend)
        return saved

    def _write_config(self) -> None:
        """Into a folder without the unfinished files of a run that was killed."""
        if self.processes.main:
            sweep(self.out, ("last.pth", "best.pth", "config.json", METRICS))
            write_file(self.out / "config.json", json.dumps(self.config.to_dict(), indent=2) + "\n")

    def _make_state(self) -> None:
        self.state = make_train_state(self.model, self.config, self.device, len(self.sampler), self.processes)
        self.model = self.state.model

    def _train_epoch(self, epoch: int, label: str, pending_signal: Callable[[], int]) -> dict[str, Any]:
        """This process's record of an epoch, or of the rest of an interrupted one."""
        meter, watch = Meter(self.device, self.progress), LossWatch(self.device)
        self.sampler.epoch, self.sampler.first = epoch, meter.steps
        self.state = in_train_mode(self.state, epoch)
        for batch in meter.batches(self.batches, label, len(self.sampler)):
            self._before_step(batch, meter, watch, label, pending_signal)
            assert not isinstance(batch, UserError)
            lr = self.state.lr
            on_losses = partial(watch.watch, batch=batch.indices, step=meter.steps + 1)
            losses = train_step(self.state, batch, epoch=epoch, step=meter.steps, on_losses=on_losses)
            meter.step(losses, len(batch.labels), lr)
        self._before_step(None, meter, watch, label, lambda: 0)
        return meter.record()

    def _before_step(
        self,
        batch: TrainBatch | UserError | None,
        meter: Meter,
        watch: LossWatch,
        label: str,
        pending_signal: Callable[[], int],
    ) -> None:
        """Save, stop or fail if any process has to; then all processes do."""
        failure = watch.not_finite()
        number = pending_signal()
        action = FAIL if failure or isinstance(batch, UserError) else STOP if number else CONTINUE
        if action == CONTINUE and batch is not None:
            action = SAVE if time.monotonic() > self.saved_at + 60 * self.options.save_minutes else CONTINUE
        action = self.processes.all_reduce_max(action)
        if action == FAIL:
            self.processes.run_on_all(lambda: self._fail(batch, failure, meter, label))
        if action in (SAVE, STOP):
            self._save_progress(meter)
        if action == STOP:
            where = f"{label}, after step {meter.steps} of {len(self.sampler)}"
            raise TrainingInterrupted(self.processes.all_reduce_max(number), where)

    def _save_progress(self, meter: Meter) -> None:
        """last.pth in the middle of an epoch."""
        states = self.processes.gather(meter.state())
        self.progress = mean_of_states(states) if states else {}
        if skipped := self._skipped():
            self.progress = {**self.progress, "skipped": skipped}
        self.processes.run_on_all(self._save)

    def _skipped(self) -> dict[int, str]:
        """The training images that any process could not read so far, index to reason; in the first process."""
        shares = self.processes.gather(self.batches.skipped)
        return {index: reason for share in shares for index, reason in share.items()}

    def _fail(self, batch: Any, failure: Any, meter: Meter, label: str) -> None:
        """Raise UserError for a batch that could not be loaded, or the step whose loss is not finite."""
        if failure:
            losses, indices, step = failure
            files = [str(self.split.train[index].path) for index in indices.tolist()]
            values = {name: value if math.isfinite(value) else str(value) for name, value in losses.items()}
            report = {"epoch": self.epochs_done + 1, "step": step, "lr": meter.lr, "losses": values, "files": files}
            path = self.out / ("bad-batch.json" if self.processes.main else f"bad-batch-{self.processes.rank}.json")
            write_file(path, json.dumps(report, indent=1, allow_nan=False) + "\n")  # JSON has no number for NaN
            raise not_finite(label, step, losses, meter.lr, path, self.config.recipe.divergence_hint)
        if isinstance(batch, UserError):
            raise batch

    def _save(self, is_best: bool = False, log: Callable[[], None] | None = None) -> None:
        """best.pth, the line that `log` writes, last.pth: a run killed before the last repeats what it has lost."""
        self.saved_at = time.monotonic()
        if not self.processes.main:
            return
        progress = {"world": self.processes.world, **self.progress}
        content = snapshot(self.state, self.epochs_done, self.best, progress)
        if is_best:
            checkpoint.save(self.out / "best.pth", checkpoint.for_deployment(content))
        if log:
            log()
        checkpoint.save(self.out / "last.pth", content)

    def _log_picture(self, log: RunLogger, epoch: int) -> None:
        """A few times in a run, a picture of what the mix does to a few training crops."""
        epochs, size = self.config.recipe.epochs, preprocessing_of(self.config)
        if not has_hard_mix(self.model) or epoch not in {1 + (epochs - 1) * n // PICTURES for n in range(PICTURES + 1)}:
            return
        index, readable = class_indices(self.split.train), set(range(len(self.split.train))) - set(self.batches.skipped)
        samples = {self.split.train[i].pid: self.split.train[i] for i in readable}
        chosen = sorted(samples.values(), key=lambda sample: sample.pid)[:PICTURE_IDENTITIES]
        with contextlib.suppress(UserError):  # one that cannot be read may not have come up in training yet
            crops = load_crops([sample.path for sample in chosen], size)
            labels = [index[sample.pid] for sample in chosen]
            log.add_picture("mix", mix_picture(self.model, crops, labels, size, rows=4, seed=epoch, height=128), epoch)
