"""The file that a training starts from (`--init`): a PMM checkpoint, or whatever holds the weights of the backbone.

Other toolkits wrap the same names differently (`state_dict`, `module.`, `encoder_q.`, and combinations), so a wrapping
is not looked up but found: it is the prefix below which most names of the backbone stand.
"""

from __future__ import annotations

import re
import shlex
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pmm.artifacts.checkpoint import checked, deployed_weights, is_checkpoint
from pmm.artifacts.known_checkpoints import FAST_REID, known_method, name_of
from pmm.artifacts.run_folder import BEST
from pmm.artifacts.torch_file import COUNTER, as_float32, first_names
from pmm.artifacts.weights_file import EMA, TRAINING_STATE, leaves_of, read_weights_file
from pmm.config import BACKBONE_NAMES, TIMM, Config
from pmm.models.backbone import build_backbone
from pmm.utils.errors import InvalidFile, UserError
from pmm.utils.extras import import_library
from pmm.utils.files import existing_file, sha256

RESNETS = {(2, False): 18, (6, False): 34, (23, True): 101, (36, True): 152}
"""Blocks in the third stage of a ResNet, and whether they have three convolutions -> its layers; timm has them all."""
NUMBERED = {"conv1": "0", "bn1": "1", "layer1": "4", "layer2": "5", "layer3": "6", "layer4": "7"}
"""The names of a ResNet's parts where they are the children of an nn.Sequential."""
NOTES = {
    FAST_REID: "newer versions pool the stem without padding: their maps are those of the image two pixels further"
}
"""What a file does not show of its network."""
_OPTIMIZER = re.compile(r"(^|\.)(step|exp_avg|exp_avg_sq|max_exp_avg_sq|momentum_buffer|square_avg)$")


@dataclass(frozen=True, kw_only=True)
class InitFile:
    """What a file gives to the model of a new run."""

    path: Path
    sha256: str
    kind: str
    """What it is, in words."""
    config: Config | None
    """Of a PMM checkpoint; None for other files."""
    weights: dict[str, Tensor]
    """By the names of pmm's model: the whole backbone, and of a PMM checkpoint all the rest."""
    stored_names: dict[str, str]
    """Those names -> where the file has them, containers and key joined by dots."""
    left_out: dict[str, str]
    """All else that is in the file -> why it is not among the weights."""


class _Match(NamedTuple):
    """A place in a file where names of a backbone stand."""

    names: Mapping[str, str]
    """The file's names, without their prefix -> the backbone's."""
    prefix: str
    hits: int
    """Weights that are there in the backbone's shapes, batch-norm's counters apart."""

    def key(self, name: str) -> str:
        return f"{self.prefix}.{name}" if self.prefix else name


