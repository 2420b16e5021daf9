"""The data of a checkpoint's pictures: crops to test on, and those it was trained on. Loads no torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pmm.artifacts.dataset_location import DatasetLocation, resolve_data_root
from pmm.config import Config
from pmm.data.crops import load_crops
from pmm.data.preprocessing import Crops, Resize
from pmm.data.readers import read_dataset
from pmm.data.samples import ReidDataset, Sample, class_indices
from pmm.data.splits import split_validation
from pmm.utils.errors import InvalidFile, UserError


@dataclass(frozen=True, kw_only=True)
class CheckpointData:
    """A checkpoint's data set."""

    dataset: ReidDataset
    trained: tuple[Sample, ...]
    """The crops that it was trained on; empty if they are not known."""
    unknown: str = ""
    """Why they are not known."""
    root: Path = Path()
    """Folder of the data set, where one was trained on it."""

    @property
    def labels(self) -> dict[int, int]:
        """Training label of each identity of `trained`."""
        return class_indices(self.trained)

    def faces(self, size: Resize, labels: Sequence[int]) -> dict[int, Crops]:
        """The first crop [height, width, 3], resized as `size` says, of each of the training `labels` that is known."""
        pids = {label: pid for pid, label in self.labels.items()}
        first: dict[int, Path] = {}
        for sample in self.trained:
            first.setdefault(sample.pid, sample.path)
        known = [label for label in dict.fromkeys(labels) if label in pids]
        crops = load_crops([first[pids[label]] for label in known], size)
        return dict(zip(known, crops, strict=True))

    def names(self) -> dict[int, str]:
        """The name of each training label in a picture."""
        return {label: f"person {pid}" for pid, label in self.labels.items()}


def checkpoint_data(config: Config, checkpoint: Path, root: Path | None = None) -> CheckpointData:
    """The data set that `checkpoint` was trained on, at the root in its configuration or at `root`.

    Raises InvalidFile if it is missing, naming the places where it was searched, or cannot be read.
    """
    data = config.data
    place = root or Path(resolve_data_root(data.root, checkpoint))
    if root is None and not (data.root and place.is_dir()):
        reason = f"{data.root} is not a folder" if data.root else "the checkpoint has no root of the data"
        if data.root and not Path(data.root).is_absolute():
            reason += ", neither from here nor from a folder above the checkpoint"
        hint = f"give --root DIR, the folder of data set {data.dataset} (--what curves needs none)"
        raise InvalidFile(f"its data set is missing ({reason})", path=checkpoint, hint=hint)
    dataset = read_dataset(data.dataset, place)
    try:
        trained = split_validation(dataset.train, data.val_identities, config.seed).train
    except UserError as error:
        return CheckpointData(dataset=dataset, trained=(), unknown=str(error))
    classes, expected = len(class_indices(trained)), config.model.num_classes
    if classes != expected:
        reason = f"{place} has {classes} training identities, the checkpoint {expected}"
        return CheckpointData(dataset=dataset, trained=(), unknown=reason)
    return CheckpointData(dataset=dataset, trained=trained, root=place)


def adopted_data(data: DatasetLocation, path: Path, root: Path | None = None) -> CheckpointData:
    """The data set that was named when the network `path` was adopted, at the root that was named or at `root`.

    Raises InvalidFile if none was, or if it cannot be read.
    """
    if not data.name or not (root or data.root):
        hint = "adopt it with --dataset NAME --root DIR"
        raise InvalidFile("it does not say which data set to draw", path=path, hint=hint)
    unknown = "an adopted network does not say on whom it was trained"
    return CheckpointData(dataset=read_dataset(data.name, root or data.root), trained=(), unknown=unknown)


def pick(samples: Sequence[Sample], count: int, seed: int) -> list[Sample]:
    """`count` random ones of `samples`: no identity is repeated before all have occurred. A larger `count` begins with
    the choice of a smaller one."""
    times: Counter[int] = Counter()
    turns: list[tuple[int, int, int]] = []
    for index in np.random.default_rng(seed).permutation(len(samples)).tolist():
        turns.append((times[samples[index].pid], len(turns), index))
        times[samples[index].pid] += 1
    return [samples[index] for _, _, index in sorted(turns)[:count]]


def name_of(sample: Sample) -> str:
    """A crop's line in a picture: its identity and camera."""
    return f"person {sample.pid}" + (f", camera {sample.camid + 1}" if sample.camid >= 0 else "")
