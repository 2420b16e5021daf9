"""What a training run prints at its start, and its warnings."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pmm.config import SYNTHETIC, TIMM, Config
from pmm.data.samples import ReidDataset
from pmm.models.phases import phase_of
from pmm.models.registry import method_of, phases_of
from pmm.models.rpp import LEAST_PART
from pmm.models.timm_network import other_statistics
from pmm.recipe import RecipeConfig
from pmm.training.data_setup import has_imagenet_weights
from pmm.training.precision import describe_precision, reason_for
from pmm.training.progress import data_loading_hint, warn
from pmm.training.state import TrainState, learning_rate
from pmm.training.step import collapsed
from pmm.utils import command_line
from pmm.utils.build_info import describe_build
from pmm.utils.errors import printable
from pmm.utils.facts import how_many
from pmm.utils.hardware import usable_cores

DETERMINISTIC = "deterministic, a run repeats to the bit"
DEAD_PART = 0.02
FASTEST = "the fastest, a run repeats to the bit with --deterministic only"


class Announcer:
    """Prints for the run in `out`: lines on stdout, notes and warnings on stderr."""

    def __init__(self, config: Config, split: ReidDataset, out: Path, asked_amp: str) -> None:
        """`asked_amp`: the recipe's `amp` before it was resolved, which may be "auto"."""
        self._asked_amp = asked_amp
        self._config, self._split, self._out = config, split, out
        self._method = method_of(config)
        self._advised = False
        self.reported: set[int] = set()
        """Indices of the skipped images that warnings have counted."""

    def start(self, model: nn.Module, device: torch.device, world: int, epoch: int, step: int) -> None:
        """Model, device, data, configuration, and where the run starts: after `epoch` and `step`."""
        config, split = self._config, self._split
        parameters = sum(parameter.numel() for parameter in model.parameters()) / 1e6
        processes = f" x {world} processes" if world > 1 else ""
        print(f"{config.model.method} on {config.model.backbone} ({parameters:.2f} M parameters), {device}{processes}")
        print(f"precision: {describe_precision(config, device)}{self._precision_reason(device, world)}")
        if device.type == "cuda":
            print(f"algorithms: {DETERMINISTIC if config.recipe.deterministic else FASTEST}")
        if self._method.uses_kernels:
            print(f"kernels of the mix: {describe_kernels(device)}")
        held_out = len({sample.pid for sample in split.query})
        train = f"{len(split.train)} crops of {config.model.num_classes} identities"
        print(f"data: {printable(config.data.root)}: {train}, {held_out} more held out to choose best.pth")
        notes = (*split.notes, *split.left_out, self._method.note, *self._notes(resumed=bool(epoch or step)))
        for note in filter(None, notes):
            _note(note)
        print("\n".join(f"config: {printable(line)}" for line in config.lines()))
        if (factor := config.recipe.backbone_lr) != 1:
            lr = config.recipe.lr
            print(f"learning rate: at most {lr:.2g}, of the backbone {factor * lr:.2g}; epochs show the former")
        if len(phases := phases_of(config)) > 1:
            print(f"phases: {', '.join(f'{phase.name} in {_span(phase.epochs)}' for phase in phases)}")
        resumed = f"resumed at epoch {epoch + 1}{f', step {step + 1}' if step else ''}"
        start = resumed if epoch or step else f"from {printable(config.model.init) or 'scratch'}"
        print(f"run: {self._out} ({start}, {how_many(config.recipe.epochs, 'epoch')})", flush=True)

    def resume(self, before: RecipeConfig, state: TrainState) -> None:
        """What changes now that the run, so far trained by the recipe `before`, goes on as `state`."""
        recipe, steps = state.config.recipe, state.scheduler.last_epoch
        if before.amp != recipe.amp:
            names = ("fp32" if amp == "off" else amp for amp in (before.amp, recipe.amp))
            _note("steps were in {} so far and are in {} from here on (--amp)".format(*names))
        if before.epochs != recipe.epochs:
            last = learning_rate(before, max(steps - 1, 0), state.steps_per_epoch)
            _note(
                f"extended from {before.epochs} to {recipe.epochs} epochs; the learning rate is now that "
                f"of a run of {recipe.epochs}: {state.lr:.2g}, after {last:.2g} in the last step"
            )
            if before.freeze_backbone == before.epochs:
                thaws = recipe.freeze_backbone < recipe.epochs
                goes_on = f"is trained from epoch {recipe.freeze_backbone + 1} on" if thaws else "stays so"
                _note(f"the backbone was frozen in all epochs and {goes_on} (--freeze-backbone)")

    def _precision_reason(self, device: torch.device, world: int) -> str:
        if self._asked_amp != "auto":
            return ""
        return f" (--amp auto: {reason_for(self._config.recipe.amp, device, world)})"

    def _notes(self, resumed: bool) -> list[str]:
        data, model, frozen = self._config.data, self._config.model, self._config.recipe.freeze_backbone
        if not resumed and model.weights == "imagenet" and model.backbone.startswith(TIMM):
            return list(filter(None, [other_statistics(model.backbone.removeprefix(TIMM), data.mean, data.std)]))
        if resumed or model.init or model.weights != "none":
            return []
        has_imagenet = has_imagenet_weights(model.backbone)
        advice = "--weights imagenet starts from ImageNet's" if has_imagenet else "--init FILE starts from a file's"
        if frozen:
            return [f"the backbone starts from random weights, which --freeze-backbone {frozen} keeps; {advice}"]
        if model.backbone == "resnet10" or (has_imagenet and data.dataset != SYNTHETIC):  # no other, or chosen
            return []
        reason = "the default for synthetic data" if has_imagenet else f"{model.backbone} has no ImageNet weights here"
        return [f"the backbone starts from random weights ({reason}); {advice}"]

    def warn(self, record: Mapping[str, Any], skipped: Mapping[int, str], since_start: int) -> None:
        """Warn of slow loading, of newly `skipped` images (index to reason), and of features that have collapsed.

        `record` is that of the `since_start`-th epoch since this process started.
        """
        recipe = self._config.recipe
        advice = data_loading_hint(record, self._config.data.workers, usable_cores())
        if advice and since_start > 1 and not self._advised:  # during the first epoch the workers start
            warn(advice)
            self._advised = True
        if new := [reason for index, reason in skipped.items() if index not in self.reported]:
            warn(f"{len(skipped)} images skipped so far; {'; '.join(new[:3])}")
            self.reported |= set(skipped)
        if record.get(LEAST_PART, 1.0) < DEAD_PART:
            warn(f"one part has {record[LEAST_PART]:.1%} of the cells: its classifier sees next to nothing")
        phase = phase_of(phases_of(self._config), record["epoch"])
        rises, done = (recipe, 0) if phase.goes_on else (phase.recipe, phase.begin)
        warmed_up = record["epoch"] - done > rises.epochs * rises.warmup
        if warmed_up and collapsed(record, self._config.model.num_classes):
            losses = "triplet loss ln 2, cross-entropy ln K" if self._method.triplet else "cross-entropy ln K"
            problem = f"the features have collapsed to one point ({losses})"
            warn(f"{problem}; {recipe.divergence_hint}, then start again")


def _span(epochs: range) -> str:
    return f"epochs {epochs[0]} to {epochs[-1]}" if len(epochs) > 1 else f"epoch {epochs[0]}"


def describe_kernels(device: torch.device) -> str:
    """Which kernels the mix uses on `device`; where it uses plain torch, why."""
    from pmm.ops._extension import missing

    reason = missing(device)
    return describe_build() if reason is None else f"plain torch on {device.type}: {reason}"


def _note(text: str) -> None:
    command_line.note("pmm train", text)
