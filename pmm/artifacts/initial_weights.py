"""The weights that a training starts from: random, ImageNet's, or those of a file."""

from __future__ import annotations

from collections.abc import Container, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torchvision.models import get_weight

from pmm.artifacts.dataset_location import with_resolved_data_root
from pmm.artifacts.init_file import InitFile, read_init_file
from pmm.artifacts.torch_file import COUNTER
from pmm.artifacts.weights_file import key_table
from pmm.config import IMAGENET, SYNTHETIC, TIMM, Config
from pmm.models.output import ReidModel
from pmm.utils.errors import ConflictingOptions, InvalidFile, UserError


def load_initial_weights(model: ReidModel, config: Config, init: InitFile | None) -> str:
    """Start `model` from `init` or, without one, from what `--weights` says.

    Returns a table that accounts for each key of the file and of the model, empty without a file. Of a PMM
    checkpoint, classifiers are taken only if they are of the same identities (as many of the same data set, of
    `folder` at the same place, and with the same ones held out), and heads only if they are of the same kind.

    Raises ConflictingOptions for a backbone without ImageNet's weights, UserError if their download fails, InvalidFile
    if an earlier one is damaged.
    """
    if init is None:
        imagenet = config.model.weights == "imagenet"
        names = _load_imagenet(model.backbone, config.model.backbone) if imagenet else set()  # type: ignore[arg-type]
        model.weights_loaded({f"backbone.{name}" for name in names})
        return ""
    state = model.state_dict()
    shapes = {key: value.shape for key, value in init.weights.items()}
    bent = {_part(key) for key, value in state.items() if shapes.get(key, value.shape) != value.shape}
    reasons = {key: _why_not(key, bent, config, init) for key in state}
    taken = {key: init.weights[key] for key, reason in reasons.items() if not reason}
    _copy(taken, state)
    reasons |= dict.fromkeys(model.weights_loaded(taken), "copies of what was taken")
    return _table(reasons, init)


def _load_imagenet(backbone: nn.Module, name: str) -> set[str]:
    """Returns the names of the weights within the backbone."""
    if name.startswith(TIMM):
        from pmm.models.timm_network import imagenet_state

        backbone.net.load_state_dict(imagenet_state(name.removeprefix(TIMM)))  # type: ignore[union-attr]
        return set(backbone.state_dict())
    if name not in IMAGENET:
        problem = f"--weights imagenet: the {name} backbone has no such weights"
        raise ConflictingOptions(problem, "--weights", hint="use --weights none, or start from a file with --init FILE")
    published = get_weight(IMAGENET[name])
    cached = Path(torch.hub.get_dir()) / "checkpoints" / Path(published.url).name
    if not cached.is_file():
        try:
            published.get_state_dict(progress=True, check_hash=True)
        except (OSError, RuntimeError) as error:  # includes urllib's; RuntimeError: what came is something else
            raise UserError(
                f"--weights imagenet: the download failed ({error})",
                hint="give a file with --init FILE, or --weights none",
            ) from error
    try:
        file = read_init_file(cached, name)
    except InvalidFile as error:
        error.expected, error.hint = "ImageNet's weights (--weights imagenet)", "remove that file to download it again"
        raise
    weights = {key.removeprefix("backbone."): value for key, value in file.weights.items()}
    _copy(weights, backbone.state_dict())
    return set(weights)


def _copy(weights: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
    """Into the tensors of `state`, whose storage is the model's."""
    with torch.no_grad():
        for key, value in weights.items():
            state[key].copy_(value)


def _part(key: str) -> str:
    """What starts from the file as a whole or not at all: a classifier, a head without it."""
    words = key.split(".")
    return ".".join(words[: 3 if "classifier" in words else 2])


def _why_not(key: str, bent: Container[str], config: Config, init: InitFile) -> str:
    """Why the weight `key` of the model does not come from the file, of which the parts `bent` have other shapes; empty
    if it does."""
    if key not in init.weights:
        return (
            "counters that the file lacks"
            if key.endswith(COUNTER) and key.startswith("backbone.")
            else "without a counterpart in the file"
        )
    saved = init.config
    if saved is not None and key.startswith("stages.") and saved.model.neck != config.model.neck:
        return f"heads of --neck {saved.model.neck} there, {config.model.neck} here"
    if saved is not None and not key.startswith("backbone.") and "classifier" in key:
        there = with_resolved_data_root(saved, init.path)
        if _identities(there) != _identities(config):
            return f"classifiers of other identities ({_count(there)} there, {_count(config)} here)"
    return "of another size" if _part(key) in bent else ""


def _identities(config: Config) -> tuple[object, ...]:
    """What the training identities of a run follow from, and their order."""
    data = config.data
    drawn = (data.synthetic_ids, data.synthetic_seed) if data.dataset == SYNTHETIC else ()
    place = Path(data.root).resolve() if data.dataset == "folder" else None  # whose people no name tells apart
    held_out = (data.val_identities, config.seed) if data.val_identities else ()
    return config.model.num_classes, data.dataset, drawn, place, held_out


def _count(config: Config) -> str:
    place = f" in {config.data.root}" if config.data.dataset == "folder" else ""
    return f"{config.model.num_classes} of {config.data.dataset}{place}"


def _table(reasons: Mapping[str, str], init: InitFile) -> str:
    """Keys of the file and of the model by what became of them: a line each for a reason, with how many and which."""
    rows: dict[tuple[str, str], list[str]] = {}

    def add(verb: str, reason: str, key: str) -> None:
        rows.setdefault((verb, reason), []).append(key)

    for key, reason in reasons.items():
        if not reason:
            add(
                "taken",
                "the whole backbone" if key.startswith("backbone.") else "what follows it",
                init.stored_names[key],
            )
    for key in init.weights:
        if reason := reasons.get(key, "without a counterpart in the model"):
            add("left out", reason, init.stored_names[key])
    for key, reason in init.left_out.items():
        add("left out", reason, key)
    for key, reason in reasons.items():
        if reason:
            add("new", reason, key)
    return key_table("init", f"{init.path}, {init.kind}", rows)
