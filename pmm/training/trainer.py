"""A training run from its start, or from where it was interrupted, to its end."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import closing, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch

from pmm.artifacts.checkpoint import epoch_of
from pmm.artifacts.init_file import InitFile
from pmm.artifacts.initial_weights import load_initial_weights
from pmm.artifacts.run_folder import BEST, CONFIG_FILE, LAST, METRICS_FILE
from pmm.artifacts.torch_file import read_torch_file, write_torch_file
from pmm.config import Config
from pmm.data.batches import TrainBatch
from pmm.data.loader import train_batches
from pmm.data.measure_crops import crop_statistics
from pmm.data.occlusion import Occluder
from pmm.data.preprocessing import preprocessing_of
from pmm.data.samples import ReidDataset
from pmm.models.phases import Phase, phase_of
from pmm.models.registry import build_model, phases_of
from pmm.training.announce import Announcer
from pmm.training.distributed import Processes
from pmm.training.failures import LossWatch, explain_errors
from pmm.training.flags import TrainOptions
from pmm.training.occlusion_table import keep_model, make_occluder
from pmm.training.own_cores import OwnCores
from pmm.training.pictures import log_mix_picture
from pmm.training.progress import Meter, epoch_line, mean_of_records, mean_of_states, warn
from pmm.training.resuming import load_last
from pmm.training.run_logger import RunLogger, open_run_logger
from pmm.training.run_progress import RunProgress
from pmm.training.saver import Saver
from pmm.training.snapshot import restore_training
from pmm.training.state import TrainState, check_device, check_network_on, in_train_mode, make_train_state, next_phase
from pmm.training.step import train_step
from pmm.training.step_guard import Epoch, StepGuard
from pmm.training.validation import Evaluations
from pmm.utils.errors import UserError
from pmm.utils.facts import how_many
from pmm.utils.files import sweep, write_file

INITIAL = "initial.pth"
"""The weights that a run began with, where a later phase begins with them again."""


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
        own_cores: OwnCores,
        *,
        asked_amp: str,
        init: InitFile | None = None,
    ) -> None:
        """`asked_amp`: the recipe's `amp` before it was resolved.

        Raises UserError for a batch size that does not suit the data or the processes, blocks that do not fit, or a
        network that `device` cannot train.
        """
        self.config, self.split, self.out, self.device, self.processes = config, split, out, device, processes
        self.options, self.own_cores, self.init = options, own_cores, init
        check_device(config, device)
        torch.manual_seed(config.seed)
        self._load_batches()
        self.phases = phases_of(config)
        self.state: TrainState
        self.model = build_model(config)
        check_network_on(device, self.model)
        self.progress = RunProgress(origin={"init": init.sha256} if init else {})
        self.announcer = Announcer(config, split, out, asked_amp)
        self.saver = Saver(out, options.save_minutes, device)
        self.evaluations: Evaluations
        """Made when the epochs begin."""
        self.guard = StepGuard(
            out,
            [sample.path for sample in split.train],
            processes,
            self.saver,
            skips_bad=options.bad_images.skip_bad_images,
            divergence_hint=config.recipe.divergence_hint,
        )

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
        epochs, best = self.config.recipe.epochs, self.out / BEST
        if self.progress.epochs_done >= epochs:
            more = f"to train on, add --extend and --epochs N above {epochs}, or start another run"
            print(f"{self.out}: the run is finished ({how_many(epochs, 'epoch')}), nothing to do; {more}")
            return best
        done, step = self.progress.epochs_done, self.progress.steps
        self.announcer.start(self.model, self.device, self.processes.world, done, step)
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
        with explain_errors(self.out, self.processes.world):
            self._make_state(phase_of(self.phases, epoch_of(saved)))
            self.processes.run_on_all(lambda: restore_training(saved, self.state, self.out / LAST))
        self.processes.run_on_all(self._write_config)
        self.progress = RunProgress.of(saved, self.out, self.config)
        self.processes.run_on_all(self._measure_crops)
        self.announcer.resume(Config.from_dict(saved["config"]).recipe, self.state)
        self.batches.skipped |= self.progress.skipped
        self.announcer.reported |= set(self.batches.skipped)
        before = self.progress.in_epoch.get("world", self.processes.world)
        if before != self.processes.world and self.processes.main:
            warn(
                f"{before} processes shared each batch so far, now {self.processes.world} do: batch statistics, "
                "partners and triplets come from shares of another size"
            )

    def _train_epochs(self, pending_signal: Callable[[], int]) -> None:
        epochs, first = self.config.recipe.epochs, self.progress.epochs_done
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
                    self.announcer.warn(record, self.progress.skipped, epoch - first)
                    log_mix_picture(log, self.model, self.split.train, self.config, epoch, self.batches.skipped)
            self._save(self._save_all)

    def _epochs(self, pending_signal: Callable[[], int]) -> Iterator[tuple[int, Iterator[TrainBatch | UserError]]]:
        """The epochs that are left, from 1, with the batches from which to take theirs."""
        before = self.progress.epochs_done
        for phase in self.phases:
            steps = self.progress.steps
            left = range(max(phase.epochs.start, self.progress.epochs_done + 1), phase.epochs.stop)
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
            self._save(partial(keep_model, self.out))
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
        progress = self.progress
        progress.epochs_done, progress.in_epoch = epoch, {"skipped": skipped} if skipped else {}
        record = {"epoch": epoch, **(mean_of_records(records) if records else {}), **found}
        if skipped:
            record["skipped_images"] = len(skipped)
        is_best = self._in_last_phase and found.get("val_mAP", progress.best) > progress.best
        progress.best = found["val_mAP"] if is_best else progress.best

        def write() -> None:
            if log:
                log.write(record)
                if is_best:
                    self.saver.save_best(self.progress.checkpoint(self.state))

        self.processes.run_on_all(write)
        return record

    def _write_config(self) -> None:
        """Into a folder without the unfinished files of a run that was killed."""
        if self.processes.main:
            sweep(self.out, (LAST, BEST, CONFIG_FILE, METRICS_FILE))
            write_file(self.out / CONFIG_FILE, json.dumps(self.config.to_dict(), indent=2) + "\n")

    def _measure_crops(self) -> None:
        if self.processes.main and not self.progress.crop_statistics:
            paths = [sample.path for sample in self.split.train]
            self.progress.crop_statistics = crop_statistics(paths, preprocessing_of(self.config))

    @property
    def _in_last_phase(self) -> bool:
        """Whose model alone is deployed."""
        return self.state.phase == self.phases[-1]

    def _make_state(self, phase: Phase) -> None:
        self.state = make_train_state(self.model, self.config, self.device, len(self.sampler), self.processes, phase)
        self.model = self.state.model

    def _train_epoch(
        self, number: int, batches: Iterator[TrainBatch | UserError], label: str, pending_signal: Callable[[], int]
    ) -> dict[str, Any]:
        """This process's record of an epoch, or of the rest of an interrupted one, whose `batches` are the next."""
        meter, watch = Meter(self.device, self.progress.in_epoch), LossWatch(self.device)
        epoch = Epoch(number=number, label=label, steps=len(self.sampler), meter=meter, watch=watch)
        self.state = in_train_mode(self.state, number)
        for batch in meter.batches(batches, label, epoch.steps):
            self.guard.before_step(batch, epoch, self._save_progress, pending_signal)
            assert not isinstance(batch, UserError)
            lr = self.state.lr
            on_losses = partial(watch.watch, batch=batch.indices, step=meter.steps + 1)
            stream = self.state.phase.stream(number)
            with self.own_cores:
                losses = train_step(self.state, batch, epoch=stream, step=meter.steps, on_losses=on_losses)
            meter.step(losses, len(batch.labels), lr)
        self.guard.before_step(None, epoch, self._save_progress)
        return meter.record()

    def _save_progress(self, meter: Meter, *, ends: bool) -> None:
        """Save the run in the middle of an epoch, and the best model too where it `ends`."""
        states = self.processes.gather(meter.state())
        skipped = self._skipped()
        in_epoch = mean_of_states(states) if states else {}
        self.progress.in_epoch = {**in_epoch, "skipped": skipped} if skipped else in_epoch
        self._save(self._save_all if ends else self.saver.save_last)

    def _skipped(self) -> dict[int, str]:
        """The training images that any process could not read so far, index to reason; in the first process."""
        shares = self.processes.gather(self.batches.skipped)
        return {index: reason for share in shares for index, reason in share.items()}

    def _save_all(self, content: dict[str, Any]) -> None:
        """Without held-out identities, the newest model is the best."""
        self.saver.save_now(content, best=self._in_last_phase and not self.evaluations.chooses)

    def _save(self, save: Callable[[dict[str, Any]], None]) -> None:
        """`save` the run as it is, in the first process; all raise its error."""
        self.processes.run_on_all(lambda: save(self.progress.checkpoint(self.state)) if self.processes.main else None)
