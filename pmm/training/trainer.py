"""A training run from its start, or from where it was interrupted, to its end."""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch

from pmm.artifacts import checkpoint
from pmm.artifacts.init_file import InitFile
from pmm.artifacts.initial_weights import load_initial_weights
from pmm.config import Config
from pmm.data.batches import TrainBatch
from pmm.data.loader import train_batches
from pmm.data.preprocessing import preprocessing_of
from pmm.data.readers import read_dataset
from pmm.data.samples import ReidDataset
from pmm.data.splits import without_unreadable
from pmm.models.registry import build_model
from pmm.training.announce import Announcer
from pmm.training.data_setup import check_unchanged
from pmm.training.distributed import Processes
from pmm.training.failures import LossWatch, explain_errors, not_finite
from pmm.training.flags import TrainOptions, saved_config
from pmm.training.pictures import log_mix_picture
from pmm.training.precision import with_resolved_amp
from pmm.training.progress import Meter, epoch_line, mean_of_records, mean_of_states, warn
from pmm.training.run_logger import METRICS, RunLogger, open_run_logger
from pmm.training.saver import Saver
from pmm.training.state import check_device, in_train_mode, make_train_state, restore_training, snapshot
from pmm.training.step import train_step
from pmm.training.validation import Validation
from pmm.utils.errors import TrainingInterrupted, UserError
from pmm.utils.files import sweep, write_file