def read_init_file(path: str | Path, backbone: str) -> InitFile:
    """Read the file once, and check all that can be checked before there are data.

    Raises InvalidFile if it is missing or damaged, could run code, does not hold the whole backbone of that name in its
    shapes, is of an architecture that has more, or holds weights that are not finite; MissingLibrary for a .safetensors
    file where that library is missing.
    """
    expected = f"the weights of a {backbone} backbone, or a PMM checkpoint with one"
    if (best := Path(path) / BEST).is_file():
        raise InvalidFile("it is the folder of a run", path=path, expected=expected, hint=f"give {best}")
    path = existing_file(path, expected)
    content = read_weights_file(path, expected)
    leaves = leaves_of(content)
    if is_checkpoint(content):
        return _from_checkpoint(checked(content, path), leaves, path, backbone)
    tensors = {key: value for key, value in leaves.items() if isinstance(value, Tensor)}
    match, *others = _matches(tensors, backbone)
    name = name_of(content) or "a state dict"
    if problem := _problem(match, tensors, backbone):
        known = f"it is {name}: " if name_of(content) else ""
        if known_method(content):
            hint = f"first turn it into a PMM checkpoint: pmm import {shlex.quote(str(path))} -o CKPT.pth"
            raise InvalidFile(known + problem, path=path, expected=expected, hint=hint)
        for other in BACKBONE_NAMES:
            if not _problem(_matches(tensors, other)[0], tensors, other):
                problem = f"{known}its backbone is {other}"
                raise InvalidFile(problem, path=path, expected=backbone, hint=f"use --backbone {other}")
        of_timm = _resnet_of_timm(tensors)
        fits = of_timm and not _problem(_matches(tensors, of_timm)[0], tensors, of_timm)
        hint = f"use --backbone {of_timm}" if fits else ""
        raise InvalidFile(known + problem, path=path, expected=expected, hint=hint)
    stored = {f"backbone.{ours}": match.key(name) for name, ours in match.names.items() if match.key(name) in tensors}
    copies = [other.prefix for other in others if other.hits == match.hits]
    return InitFile(
        path=path,
        sha256=sha256(path),
        kind=f"{name} ({NOTES[name]})" if name in NOTES else name,
        config=None,
        weights={ours: as_float32(tensors[key], key, path) for ours, key in stored.items()},
        stored_names=stored,
        left_out=_left_out(leaves, set(stored.values()), copies),
    )


def _from_checkpoint(saved: dict[str, Any], leaves: Mapping[str, Any], path: Path, backbone: str) -> InitFile:
    try:
        config = Config.from_dict(saved["config"])
    except UserError as error:
        raise InvalidFile(str(error), path=path) from error
    model, data = config.model, config.data
    if model.backbone != backbone:
        hint = f"use --backbone {model.backbone}"
        raise InvalidFile(f"its backbone is {model.backbone}", path=path, expected=backbone, hint=hint)
    places = {id(value): key for key, value in leaves.items()}
    state = deployed_weights(saved)
    match = _Match({key: key for key in _shapes(backbone)}, "backbone", len(state))
    if problem := _problem(match, state, backbone):
        raise InvalidFile(problem, path=path)
    stored = {key: places[id(value)] for key, value in state.items()}
    left_out = _left_out(leaves, set(stored.values()), () if saved["ema"] is None else ["model"])
    if "imported" in saved["versions"]:  # other code has its own order of identities, which it does not store
        unknown = [key for key in state if ".classifier." in key]
        state = {key: value for key, value in state.items() if key not in unknown}
        left_out |= {stored.pop(key): "classifiers of an imported file, which does not say of whom" for key in unknown}
    averaged = "" if saved["ema"] is None else ", averaged over its steps"
    kind = f"{model.method} on {backbone}, {model.num_classes} identities of {data.dataset}, epoch {saved['epoch']}"
    return InitFile(
        path=path,
        sha256=sha256(path),
        kind=f"a PMM checkpoint ({kind}{averaged})",
        config=config,
        weights={key: as_float32(value, stored[key], path) for key, value in state.items()},
        stored_names=stored,
        left_out=left_out,
    )


@cache
def _shapes(backbone: str) -> dict[str, Tensor]:
    """The backbone's state dict, without content."""
    with torch.device("meta"):
        return build_backbone(backbone).state_dict()


@cache
def _whole_network(backbone: str) -> frozenset[str]:
    """The names in the network of timm that the backbone is the beginning of; empty for others."""
    if not backbone.startswith(TIMM):
        return frozenset()
    with torch.device("meta"):
        return frozenset(import_library("timm").create_model(backbone.removeprefix(TIMM)).state_dict())


@cache
def _public_names(backbone: str) -> dict[str, str]:
    """The names that the backbone's weights have outside of pmm -> its own."""
    names, whole = {}, _whole_network(backbone)
    for key in _shapes(backbone):
        name = re.sub(r"^(trunk|net)\.", "", key)
        # timm flattens nested modules where it is asked for feature maps: stages.0.norm becomes stages_0.norm
        nested = (f"{name[:at]}.{name[at + 1 :]}" for at, letter in enumerate(name) if letter == "_")
        names[next((each for each in (name, name.removeprefix("model."), *nested) if each in whole), name)] = key
    return names


