"""What a training run says at its start, and what it warns of later."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pmm.config import SYNTHETIC, Config
from pmm.data.samples import ReidDataset
from pmm.models.registry import method_of
from pmm.training.progress import advice_on_data, warn
from pmm.training.step import collapsed
from pmm.utils.build_info import describe_build
from pmm.utils.hardware import usable_cores


class Announcer:
    """Speaks for the run in `out`: plain lines on stdout, warnings on stderr."""

    def __init__(self, config: Config, split: ReidDataset, out: Path) -> None:
        self._config, self._split, self._out = config, split, out
        self._warned = False
        self.named: set[int] = set()
        """Skipped images that were told of."""

    def start(self, model: nn.Module, device: torch.device, world: int, epoch: int, step: int) -> None:
        """What is trained, on what, with which values, and from where on: `epoch` and `step` are done."""
        config, split = self._config, self._split
        parameters = sum(parameter.numel() for parameter in model.parameters()) / 1e6
        processes = f" x {world} processes" if world > 1 else ""
        print(f"{config.model.method} on {config.model.backbone} ({parameters:.2f} M parameters), {device}{processes}")
        if method_of(config).mixes_cells:
            print(f"kernels of the mix: {describe_kernels(device)}")
        held_out = len({sample.pid for sample in split.query})
        trained = f"{len(split.train)} crops of {config.model.num_classes} identities"
        print(f"data: {config.data.root}: {trained}, {held_out} more held out to choose best.pth")
        for note in (*split.notes, *self._notes(begun=bool(epoch or step))):
            print(f"note: {note}")
        print("\n".join(f"config: {line}" for line in config.lines()))
        from_where = f"goes on from epoch {epoch + 1}{f', step {step + 1}' if step else ''}"
        start = from_where if epoch or step else "from scratch"
        print(f"run: {self._out} ({start}, {config.recipe.epochs} epochs)", flush=True)

    def _notes(self, begun: bool) -> list[str]:
        data, model = self._config.data, self._config.model
        if begun or (data.dataset, model.backbone, model.weights) != (SYNTHETIC, "resnet50", "none"):
            return []
        return ["synthetic people: the trunk starts from random weights (--weights imagenet starts from ImageNet's)"]

    def warn(self, record: Mapping[str, Any], skipped: Mapping[int, str], since_start: int) -> None:
        """Of what slows the run down, of more `skipped` images (why, by index), and of features that are one point.

        `record` is of an epoch, the `since_start`-th since the run was started.
        """
        recipe = self._config.recipe
        advice = advice_on_data(record, self._config.data.workers, usable_cores())
        if advice and since_start > 1 and not self._warned:  # in the first the workers start
            warn(advice)
            self._warned = True
        if new := [why for index, why in skipped.items() if index not in self.named]:
            warn(f"{len(skipped)} images skipped so far; {'; '.join(new[:3])}")
            self.named |= set(skipped)
        if record["epoch"] > recipe.epochs * recipe.warmup and collapsed(record, self._config.model.num_classes):
            what = "the features have collapsed to one point (triplet ln 2, cross-entropy ln K)"
            warn(f"{what}: {recipe.gentler}, then start again")


def describe_kernels(device: torch.device) -> str:
    """What the mix runs on `device` and, where that is plain torch, why."""
    from pmm.ops._extension import missing

    reason = missing(device.type)
    return describe_build() if reason is None else f"plain torch on {device.type}: {reason}"