CONTINUE, SAVE, STOP, FAIL = range(4)
"""What to do before the next step: the largest of what the processes want."""


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
        init: InitFile | None = None,
    ) -> None:
        """Raises UserError for a batch size that does not suit the data or the processes, or blocks that do not fit."""
        asked, config = config, with_resolved_amp(config, device, processes)
        self.config, self.split, self.out, self.device, self.processes = config, split, out, device, processes
        self.options, self.init = options, init
        self.origin = {"init": init.sha256} if init else {}
        """For the versions in its checkpoints: the file that the run was started from."""
        check_device(config, device)
        torch.manual_seed(config.seed)
        self.batches, self.sampler = train_batches(
            split.train,
            config,
            device=device,
            rank=processes.rank,
            world=processes.world,
            skip_bad=options.skip_bad_images,
        )
        self.model: torch.nn.Module = build_model(config)
        self.epochs_done, self.best = 0, -1.0
        self.progress: Mapping[str, Any] = {}
        """Of the epoch that was interrupted, `Meter.state` and more; see `_save_progress`."""
        self.announcer = Announcer(config, split, out, asked.recipe.amp)
        self.saver = Saver(out, options.save_minutes, device)

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
        with closing(self.saver), closing(self.batches), explain_errors(self.out, self.processes.world):
            self._train_epochs(pending_signal)
        print(f"{self.out}: finished {epochs} epochs; best.pth and last.pth are ready")
        return best

    def _start(self) -> None:
        """From the beginning. Raises UserError for weights that do not fit, or a folder that cannot be written."""
        table = self.processes.run_on_all(lambda: load_initial_weights(self.model, self.config, self.init))
        if self.init:
            print(table)
            self.init.weights.clear()  # a second network in memory, for as long as the run takes
        with explain_errors(self.out, self.processes.world):
            self._make_state()
        self.processes.run_on_all(self._write_config)
        self._save(self.saver.save_first)  # proves that there is room; from here on the run can be resumed

    def _resume(self) -> None:
        """From last.pth. Raises UserError if it is of another configuration or cannot be resumed from."""
        saved = self.processes.run_on_all(self._load_last)
        with explain_errors(self.out, self.processes.world):
            self._make_state()
            self.processes.run_on_all(lambda: restore_training(saved, self.state, self.out / "last.pth"))
        self.processes.run_on_all(self._write_config)
        self.epochs_done, self.best, self.progress = saved["epoch"], saved["best"], saved["progress"] or {}
        self.origin = {key: saved["versions"][key] for key in ("init",) if key in saved["versions"]}
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
        with open_run_logger(self.out, self.epochs_done) if self.processes.main else nullcontext() as log:
            begin, first = time.perf_counter(), self.epochs_done
            self.validates = validation is not None
            self.sampler.epochs = range(first + 1, recipe.epochs + 1)
            self.sampler.first = self.progress.get("steps", 0)
            batches = iter(self.batches)
            for epoch in self.sampler.epochs:
                label = f"epoch {epoch}/{recipe.epochs}"
                records = self.processes.gather(self._train_epoch(epoch, batches, label, pending_signal))
                result = None
                if validation and (epoch % recipe.val_every == 0 or epoch == recipe.epochs):
                    result = validation.evaluate(self.state.deployed, self.device)
                tested = test.evaluate(self.state.deployed, self.device) if test and self._tests_at(epoch) else None
                skipped = self._skipped()
                self.epochs_done, self.progress = epoch, {"skipped": skipped} if skipped else {}
                record = {"epoch": epoch, **(mean_of_records(records) if records else {})}
                is_best = result is not None and result.mAP > self.best
                if result:
                    record |= {"val_mAP": result.mAP, "val_rank1": result.rank1}
                    self.best = max(self.best, result.mAP)
                if tested:
                    record |= {"test_mAP": tested.mAP, "test_rank1": tested.rank1}
                if skipped:
                    record["skipped_images"] = len(skipped)
                self.processes.run_on_all(partial(self._end_epoch, log, record, is_best))
                if log:
                    left = (time.perf_counter() - begin) / (epoch - first) * (recipe.epochs - epoch)
                    print(epoch_line(label, record, len(self.sampler), left), flush=True)
                    self.announcer.warn(record, skipped, epoch - first)
                    log_mix_picture(log, self.model, self.split.train, self.config, epoch, self.batches.skipped)
            self._save(partial(self.saver.save_now, best=not self.validates))

    def _end_epoch(self, log: RunLogger | None, record: Mapping[str, Any], is_best: bool) -> None:
        """The record of an epoch before its model, which comes before last.pth: a run that is killed between them
        repeats all that last.pth does not know of."""
        if log:
            log.write(record)
            if is_best:
                self.saver.save_best(self._content())

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
        before, epochs = Config.from_dict(saved["config"]), self.config.recipe.epochs
        extend = self.options.extend
        if before.recipe.epochs != epochs:  # extended, and ended before its first save, it is so in config.json alone
            extend = extend or saved_config(self.out).recipe.epochs == epochs
        check_unchanged(self.out, before, self.config, extend=extend)
        return saved

    def _write_config(self) -> None:
        """Into a folder without the unfinished files of a run that was killed."""
        if self.processes.main:
            sweep(self.out, ("last.pth", "best.pth", "config.json", METRICS))
            write_file(self.out / "config.json", json.dumps(self.config.to_dict(), indent=2) + "\n")

    def _make_state(self) -> None:
        self.state = make_train_state(self.model, self.config, self.device, len(self.sampler), self.processes)
        self.model = self.state.model

    def _train_epoch(
        self, epoch: int, batches: Iterator[TrainBatch | UserError], label: str, pending_signal: Callable[[], int]
    ) -> dict[str, Any]:
        """This process's record of an epoch, or of the rest of an interrupted one, whose `batches` are the next."""
        meter, watch = Meter(self.device, self.progress), LossWatch(self.device)
        self.state = in_train_mode(self.state, epoch)
        for batch in meter.batches(batches, label, len(self.sampler)):
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
        failure, number, action = watch.not_finite(), pending_signal(), CONTINUE
        if failure or isinstance(batch, UserError) or self.saver.failed:
            action = FAIL
        elif number:
            action = STOP
        elif batch is not None and self.processes.main and self.saver.due:
            action = SAVE
        action = self.processes.all_reduce_max(action)
        if action == FAIL:
            self.processes.run_on_all(lambda: self._fail(batch, failure, meter, label))
        if action == SAVE:
            self._save_progress(meter, self.saver.save_last)
        if action == STOP:
            self._save_progress(meter, partial(self.saver.save_now, best=not self.validates))
            where = f"{label}, after step {meter.steps} of {len(self.sampler)}"
            raise TrainingInterrupted(self.processes.all_reduce_max(number), where)

    def _save_progress(self, meter: Meter, save: Callable[[dict[str, Any]], None]) -> None:
        """`save` the run in the middle of an epoch."""
        states = self.processes.gather(meter.state())
        self.progress = mean_of_states(states) if states else {}
        if skipped := self._skipped():
            self.progress = {**self.progress, "skipped": skipped}
        self._save(save)

    def _skipped(self) -> dict[int, str]:
        """The training images that any process could not read so far, index to reason; in the first process."""
        shares = self.processes.gather(self.batches.skipped)
        return {index: reason for share in shares for index, reason in share.items()}

    def _fail(self, batch: Any, failure: Any, meter: Meter, label: str) -> None:
        """Raise UserError for a file that could not be written, a batch that could not be loaded, or the step whose
        loss is not finite."""
        self.saver.check()
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

    def _save(self, save: Callable[[dict[str, Any]], None]) -> None:
        """`save` the run as it is, in the first process; all raise its error."""
        self.processes.run_on_all(lambda: save(self._content()) if self.processes.main else None)

    def _content(self) -> dict[str, Any]:
        progress = {"world": self.processes.world, **self.progress}
        content = snapshot(self.state, self.epochs_done, self.best, progress)
        return {**content, "versions": {**content["versions"], **self.origin}}