def _matches(tensors: Mapping[str, Tensor], backbone: str) -> list[_Match]:
    """Where weights of the backbone stand, the best place first: most weights, averaged ones, first in the file."""
    shapes, public = _shapes(backbone), _public_names(backbone)
    numbered = {}
    for name, key in public.items():
        first, _, rest = name.partition(".")
        numbered[f"{NUMBERED.get(first, first)}.{rest}"] = key
    found = []
    for names in ({key: key for key in shapes}, public, numbered):
        counts: Counter[str] = Counter()
        for key, value in tensors.items():
            words = key.split(".")
            for start in range(len(words)):
                name = ".".join(words[start:])
                if name in names and not name.endswith(COUNTER) and value.shape == shapes[names[name]].shape:
                    counts[".".join(words[:start])] += 1
        found += [_Match(names, prefix, hits) for prefix, hits in counts.items()]
    nothing = _Match(public, "", 0)
    return [*sorted(found, key=lambda match: (-match.hits, not EMA.search(match.prefix))), nothing]


def _resnet_of_timm(tensors: Mapping[str, Tensor]) -> str:
    """The backbone of timm that the weights are of, as far as the names of its third stage tell; empty without timm."""
    found = [name for key in tensors if (name := re.search(r"\blayer3\.(\d+)\.conv([13])\.weight$", key))]
    layers = RESNETS.get((len({name[1] for name in found}), "3" in {name[2] for name in found}))
    return f"{TIMM}resnet{layers}" if layers and find_spec("timm") else ""


def _problem(match: _Match, tensors: Mapping[str, Tensor], backbone: str) -> str:
    """Why the weights at `match` are not exactly those of the backbone; empty if they are."""
    shapes = _shapes(backbone)
    weights = [name for name in match.names if not name.endswith(COUNTER)]
    missing = [name for name in weights if match.key(name) not in tensors]
    bent = [
        f"{match.key(name)} {list(tensors[match.key(name)].shape)} instead of {list(shapes[ours].shape)}"
        for name, ours in match.names.items()
        if match.key(name) in tensors and tensors[match.key(name)].shape != shapes[ours].shape
    ]
    inside = tuple(match.key(f"{name.partition('.')[0]}.") for name in match.names)
    known = {match.key(name) for name in (*match.names, *_whole_network(backbone))}
    more = [key for key in tensors if key.startswith(inside) and key not in known]
    if tensors and all(_OPTIMIZER.search(key) for key in tensors):
        return "it holds the state of an optimizer and no weights"
    if match.hits < 0.1 * len(weights):  # a few fit by chance
        return f"it holds no weights of a {backbone} backbone"
    problems = (
        (f"of the {len(weights)} weights of a {backbone} backbone {len(missing)} are missing", missing),
        (f"{len(bent)} weight{'s' * (len(bent) != 1)} of another shape", bent),
        (f"{len(more)} weight{'s' * (len(more) != 1)} more than a {backbone} backbone has", more),
    )
    return ", ".join(f"{problem} ({first_names(keys)})" for problem, keys in problems if keys)


def _left_out(leaves: Mapping[str, Any], taken: set[str], copies: Iterable[str]) -> dict[str, str]:
    """Every other key -> why it is left out; `copies` are prefixes at which there is a second backbone."""
    reasons = {}
    beginnings = tuple(f"{prefix}." for prefix in copies)
    for key, value in leaves.items():
        if key in taken:
            continue
        if TRAINING_STATE.match(key):
            reasons[key] = "the state of its training"
        elif not isinstance(value, Tensor):
            reasons[key] = "no weights"
        else:
            reasons[key] = "another copy of the weights" if key.startswith(beginnings) else "no part of the backbone"
    return reasons
