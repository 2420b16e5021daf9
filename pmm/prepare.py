"""From the configuration that was asked for to the one that can be run, and its training data. Loads no torch."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from pmm.config import SYNTHETIC, Config, DataConfig, fast_mode
from pmm.data.layouts import layout_of
from pmm.data.readers import read_dataset
from pmm.data.samples import Split, class_indices
from pmm.data.splits import split_validation
from pmm.errors import UserError
from pmm.files import locked
from pmm.runs import synthetic_root


def settled(config: Config) -> Config:
    """`config` with the values that depend on the data set filled in, and the data set's own name for an alias.

    Raises UserError for an unknown data set, or one other than the synthetic people without a root.
    """
    data, model = config.data, config.model
    data = dataclasses.replace(data, dataset=layout_of(data.dataset).name)
    if data.dataset == SYNTHETIC and not data.root:
        data = dataclasses.replace(data, root=str(synthetic_root(config)))
    elif not data.root:
        raise UserError(f"--dataset {data.dataset} needs --root DIR, the folder that holds it")
    if model.weights == "auto":
        pretrained = model.backbone == "resnet50" and data.dataset != SYNTHETIC
        model = dataclasses.replace(model, weights="imagenet" if pretrained else "none")
        if model.backbone == "resnet50" and not pretrained:
            print("synthetic people: the trunk starts from random weights (--weights imagenet starts from ImageNet's)")
    return dataclasses.replace(config, data=data, model=model)


def training_data(config: Config) -> tuple[Config, Split]:
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


def _drawn(data: DataConfig, root: Path) -> DataConfig:
    """Draw the people if they are not there. Raises UserError if others are there than were asked for by a flag."""
    from pmm.data.synthetic.__main__ import draw

    if _missing(root):
        with locked(root.with_name(f".{root.name}.lock"), wait=True):  # two runs may want to draw the same people
            if _missing(root):
                draw(root, ids=data.synthetic_ids, seed=data.synthetic_seed)
    try:
        made = json.loads((root / "synthetic.json").read_text())
        there = {"synthetic_ids": int(made["ids"]), "synthetic_seed": int(made["seed"])}
    except (OSError, ValueError, KeyError, TypeError):
        return data  # drawn by other means: nothing to compare with
    for key, value in there.items():
        if getattr(data, key) not in (value, getattr(DataConfig(), key)) and not fast_mode():
            raise UserError(
                f"{root} holds people drawn with {key}={value}, not {getattr(data, key)}; give another --root"
            )
    return dataclasses.replace(data, **there)  # type: ignore[arg-type]


def _missing(root: Path) -> bool:
    return not root.exists() or (root.is_dir() and not any(root.iterdir()))
