"""From the configuration as parsed to one that can be run, and its training data. Loads no torch."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from pathlib import Path

from pmm.artifacts.dataset_location import resolve_data_root
from pmm.artifacts.origin import RUNS
from pmm.artifacts.run_folder import LAST
from pmm.config import IMAGENET, SYNTHETIC, TIMM, Config, DataConfig, fast_mode
from pmm.data.dataset_specs import dataset_spec
from pmm.data.readers import read_dataset
from pmm.data.samples import ReidDataset, class_indices
from pmm.data.splits import split_validation
from pmm.utils.errors import ConflictingOptions, InvalidFile, InvalidValue
from pmm.utils.files import locked

SYNTHETIC_KEYS = ("synthetic_ids", "synthetic_seed")
"""Keys of the configuration that the synthetic data set depends on."""


def resolve_config(config: Config) -> Config:
    """`config` with the values that depend on the data set filled in, and the data set's name in place of an alias.

    Raises InvalidValue for an unknown data set, ConflictingOptions for any but the synthetic one without a root.
    """
    data, model = config.data, config.model
    data = dataclasses.replace(data, dataset=dataset_spec(data.dataset).name)
    if data.dataset == SYNTHETIC and not data.root:
        suffix = "-fast" if fast_mode() else ""
        root = RUNS / f"people-{data.synthetic_ids}-{data.synthetic_seed}{suffix}"
        data = dataclasses.replace(data, root=str(root))
    elif not data.root:
        problem, hint = f"--dataset {data.dataset} needs --root", "add --root DIR, the folder of the data set"
        raise ConflictingOptions(problem, "--dataset", "--root", hint=hint)
    if model.weights == "auto":
        pretrained = data.dataset != SYNTHETIC and not model.init and has_imagenet_weights(model.backbone)
        model = dataclasses.replace(model, weights="imagenet" if pretrained else "none")
    return dataclasses.replace(config, data=data, model=model)


def has_imagenet_weights(backbone: str) -> bool:
    """Whether `--weights imagenet` can be had for `backbone`.

    Raises UserError for a network that timm does not have, or without timm.
    """
    if backbone.startswith(TIMM):
        from pmm.models import timm_network

        return timm_network.has_imagenet_weights(backbone.removeprefix(TIMM))
    return backbone in IMAGENET


def training_data(config: Config) -> tuple[Config, ReidDataset]:
    """`config` with the number of classes and how synthetic data were drawn, and the data: train, and held-out
    identities as query and gallery.

    A missing synthetic data set is drawn first. The assumptions of the data set's reader are in `notes`. Raises
    UserError if the data cannot be read or have nothing to train on.
    """
    root = Path(config.data.root)
    if config.data.dataset == SYNTHETIC:
        config = dataclasses.replace(config, data=_draw_if_missing(config.data, root))
    dataset = read_dataset(config.data.dataset, root)
    if not dataset.train:
        raise InvalidFile("there is nothing to train on", path=root, expected="a folder train beside query")
    if config.recipe.eval_every and not _has_matches(dataset):
        problem = f"--eval-every {config.recipe.eval_every}: {root} has no test split to evaluate"
        expected = "queries with a match in the gallery, from another camera"
        raise ConflictingOptions(problem, "--eval-every", expected=expected, hint="leave it out")
    split = split_validation(dataset.train, config.data.val_identities, config.seed)
    split = dataclasses.replace(split, notes=dataset.notes, left_out=dataset.left_out)
    classes = len(class_indices(split.train))
    if config.model.num_classes not in (0, classes):
        expected = f"{classes}, the number of training identities in {root}"
        raise InvalidValue("--num-classes", config.model.num_classes, expected)
    return dataclasses.replace(config, model=dataclasses.replace(config.model, num_classes=classes)), split


def _has_matches(dataset: ReidDataset) -> bool:
    """Whether a query has a crop of the same identity from another camera in the gallery."""
    cameras: dict[int, set[int]] = {}
    for sample in dataset.gallery:
        cameras.setdefault(sample.pid, set()).add(sample.camid)
    return any(cameras.get(sample.pid, set()) - {sample.camid} for sample in dataset.query)


def check_synthetic(data: DataConfig, keys: Iterable[str]) -> None:
    """Raises InvalidValue if the synthetic data set at `data.root` was drawn with another value of one of `keys`."""
    drawn = _drawn_with(Path(data.root)) if data.dataset == SYNTHETIC and data.root and not fast_mode() else {}
    for key in sorted(set(keys) & set(drawn)):
        if getattr(data, key) != drawn[key]:
            expected = f"{drawn[key]}, with which {data.root} was drawn"
            flag = "--" + key.replace("_", "-")
            raise InvalidValue(flag, getattr(data, key), expected, hint="leave it out, or choose another --root")


def check_unchanged(out: Path, saved: Config, config: Config, *, extend: bool = False) -> None:
    """Raises ConflictingOptions if `config` has other values than the run in `out` was started with, naming them.

    What the weights do not depend on may change: the number of workers, and how often the test split is evaluated. So
    may the precision, for the next machine may have another, the data's folder if it was moved or is another path of
    the same folder, and with `extend` the number of epochs, to more, and then for how many a backbone is frozen that
    was so in all.
    """
    may_change = ["data.workers:", "recipe.eval_every:", "recipe.amp:"]
    longer = config.recipe.epochs > saved.recipe.epochs
    if longer and extend:
        may_change.append("recipe.epochs:")
        if saved.recipe.epochs == saved.recipe.freeze_backbone <= config.recipe.freeze_backbone:
            may_change.append("recipe.freeze_backbone:")
    before = Path(resolve_data_root(saved.data.root, out / LAST))
    if not before.is_dir() or before.resolve() == Path(config.data.root).resolve():
        may_change.append("data.root:")
    changed = [line for line in saved.differences(config) if not line.startswith(tuple(may_change))]
    if changed:
        problem = f"{out} was started with other values ({'; '.join(changed)})"
        only_longer = longer and len(changed) == 1 and changed[0].startswith("recipe.epochs:")
        hint = "add --extend to train on" if only_longer else "resume without these changes"
        raise ConflictingOptions(problem, "--resume", hint=f"{hint}, or choose another --out")


def _draw_if_missing(data: DataConfig, root: Path) -> DataConfig:
    """Raises InvalidValue for a data set that was drawn with other values than those of `data` that are no defaults."""
    from pmm.data.synthetic.dataset import draw_people

    if _missing(root):
        if root.resolve() == Path.cwd():
            raise InvalidValue("--root", str(root), "a folder to draw the data set into, not the current one")
        with locked(root.with_name(f".{root.name}.lock"), wait=True):  # two runs may want to draw the same data set
            if _missing(root):
                draw_people(root, ids=data.synthetic_ids, seed=data.synthetic_seed)
    check_synthetic(data, (key for key in SYNTHETIC_KEYS if getattr(data, key) != getattr(DataConfig(), key)))
    return dataclasses.replace(data, **_drawn_with(root))  # type: ignore[arg-type]


def _drawn_with(root: Path) -> dict[str, int]:
    """The values of SYNTHETIC_KEYS that the data set at `root` was drawn with; empty if unknown or missing."""
    try:
        recorded = json.loads((root / "synthetic.json").read_text())
        return {key: int(recorded[key.removeprefix("synthetic_")]) for key in SYNTHETIC_KEYS}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _missing(root: Path) -> bool:
    return not root.exists() or (root.is_dir() and not any(root.iterdir()))
