"""A training run from its start, or from where it was stopped, to its end; nothing of it is lost."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from pmm import checkpoint
from pmm.config import Config
from pmm.data.batches import TrainBatch
from pmm.data.crops import load_crops, preprocessing_of
from pmm.data.loader import train_batches
from pmm.data.samples import Split, class_indices
from pmm.engine import Validation, be_deterministic, collapsed, train_step
from pmm.errors import Stopped, UserError
from pmm.files import cannot_write, sweep, write_file
from pmm.kernels import describe_build
from pmm.machine import usable_cores
from pmm.models.backbone import load_weights
from pmm.models.registry import build_model, method_of
from pmm.processes import Processes
from pmm.progress import PROG, LossWatch, Meter, advice_on_data, epoch_line, mean_of_records, not_finite, warn
from pmm.runs import refuse_changes
from pmm.trainee import check_device, make_trainee
from pmm.visualize.mixing import has_hard_mix, mix_picture

GO, SAVE, STOP, FAIL = range(4)
"""What is to be done before the next step; of several wishes the largest."""
BAD_BATCH = "bad-batch.json"
PICTURES, SHOWN = 10, 16
"""Pictures of the mix in a run, and the identities in each."""


class Trainer:
    """The run in `out`; all its processes do the same, the first alone writes."""

    def __init__(
        self,
        config: Config,
        split: Split,
        out: Path,
        device: torch.device,
        processes: Processes,
        *,
        save_minutes: float,
        skip_bad_images: bool,
    ) -> None:
        """Raises UserError for a batch that the data or the processes do not make, or weights that do not fit."""
        self.config, self.split, self.out, self.device, self.processes = config, split, out, device, processes
        self.save_seconds = 60 * save_minutes
        check_device(config, device)
        be_deterministic(device)
        torch.manual_seed(config.seed)
        self.batches, self.sampler = train_batches(
            split.train, config, rank=processes.rank, world=processes.world, skip_bad=skip_bad_images
        )
        self.model = build_model(config)
        self.finished, self.best = 0, -1.0
        self.done: Mapping[str, Any] = {}
        self.warned, self.named = False, set[int]()
        self.saved_at = time.monotonic()

    def start(self) -> None:
        """From the beginning. Raises UserError for weights that do not fit, or a folder that cannot be written."""
        self.processes.together(lambda: load_weights(self.model.backbone, self.config.model))  # type: ignore[arg-type]
        self._ready()
        self.processes.together(self._begin)
        self.processes.together(self._save)  # shows that there is room, and from here on a run can be resumed

    def resume(self) -> None:
        """From last.pth. Raises UserError if it is of another configuration or nothing to resume from."""
        state = self.processes.together(self._last)
        self._ready()
        self.processes.together(lambda: checkpoint.restore_training(state, self.trainee))
        self.processes.together(self._begin)
        self.finished, self.best, self.done = state["epoch"], state["best"], state["progress"] or {}
        before = self.done.get("world", self.processes.world)
        if before != self.processes.world and self.processes.main:
            warn(
                f"so far {before} processes shared each batch, from now on {self.processes.world} do: batch "
                "statistics, partners and triplets are found in other parts of it"
            )

    def run(self, signalled: Callable[[], int]) -> Path:
        """Train to the end; returns out/best.pth.

        `signalled` says which signal asks for an end, 0 for none: then the run is saved, and Stopped raised. Raises
        UserError for a bad image, a loss that is not finite, or a disk that is full; last.pth is then intact.
        """
        recipe, validation = self.config.recipe, None
        if self.split.query:
            validation = self.processes.together(
                lambda: Validation(self.split, preprocessing_of(self.config), self.processes)
            )
        with self._log() as write:
            begin, first = time.perf_counter(), self.finished
            for epoch in range(self.finished + 1, recipe.epochs + 1):
                label = f"epoch {epoch}/{recipe.epochs}"
                records = self.processes.gathered(self._epoch(epoch, label, signalled))
                result, is_best = None, validation is None
                if validation and (epoch % recipe.val_every == 0 or epoch == recipe.epochs):
                    result = validation.evaluate(self.model, self.device)
                self.finished, self.done = epoch, {}
                skipped = self.processes.gathered(self.batches.skipped)
                if not self.processes.main:
                    continue
                record = {"epoch": epoch, **mean_of_records(records)}
                if result:
                    record |= {"val_mAP": result.mAP, "val_rank1": result.rank1}
                    is_best = result.mAP > self.best
                    self.best = max(self.best, result.mAP)
                if bad := {index: why for found in skipped for index, why in found.items()}:
                    record["skipped_images"] = len(bad)
                self._save(is_best, partial(write, record))
                left = (time.perf_counter() - begin) / (epoch - first) * (recipe.epochs - epoch)
                print(epoch_line(label, record, len(self.sampler), left), flush=True)
                self._warn(record, bad, epoch - first)
        print(f"{self.out}: finished {recipe.epochs} epochs; best.pth and last.pth are ready")
        return self.out / "best.pth"

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
        self.trainee = make_trainee(self.model, self.config, self.device, len(self.sampler), self.processes)
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
                self.trainee, batch, self.config, self.device, self.processes, epoch=epoch, step=meter.steps
            )
            meter.step(losses, len(batch.labels), lr)
            watch.note(losses, batch.indices, meter.steps)
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
        if word == GO and batch is not None and time.monotonic() > self.saved_at + self.save_seconds:
            word = SAVE
        word = self.processes.agree(word)
        if word == FAIL:
            self.processes.together(lambda: self._refuse(batch, lost, meter, label))
        if word in (SAVE, STOP):
            self.done = meter.state()
            self._save()
        if word == STOP:
            where = f"{label}, after step {meter.steps} of {len(self.sampler)}"
            raise Stopped(self.processes.agree(number), where)

    def _refuse(self, batch: Any, lost: Any, meter: Meter, label: str) -> None:
        """Raise UserError for a batch that could not be loaded, or the step whose loss is not finite."""
        if lost:
            losses, indices, step = lost
            files = [str(self.split.train[index].path) for index in indices.tolist()]
            report = {"epoch": self.finished + 1, "step": step, "lr": meter.lr, "losses": losses, "files": files}
            path = self.out / (BAD_BATCH if self.processes.main else f"bad-batch-{self.processes.rank}.json")
            write_file(path, json.dumps(report, indent=1) + "\n")
            raise not_finite(label, step, losses, meter.lr, str(path))
        if isinstance(batch, UserError):
            raise batch

    def _save(self, is_best: bool = False, log: Callable[[], None] = lambda: None) -> None:
        """best.pth, what `log` writes, and last.pth at last: a run killed before it does again what is lost."""
        self.saved_at = time.monotonic()
        if not self.processes.main:
            return
        progress = {"world": self.processes.world, **self.done}
        state = checkpoint.snapshot(self.trainee, self.config, self.finished, self.best, progress)
        if is_best:
            checkpoint.save(self.out / "best.pth", checkpoint.for_deployment(state))
        log()
        checkpoint.save(self.out / "last.pth", state)

    @contextlib.contextmanager
    def _log(self) -> Iterator[Callable[[dict[str, Any]], None]]:
        """A function that writes an epoch's record to metrics.jsonl and TensorBoard; in the first process."""
        if not self.processes.main:
            yield lambda record: None
            return
        from torch.utils.tensorboard import SummaryWriter

        epochs = self.config.recipe.epochs
        shown = {round(1 + part * (epochs - 1) / PICTURES) for part in range(PICTURES + 1)}
        shown = shown if has_hard_mix(self.model) else set()
        log = _truncated(self.out / "metrics.jsonl", self.finished)
        with SummaryWriter(str(self.out / "tensorboard"), purge_step=self.finished + 1) as board, log:

            def write(record: dict[str, Any]) -> None:
                log.write(json.dumps(record) + "\n")
                log.flush()
                for name, value in record.items():
                    board.add_scalar(name, value, record["epoch"])
                if record["epoch"] in shown:
                    board.add_image("mix", self._mix(record["epoch"]), record["epoch"], dataformats="HWC")

            yield write

    def _mix(self, seed: int) -> npt.NDArray[np.uint8]:
        """What the mix does to a few training crops [H, W, 3]."""
        size, index = preprocessing_of(self.config), class_indices(self.split.train)
        some = sorted({sample.pid: sample for sample in self.split.train}.values(), key=lambda s: s.pid)[:SHOWN]
        crops = load_crops([sample.path for sample in some], size.height, size.width)
        labels = [index[sample.pid] for sample in some]
        return np.asarray(mix_picture(self.model, crops, labels, size, rows=4, seed=seed, height=128))

    def _warn(self, record: Mapping[str, Any], bad: Mapping[int, str], since_start: int) -> None:
        """Say once what slows the run down, and whenever more images were skipped or the features are one point."""
        recipe = self.config.recipe
        advice = advice_on_data(record, self.config.data.workers, usable_cores())
        if advice and since_start > 1 and not self.warned:  # in the first the workers start
            warn(advice)
            self.warned = True
        if new := [why for index, why in bad.items() if index not in self.named]:
            warn(f"{len(bad)} images skipped so far; {'; '.join(new[:3])}")
            self.named |= set(bad)
        if record["epoch"] > recipe.epochs * recipe.warmup and collapsed(record, self.config.model.num_classes):
            warn(
                "the features have collapsed to one point (triplet ln 2, cross-entropy ln K): start again with a "
                "longer --warmup or a lower --lr"
            )

    def say_start(self) -> None:
        """What is trained, on what, with which values, and from where on."""
        config, model = self.config, self.config.model
        parameters = sum(parameter.numel() for parameter in self.model.parameters()) / 1e6
        world = f" x {self.processes.world} processes" if self.processes.world > 1 else ""
        print(f"{PROG}: {model.method} on {model.backbone} ({parameters:.2f} M parameters), {self.device}{world}")
        if method_of(config).mixes_cells:
            print(f"kernels of the mix: {describe_kernels(self.device)}")
        held_out = len({sample.pid for sample in self.split.query})
        trained = f"{len(self.split.train)} crops of {model.num_classes} identities"
        print(f"data: {config.data.root}: {trained}, {held_out} more held out to choose best.pth")
        for note in self.split.notes:
            print(f"note: {note}")
        print("\n".join(f"config: {line}" for line in config.lines()))
        step = f", step {self.done['steps'] + 1}" if self.done.get("steps") else ""
        begun = self.finished or step
        start = f"goes on from epoch {self.finished + 1}{step}" if begun else "from scratch"
        print(f"run: {self.out} ({start}, {config.recipe.epochs} epochs)", flush=True)


def describe_kernels(device: torch.device) -> str:
    """What the mix runs on `device` and, where that is plain torch, why."""
    from pmm.ops._extension import missing

    reason = missing(device.type)
    return describe_build() if reason is None else f"plain torch on {device.type}: {reason}"


def _truncated(path: Path, epochs: int) -> Any:
    """metrics.jsonl, opened for appending, without what was written after the checkpoint being resumed."""
    lines = path.read_text().splitlines(keepends=True)[:epochs] if path.exists() and epochs else []
    write_file(path, "".join(lines))
    try:
        return path.open("a")
    except OSError as error:
        raise cannot_write(path, error) from error
