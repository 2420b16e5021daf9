"""The crops that a checkpoint's pictures show: test people, and those it was trained on. Loads no torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pmm.artifacts.origin import resolve_data_root
from pmm.config import Config
from pmm.data.crops import load_crops
from pmm.data.preprocessing import Crops
from pmm.data.readers import read_dataset
from pmm.data.samples import ReidDataset, Sample, class_indices
from pmm.data.splits import split_validation
from pmm.utils.errors import UserError


@dataclass(frozen=True, kw_only=True)
class People:
    """A checkpoint's data set."""

    test: ReidDataset
    trained: tuple[Sample, ...]
    """The crops that it was trained on; none if they cannot be told."""
    why_none: str = ""

    @property
    def labels(self) -> dict[int, int]:
        """Training label of each identity of `trained`."""
        return class_indices(self.trained)

    def faces(self, height: int, width: int, labels: Sequence[int]) -> dict[int, Crops]:
        """The first crop [height, width, 3] of each training label that is asked for."""
        person = {label: pid for pid, label in self.labels.items()}
        first: dict[int, Path] = {}
        for sample in self.trained:
            first.setdefault(sample.pid, sample.path)
        chosen = [label for label in dict.fromkeys(labels) if label in person]
        crops = load_crops([first[person[label]] for label in chosen], height, width)
        return dict(zip(chosen, crops, strict=True))

    def persons(self) -> dict[int, str]:
        """What to call each training label."""
        return {label: f"person {pid}" for pid, label in self.labels.items()}


def people_of(config: Config, checkpoint: Path, root: Path | None = None) -> People:
    """The data set that `checkpoint` was trained on, where it says or at `root`.

    Raises UserError if it is not there, saying where it was looked for, or cannot be read.
    """
    data = config.data
    place = root or Path(resolve_data_root(data.root, checkpoint))
    if root is None and not (data.root and place.is_dir()):
        where = f"{data.root} is no folder" if data.root else "it does not say where"
        if data.root and not Path(data.root).is_absolute():
            where += ", neither here nor from a folder above the checkpoint"
        raise UserError(
            f"{checkpoint}: its data are gone ({where}); give --root DIR, the folder of data set {data.dataset} "
            "(--what curves needs none)"
        )
    whole = read_dataset(data.dataset, place)
    try:
        trained = split_validation(whole.train, data.val_identities, config.seed).train
    except UserError as error:
        return People(test=whole, trained=(), why_none=str(error))
    found, known = len(class_indices(trained)), config.model.num_classes
    if found != known:
        why = f"{place} has {found} training identities, the checkpoint {known}"
        return People(test=whole, trained=(), why_none=why)
    return People(test=whole, trained=trained)


def pick(samples: Sequence[Sample], count: int, seed: int) -> list[Sample]:
    """`count` of `samples`, drawn at random: no identity comes again before each has come. The first of a larger
    `count` are those of a smaller one."""
    times: Counter[int] = Counter()
    turns: list[tuple[int, int, int]] = []
    for index in np.random.default_rng(seed).permutation(len(samples)).tolist():
        turns.append((times[samples[index].pid], len(turns), index))
        times[samples[index].pid] += 1
    return [samples[index] for _, _, index in sorted(turns)[:count]]


def name_of(sample: Sample) -> str:
    """A crop's line in a picture: who, and from which camera."""
    return f"person {sample.pid}" + (f", camera {sample.camid + 1}" if sample.camid >= 0 else "")
