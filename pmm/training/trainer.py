"""A training run from its start, or from where it was interrupted, to its end."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch

from pmm.artifacts.checkpoint import epoch_of, statistics_of
from pmm.artifacts.init_file import InitFile
from pmm.artifacts.initial_weights import load_initial_weights
from pmm.artifacts.torch_file import read_torch_file, write_torch_file
from pmm.config import Config
from pmm.data.batches import TrainBatch
from pmm.data.crop_statistics import CropStatistics
from pmm.data.loader import train_batches
from pmm.data.measure_crops import crop_statistics
from pmm.data.occlusion import Occluder
from pmm.data.preprocessing import preprocessing_of
from pmm.data.samples import ReidDataset
from pmm.models.phases import Phase, phase_of
from pmm.models.registry import build_model, phases_of
from pmm.training.announce import Announcer
from pmm.training.distributed import Processes
from pmm.training.failures import LossWatch, explain_errors, not_finite, with_way_on, write_bad_batch
from pmm.training.flags import TrainOptions
from pmm.training.occlusion_table import keep_model, make_occluder
from pmm.training.pictures import log_mix_picture
from pmm.training.progress import Meter, epoch_line, mean_of_records, mean_of_states, warn
from pmm.training.resuming import best_so_far, load_last
from pmm.training.run_logger import METRICS, RunLogger, open_run_logger
from pmm.training.saver import Saver
from pmm.training.snapshot import restore_training, snapshot
from pmm.training.state import (
    TrainState,
    check_device,
    check_network_on,
    in_train_mode,
    make_train_state,
    next_phase,
)
from pmm.training.step import train_step
from pmm.training.validation import Evaluations
from pmm.utils.errors import TrainingInterrupted, UserError
from pmm.utils.facts import how_many
from pmm.utils.files import sweep, write_file

INITIAL = "initial.pth"
"""The weights that a run began with, where a later phase begins with them again."""
CONTINUE, SAVE, STOP, REFUSE, FAIL = range(5)
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
        *,
        asked_amp: str,
        init: InitFile | None = None,
    ) -> None:
        """`asked_amp`: the recipe's `amp` before it was resolved.

        Raises UserError for a batch size that does not suit the data or the processes, blocks that do not fit, or a
        network that `device` cannot train.
        """
        self.config, self.split, self.out, self.device, self.processes = config, split, out, device, processes
        self.options, self.init = options, init
        self.origin = {"init": init.sha256} if init else {}
        """For the versions in its checkpoints: the file that the run was started from."""
        check_device(config, device)
        torch.manual_seed(config.seed)
        self._load_batches()
        self.phases = phases_of(config)
        self.state: TrainState
        self.model = build_model(config)
        check_network_on(device, self.model)
        self.epochs_done, self.best = 0, -1.0
        self.progress: Mapping[str, Any] = {}
        """Of the epoch that was interrupted, `Meter.state` and more; see `_save_progress`."""
        self.crop_statistics: CropStatistics | None = None
        """Of the training crops; in the first process, which writes them."""
        self.announcer = Announcer(config, split, out, asked_amp)
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
            more = f"train on with --extend --epochs N, more than {epochs}, or start another run"
            print(f"{self.out}: the run is finished ({how_many(epochs, 'epoch')}), nothing to do; {more}")
            return best
        step = self.progress.get("steps", 0)
        self.announcer.start(self.model, self.device, self.processes.world, self.epochs_done, step)
        with closing(self.saver), closing(self), explain_errors(self.out, self.processes.world):
            self._train_epochs(pending_signal)
        if self.processes.main:
            (self.out / INITIAL).unlink(missing_ok=True)
        print(f"{self.out}: finished {how_many(epochs, 'epoch')}; best.pth and last.pth are ready")
        return best

    def close(self) -> None:
        """End the processes that load images."""
        self.batches.close()

    def _load_batches(self, occluder: Occluder | None = None) -> None:
        """A new loader, whose crops `occluder` hides parts of. Raises UserError as `train_batches`."""
        self.batches, self.sampler = train_batches(
            self.split.train,
            self.config,
            device=self.device,
            rank=self.processes.rank,
            world=self.processes.world,
            skip_bad=self.options.bad_images.skip_bad_images,
            occluder=occluder,
        )

    def _start(self) -> None:
        """From the beginning. Raises UserError for weights that do not fit, or a folder that cannot be written."""
        table = self.processes.run_on_all(lambda: load_initial_weights(self.model, self.config, self.init))
        if self.init:
            print(table)
            self.init.weights.clear()  # a second network in memory, for as long as the run takes
        if any(phase.anew for phase in self.phases) and self.processes.main:
            write_torch_file(self.out / INITIAL, self.model.state_dict())
        with explain_errors(self.out, self.processes.world):
            self._make_state(self.phases[0])
        self.processes.run_on_all(self._write_config)
        self.processes.run_on_all(self._measure_crops)
        self._save(self.saver.save_first)  # proves that there is room; from here on the run can be resumed

    def _resume(self) -> None:
        """From last.pth. Raises UserError if it is of another configuration or cannot be resumed from."""
        extend = self.options.extend
        saved = self.processes.run_on_all(lambda: load_last(self.out, self.config, extend=extend))
        self.epochs_done, self.progress = saved["epoch"], saved["progress"] or {}
        with explain_errors(self.out, self.processes.world):
            self._make_state(phase_of(self.phases, epoch_of(saved)))
            self.processes.run_on_all(lambda: restore_training(saved, self.state, self.out / "last.pth"))
        self.processes.run_on_all(self._write_config)
        self.best = best_so_far(saved, self.out, self.config)
        self.origin = {key: saved["versions"][key] for key in ("init",) if key in saved["versions"]}
        self.crop_statistics = statistics_of(saved)
        self.processes.run_on_all(self._measure_crops)
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
        epochs, first = self.config.recipe.epochs, self.epochs_done
        skip_bad = self.options.bad_images.skip_bad_images
        self.evaluations = Evaluations(self.config, self.split, self.processes, skip_bad=skip_bad)
        with open_run_logger(self.out, first) if self.processes.main else nullcontext() as log:
            begin = time.perf_counter()
            for epoch, batches in self._epochs(pending_signal):
                label = f"epoch {epoch}/{epochs}"
                record = self._end_epoch(epoch, self._train_epoch(epoch, batches, label, pending_signal), log)
                if log:
                    left = (time.perf_counter() - begin) / (epoch - first) * (epochs - epoch)
                    print(epoch_line(label, record, len(self.sampler), left), flush=True)
                    self.announcer.warn(record, self.progress.get("skipped", {}), epoch - first)
                    log_mix_picture(log, self.model, self.split.train, self.config, epoch, self.batches.skipped)
            self._save(self._save_all)

    def _epochs(self, pending_signal: Callable[[], int]) -> Iterator[tuple[int, Iterator[TrainBatch | UserError]]]:
        """The epochs that are left, from 1, with the batches from which to take theirs."""
        before = self.epochs_done
        for phase in self.phases:
            steps = self.progress.get("steps", 0)
            left = range(max(phase.epochs.start, self.epochs_done + 1), phase.epochs.stop)
            if not left:
                continue
            begins = left == phase.epochs and not steps and phase.begin > 0
            if phase.occludes:
                self._occlude(pending_signal, trained=phase.begin > before)
            if begins:
                self._begin(phase)
            self.sampler.epochs = range(phase.stream(left.start), phase.stream(left.stop))
            self.sampler.first = steps
            batches = iter(self.batches)
            for epoch in left:
                yield epoch, batches

    def _occlude(self, pending_signal: Callable[[], int], *, trained: bool) -> None:
        """Let the loader hide what hurts the model of the phase before, which this process has `trained` to its end.

        Otherwise that model is on the disk: last.pth may be of the next phase, before its first step.
        """
        if trained:
            self.processes.run_on_all(lambda: keep_model(self.out, self._content()) if self.processes.main else None)
            self._save(self.saver.save_now)  # its table may take longer than an epoch
        skip_bad, skipped = self.options.bad_images.skip_bad_images, self.batches.skipped
        place = self.out, self.split.train, self.config, self.device, self.processes
        occluder = make_occluder(*place, skip_bad=skip_bad, pending_signal=pending_signal)
        self.batches.close()
        self.processes.run_on_all(lambda: self._load_batches(occluder))
        self.batches.skipped |= skipped

    def _begin(self, phase: Phase) -> None:
        """A phase but the first."""
        if phase.anew:
            path = self.out / INITIAL
            weights = self.processes.run_on_all(lambda: read_torch_file(path, "the weights that the run began with"))
            self.model.load_state_dict(weights)
        with explain_errors(self.out, self.processes.world):
            self.state = next_phase(self.state, phase)

    def _end_epoch(self, epoch: int, share: dict[str, Any], log: RunLogger | None) -> dict[str, Any]:
        """The record of `epoch`, of which `share` is of this process; writes it, and a model that is the best so far.

        The record comes before the model, and that before last.pth: a run that is killed between them repeats all that
        last.pth does not know of.
        """
        records = self.processes.gather(share)
        found = self.evaluations.after(epoch, self.state.deployed, self.device)
        skipped = self._skipped()
        self.epochs_done, self.progress = epoch, {"skipped": skipped} if skipped else {}
        record = {"epoch": epoch, **(mean_of_records(records) if records else {}), **found}
        if skipped:
            record["skipped_images"] = len(skipped)
        is_best = self._in_last_phase and found.get("val_mAP", self.best) > self.best
        self.best = found["val_mAP"] if is_best else self.best

        def write() -> None:
            if log:
                log.write(record)
                if is_best:
                    self.saver.save_best(self._content())

        self.processes.run_on_all(write)
        return record

    def _write_config(self) -> None:
        """Into a folder without the unfinished files of a run that was killed."""
        if self.processes.main:
            sweep(self.out, ("last.pth", "best.pth", "config.json", METRICS))
            write_file(self.out / "config.json", json.dumps(self.config.to_dict(), indent=2) + "\n")

    def _measure_crops(self) -> None:
        if self.processes.main and not self.crop_statistics:
            paths = [sample.path for sample in self.split.train]
            self.crop_statistics = crop_statistics(paths, preprocessing_of(self.config))

    @property
    def _in_last_phase(self) -> bool:
        """Whose model alone is deployed."""
        return self.state.phase == self.phases[-1]

    def _make_state(self, phase: Phase) -> None:
        self.state = make_train_state(self.model, self.config, self.device, len(self.sampler), self.processes, phase)
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
            stream = self.state.phase.stream(epoch)
            losses = train_step(self.state, batch, epoch=stream, step=meter.steps, on_losses=on_losses)
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
            self.processes.run_on_all(lambda: self._fail(failure, meter, label))
        if action == SAVE:
            self._save_progress(meter, self.saver.save_last)
        if action in (STOP, REFUSE):
            self._save_progress(meter, self._save_all)
        if action == REFUSE:
            self.processes.run_on_all(lambda: self._raise_unreadable(batch))
        if action == STOP:
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

    def _fail(self, failure: Any, meter: Meter, label: str) -> None:
        """Raise UserError for a file that could not be written, or the step whose loss is not finite."""
        self.saver.check()
        if failure:
            losses, indices, step = failure
            files = [str(self.split.train[index].path) for index in indices.tolist()]
            name = "bad-batch.json" if self.processes.main else f"bad-batch-{self.processes.rank}.json"
            report = self.out / name
            write_bad_batch(report, self.epochs_done + 1, step, meter.lr, losses, files)
            raise not_finite(label, step, losses, meter.lr, report, self.config.recipe.divergence_hint)

    def _raise_unreadable(self, batch: Any) -> None:
        """Raise the UserError in place of a batch, if it is one."""
        if isinstance(batch, UserError):
            files = [sample.path for sample in self.split.train]
            raise with_way_on(batch, files, skips_bad=self.options.bad_images.skip_bad_images)

    def _save_all(self, content: dict[str, Any]) -> None:
        """Without held-out identities, the newest model is the best."""
        self.saver.save_now(content, best=self._in_last_phase and not self.evaluations.chooses)

    def _save(self, save: Callable[[dict[str, Any]], None]) -> None:
        """`save` the run as it is, in the first process; all raise its error."""
        self.processes.run_on_all(lambda: save(self._content()) if self.processes.main else None)

    def _content(self) -> dict[str, Any]:
        progress = {"world": self.processes.world, **self.progress}
        content = snapshot(self.state, self.epochs_done, self.best, progress, self.crop_statistics)
        return {**content, "versions": {**content["versions"], **self.origin}}
