"""What phase 2 of AOS does: it asks the model of the first training which windows over each training image hurt it.

Images are asked in shards of a fixed size, which are written one by one: a run that is killed goes on with those that
are missing, and neither their number of processes nor where it was killed changes a bit of the table.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from tqdm import tqdm

from pmm.artifacts import checkpoint
from pmm.artifacts.checkpoint import for_deployment, restore_model
from pmm.config import Config
from pmm.data.batches import TrainBatch, normalize_batch
from pmm.data.crops import iter_crops
from pmm.data.occlusion import (
    FORMAT,
    TABLE,
    Occluder,
    OcclusionTable,
    TableFacts,
    Windows,
    check_table,
    image_names,
    read_table,
    write_table,
)
from pmm.data.preprocessing import Crops, Preprocessing, preprocessing_of
from pmm.data.samples import Sample, class_indices
from pmm.models.registry import deployed
from pmm.training.distributed import Processes
from pmm.training.failures import with_way_on
from pmm.training.precision import HALF
from pmm.training.progress import warn
from pmm.utils.errors import InvalidFile, TrainingInterrupted
from pmm.utils.facts import how_many
from pmm.utils.files import sha256, sweep

FIRST, SHARDS = "phase-1.pth", "occlusions"
"""In the run's folder: the model of the first training, and the folder of the table's shards until it is whole."""
SHARD = 64
"""Images of a shard."""
CROPS = {"cpu": 128, "cuda": 512}
"""At most so many go through the network at once."""


def keep_model(out: Path, content: dict[str, Any]) -> None:
    """Write what is deployed of a training's `content` to phase-1.pth, unless these very weights are there: the bytes
    of the same weights may differ, and the table names their SHA-256. Raises CannotWrite."""
    path, state = out / FIRST, for_deployment(content)
    state["model"] = {name: value.detach().cpu().contiguous() for name, value in state["model"].items()}
    with suppress(InvalidFile):
        before = checkpoint.load(path)["model"]
        if before.keys() == state["model"].keys() and all(torch.equal(before[k], v) for k, v in state["model"].items()):
            return
    checkpoint.save(path, state)


def make_occluder(
    out: Path,
    samples: tuple[Sample, ...],
    config: Config,
    device: torch.device,
    processes: Processes,
    *,
    skip_bad: bool = False,
    pending_signal: Callable[[], int] = lambda: 0,
) -> Occluder:
    """What hides parts of the crops of the run in `out`, by its table. A missing one is made with the model in
    phase-1.pth, if the recipe asks a table at all.

    All processes call it. Raises InvalidFile for a table of something else, for one that is damaged, and for an image
    that cannot be read (with `skip_bad` it is left out); TrainingInterrupted as soon as `pending_signal` returns the
    number of one: shards that are done stay.
    """
    images, recipe = image_names(samples, Path(config.data.root)), config.recipe
    windows = Windows(height=config.data.height, width=config.data.width, step=recipe.aos_step)
    if not (recipe.aos_share and recipe.aos_pick != "random"):
        return Occluder(windows, None, images, recipe)
    maker = processes.run_on_all(lambda: _TableMaker(out, samples, images, windows, config, device, skip_bad))
    if not processes.broadcast((out / TABLE).exists()):
        maker.make(processes, pending_signal)
    return Occluder(windows, processes.run_on_all(maker.read), images, recipe)


class _TableMaker:
    def __init__(
        self,
        out: Path,
        samples: tuple[Sample, ...],
        names: tuple[str, ...],
        windows: Windows,
        config: Config,
        device: torch.device,
        skip_bad: bool,
    ) -> None:
        """Raises InvalidFile for a run without its phase-1.pth."""
        self.out, self.samples, self.names, self.windows = out, samples, names, windows
        self.config, self.device, self.skip_bad = config, device, skip_bad
        classes = class_indices(samples)
        self.labels = [classes[sample.pid] for sample in samples]
        if not (out / FIRST).exists():
            problem = "the model of the first training is gone, which tells what to hide in the second"
            raise InvalidFile(problem, path=out / FIRST, hint="put it back, or start another run")
        self.checkpoint = sha256(out / FIRST)

    def read(self) -> OcclusionTable:
        """Raises InvalidFile for a table that is damaged, or of something else."""
        path = self.out / TABLE
        table = read_table(path)
        check_table(table, path, checkpoint=self.checkpoint, windows=self.windows, images=self.names)
        return table

    def make(self, processes: Processes, pending_signal: Callable[[], int]) -> None:
        """Write the shards that are missing, each process its share of them, then the table of them all."""
        starts = range(0, len(self.names), SHARD)
        missing = [start for start in starts if self._shard(start) is None] if processes.main else []
        todo = processes.broadcast(missing)
        model = processes.run_on_all(self._model)
        self._announce(len(starts), len(todo))
        with tqdm(
            total=len(self.names),
            initial=len(self.names) - sum(len(self._names(start)) for start in todo),
            desc="occlusions",
            unit="image",
            leave=False,
            disable=None if processes.main else True,
        ) as bar:
            for first in range(0, len(todo), processes.world):  # together, so that none waits long for another
                own = todo[first + processes.rank : first + processes.rank + 1]
                found = processes.run_on_all(partial(self._tried, own, model, pending_signal))
                shards = [shard for shard in processes.gather(found) if shard]
                processes.run_on_all(partial(self._write, shards))
                if number := processes.all_reduce_max(pending_signal()):
                    raise TrainingInterrupted(number, f"between the trainings, {first} of {len(todo)} shards further")
                bar.update(sum(len(shard.facts.images) for shard in shards))
        processes.run_on_all(lambda: self._join(starts) if processes.main else None)

    def _model(self) -> OccludedModel:
        """Raises InvalidFile for one of another run."""
        path = self.out / FIRST
        model, config = restore_model(checkpoint.load(path), path)
        if config.model != self.config.model:
            changed = "; ".join(line for line in config.differences(self.config) if line.startswith("model."))
            hint = "put that of this run back, or start another run"
            raise InvalidFile(f"the model of another run ({changed})", path=path, hint=hint)
        return OccludedModel(model, preprocessing_of(config), self.windows, self.device, config.recipe.amp)

    def _announce(self, shards: int, missing: int) -> None:
        count = how_many(len(self.names), "image")
        done = f"; {shards - missing} of {how_many(shards, 'shard')} are done" if missing < shards else ""
        print(f"occlusions: {len(self.windows)} windows on {count}, each as it is and mirrored{done}", flush=True)

    def _tried(
        self, starts: Sequence[int], model: OccludedModel, pending_signal: Callable[[], int]
    ) -> OcclusionTable | None:
        """The shard at `starts`, if there is one and no signal has come before it was done.

        Raises InvalidFile for an image that cannot be read and is not to be left out.
        """
        for start in starts:
            part = slice(start, start + SHARD)
            unreadable: dict[int, InvalidFile] = {}
            found: list[npt.NDArray[np.float32]] = []
            paths, labels = [sample.path for sample in self.samples[part]], self.labels[part]
            count = max(1, model.most // (2 * (1 + len(self.windows))))
            crops = iter_crops(paths, model.preprocessing, count, unreadable=unreadable if self.skip_bad else None)
            try:
                for batch in crops:
                    if pending_signal():
                        return None
                    found.append(model.certainty(batch, labels[sum(map(len, found)) :][: len(batch)]))
            except InvalidFile as error:
                raise with_way_on(error, [sample.path for sample in self.samples], skips_bad=False) from error
            return self._table(self._names(start), np.concatenate(found), unreadable)
        return None

    def _table(
        self, names: tuple[str, ...], certainty: npt.NDArray[np.float32], unreadable: Collection[int]
    ) -> OcclusionTable:
        certainty[list(unreadable)] = 0  # as if nothing hurt
        left_out = tuple(names[place] for place in sorted(unreadable))
        return OcclusionTable(
            facts=self._facts(names, left_out),
            whole=certainty[:, :, 0],
            behind=certainty[:, :, 1:].reshape(len(names), 2, len(self.windows.tops), len(self.windows.lefts)),
        )

    def _facts(self, names: tuple[str, ...], left_out: tuple[str, ...] = ()) -> TableFacts:
        return TableFacts(
            format=FORMAT, checkpoint=self.checkpoint, windows=self.windows, images=names, left_out=left_out
        )

    def _names(self, start: int) -> tuple[str, ...]:
        return self.names[start : start + SHARD]

    def _path(self, start: int) -> Path:
        return self.out / SHARDS / f"{start:07}.npz"

    def _shard(self, start: int) -> OcclusionTable | None:
        """The shard of the images from `start` on, if it is whole and of this table."""
        with suppress(InvalidFile):
            shard = read_table(self._path(start))
            if dataclasses.replace(shard.facts, left_out=()) == self._facts(self._names(start)):
                return shard
        return None

    def _write(self, shards: Sequence[OcclusionTable]) -> None:
        for shard in shards:
            write_table(self._path(self.names.index(shard.facts.images[0])), shard)

    def _join(self, starts: Sequence[int]) -> None:
        """Write the table of all shards, which go."""
        shards = [shard for start in starts if (shard := self._shard(start))]
        left_out = tuple(name for shard in shards for name in shard.facts.left_out)
        if left_out:
            warn(f"{len(left_out)} images are left out of the table of occlusions; the first is {left_out[0]}")
        sweep(self.out, (TABLE,))
        table = OcclusionTable(
            facts=self._facts(self.names, left_out),
            whole=np.concatenate([shard.whole for shard in shards]),
            behind=np.concatenate([shard.behind for shard in shards]),
        )
        write_table(self.out / TABLE, table)
        shutil.rmtree(self.out / SHARDS)


class OccludedModel:
    """A trained model with a classifier, and how certain it is of a crop behind each window."""

    def __init__(
        self, model: nn.Module, preprocessing: Preprocessing, windows: Windows, device: torch.device, amp: str = "off"
    ) -> None:
        """`model` is that of `pmm.models.aos` in eval mode; its backbone computes in `amp` of the recipe."""
        self.preprocessing, self.device, self.most = preprocessing, device, CROPS[device.type]
        self.rectangles = windows.rectangles().tolist()
        self.network = deployed(model)
        self.network.fold_batch_norms(torch.zeros(1, 3, windows.height, windows.width))
        self.network.cast(HALF.get(amp, torch.float32))
        self.network.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.classifier = cast(nn.Module, model.classifier).to(device)

    @torch.inference_mode()
    def certainty(self, crops: Crops, labels: Sequence[int]) -> npt.NDArray[np.float32]:
        """Logarithms of the probability of the true classes `labels` [B], of uint8 `crops` [B, H, W, 3]: [B, 2, 1 + W],
        as they are and mirrored, each whole and behind each of W windows of zeros."""
        count, ways = len(crops), 2 * len(crops)
        batch = TrainBatch(
            crops=torch.from_numpy(crops).repeat_interleave(2, 0),
            mirrored=torch.tensor([False, True]).repeat(count),
            cutouts=torch.zeros(ways, 4, dtype=torch.int64),
            labels=torch.tensor(labels),
            indices=torch.zeros(ways, dtype=torch.int64),
        )
        whole = normalize_batch(batch, self.preprocessing, self.device).permute(0, 2, 3, 1)
        # in the memory of channels_last
        images = whole[:, None].repeat(1, 1 + len(self.rectangles), 1, 1, 1)
        for place, (top, left, bottom, right) in enumerate(self.rectangles, 1):
            images[:, place, top:bottom, left:right] = 0
        parts = images.flatten(0, 1).permute(0, 3, 1, 2).split(self.most)
        logits = torch.cat([self._logits(part) for part in parts]).double()  # in which 1 - p is not 0 too soon
        found = logits.log_softmax(1).view(count, -1, logits.shape[1])
        true = batch.labels.to(self.device)[:, None, None].expand(-1, found.shape[1], 1)
        return found.gather(2, true).view(count, 2, -1).float().cpu().numpy()

    def _logits(self, images: Tensor) -> Tensor:
        maps = self.network.trunk(images.to(self.network.input_type))
        return self.classifier(self.network.tail(*(each.float() for each in maps)))
