"""From the configuration that was asked for to the one that can be run, and its training data. Loads no torch."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from pathlib import Path

from pmm.artifacts.runs import RUNS, resolve_data_root
from pmm.config import SYNTHETIC, Config, DataConfig, fast_mode
from pmm.data.layouts import dataset_spec
from pmm.data.readers import read_dataset
from pmm.data.samples import ReidDataset, class_indices
from pmm.data.splits import split_validation
from pmm.utils.errors import UserError
from pmm.utils.files import locked

HOW_DRAWN = ("synthetic_ids", "synthetic_seed")
"""Keys of the configuration that synthetic people follow from."""


def resolve_config(config: Config) -> Config:
    """`config` with the values that depend on the data set filled in, and the data set's own name for an alias.

    Raises UserError for an unknown data set, or one other than the synthetic people without a root.
    """
    data, model = config.data, config.model
    data = dataclasses.replace(data, dataset=dataset_spec(data.dataset).name)
    if data.dataset == SYNTHETIC and not data.root:
        suffix = "-fast" if fast_mode() else ""
        drawn = RUNS / f"people-{data.synthetic_ids}-{data.synthetic_seed}{suffix}"
        data = dataclasses.replace(data, root=str(drawn))
    elif not data.root:
        raise UserError(f"--dataset {data.dataset} needs --root DIR, the folder that holds it")
    if model.weights == "auto":
        pretrained = model.backbone == "resnet50" and data.dataset != SYNTHETIC
        model = dataclasses.replace(model, weights="imagenet" if pretrained else "none")
    return dataclasses.replace(config, data=data, model=model)


def training_data(config: Config) -> tuple[Config, ReidDataset]:
    """Training crops, and held-out query and gallery; synthetic people are drawn first if they are not there.

    The configuration comes back with what the data say: the number of classes, and how synthetic people were drawn.
    What a reader had to assume is in the split's `notes`. Raises UserError if there is nothing to train on.
    """
    root = Path(config.data.root)
    if config.data.dataset == SYNTHETIC:
        config = dataclasses.replace(config, data=_drawn(config.data, root))
    whole = read_dataset(config.data.dataset, root)
    if not whole.train:
        raise UserError(f"{root} has no train folder, so there is nothing to train on; expected one beside query")
    split = split_validation(whole.train, config.data.val_identities, config.seed)
    split = dataclasses.replace(split, notes=whole.notes)
    classes = len(class_indices(split.train))
    if config.model.num_classes not in (0, classes):
        raise UserError(
            f"model.num_classes is {config.model.num_classes}, but {root} has {classes} training identities"
        )
    return dataclasses.replace(config, model=dataclasses.replace(config.model, num_classes=classes)), split


def refuse_other_people(data: DataConfig, asked: Iterable[str]) -> None:
    """Raise UserError if the synthetic people at `data.root` were drawn with other values of the keys `asked` for."""
    there = _how_drawn(Path(data.root)) if data.dataset == SYNTHETIC and data.root and not fast_mode() else {}
    for key in sorted(set(asked) & set(there)):
        if getattr(data, key) != there[key]:
            raise UserError(
                f"{data.root} holds people drawn with {key}={there[key]}, not {getattr(data, key)}; give another --root"
            )


def refuse_changes(out: Path, saved: Config, asked: Config) -> None:
    """Raise UserError if the run in `out` would go on with other values than it was started with, naming them.

    The number of workers may change: the batches do not depend on it. So may the data's folder if it is no longer
    where it was, or the same one.
    """
    may_change = ["data.workers:"]
    before = Path(resolve_data_root(saved.data.root, out / "last.pth"))
    if not before.is_dir() or before.resolve() == Path(asked.data.root).resolve():
        may_change.append("data.root:")
    changed = [line for line in saved.differences(asked) if not line.startswith(tuple(may_change))]
    if changed:
        raise UserError(
            f"{out} was started with other values ({'; '.join(changed)}); resume with the values and the data it had"
        )


def _drawn(data: DataConfig, root: Path) -> DataConfig:
    """Draw the people if they are not there. Raises UserError for others than values tell that are no defaults."""
    from pmm.data.synthetic.dataset import draw_people

    if _missing(root):
        if root.resolve() == Path.cwd():
            raise UserError(f"{root} is the current folder; give --root a folder of its own to draw people into")
        with locked(root.with_name(f".{root.name}.lock"), wait=True):  # two runs may want to draw the same people
            if _missing(root):
                draw_people(root, ids=data.synthetic_ids, seed=data.synthetic_seed)
    refuse_other_people(data, (key for key in HOW_DRAWN if getattr(data, key) != getattr(DataConfig(), key)))
    return dataclasses.replace(data, **_how_drawn(root))  # type: ignore[arg-type]


def _how_drawn(root: Path) -> dict[str, int]:
    """The values that the people at `root` were drawn with; empty if that is not known, or they are not there."""
    try:
        made = json.loads((root / "synthetic.json").read_text())
        return {key: int(made[key.removeprefix("synthetic_")]) for key in HOW_DRAWN}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _missing(root: Path) -> bool:
    return not root.exists() or (root.is_dir() and not any(root.iterdir()))
