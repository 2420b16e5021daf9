"""Checkpoints of other code bases: those of the PMM authors and of BDB are converted, some others named.

BDB is the Batch DropBlock Network (Dai et al., ICCV 2019), on whose code the PMM authors built theirs; both save
`{"state_dict": ..., "epoch": ...}`.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pmm.config import Config, ModelConfig
from pmm.models.registry import build_model
from pmm.utils.errors import UserError

EXPECTED = "a checkpoint of the PMM authors' code or of BDB's"
CODE = {"pmm": "the PMM authors' code", "bdb": "the BDB code"}
"""Method -> who writes such checkpoints."""
COUNTER = ".num_batches_tracked"
SHOWN = 3

_SHARED = {
    "backbone.0.": "backbone.trunk.conv1.",
    "backbone.1.": "backbone.trunk.bn1.",
    "backbone.4.": "backbone.trunk.layer1.",
    "backbone.5.": "backbone.trunk.layer2.",
    "backbone.6.": "backbone.trunk.layer3.",
    "res_part.": "backbone.layer4.",
    "global_reduction.0.": "stages.0.reduction.",
    "global_reduction.1.": "stages.0.bn.",
    "global_softmax.": "stages.0.classifier.",
    "res_part2.": "bottleneck.",
}


def _branch(number: str, stage: int) -> dict[str, str]:
    ours = f"stages.{stage}."
    return {
        f"reduction{number}.0.": f"{ours}reduction.",
        f"reduction{number}.1.": f"{ours}bn.",
        f"softmax{number}.": f"{ours}classifier.",
    }


_BRANCHES = {"pmm": _branch("1", 1) | _branch("2", 2), "bdb": _branch("", 1)}
_CONVOLUTION = "global_reduction.0.weight"  # 1x1, where ours is linear
_ELSEWHERE = "its network is not one of ours: train one (python -m pmm.train)"
_OTHERS = (
    # name, patterns that some key matches each, what to do
    (
        "the bare weights of a model of ours",
        (r"backbone\.trunk\.", r"stages\.0\."),
        "give the checkpoint that they come from, as it is",
    ),
    ("a fast-reid checkpoint", (r"heads\.|pixel_mean$",), _ELSEWHERE),
    ("a TransReID or CLIP-ReID checkpoint", (r"base\.(blocks|cls_token|patch_embed)|image_encoder\.",), _ELSEWHERE),
    ("an OSNet checkpoint of torchreid", (r"conv2\.0\.conv2a\.",), _ELSEWHERE),
    ("a torchreid checkpoint", (r"layer4\.", r"classifier\."), _ELSEWHERE),
    (
        "a ResNet-50 of torchvision",
        (r"conv1\.weight$", r"layer3\.5\.conv3\."),
        "start a training from its bare state dict (python -m pmm.train --weights FILE)",
    ),
)


@dataclass(frozen=True, kw_only=True)
class Converted:
    """A foreign checkpoint in our terms."""

    method: str
    num_classes: int
    feature_dim: int
    epoch: int | None
    """Epochs trained, if the file says so."""
    model: dict[str, Tensor]
    """State dict of our model, float32, each tensor with its own storage."""
    tensors: int
    """Tensors that were read."""
    notes: tuple[str, ...]
    """What was not taken over as it was."""


def method_of(content: Any) -> str | None:
    """The method of ours whose weights `content`, as torch.load returns it, holds in the authors' names; else None."""
    keys = _state_dict(content)
    if not _some(keys, r"(res_part2?|global_reduction|global_softmax)\."):
        return None
    return max(_BRANCHES, key=lambda method: _count(keys, _BRANCHES[method]))


def describe(content: Any) -> str | None:
    """`what it is; what to do with it` for a checkpoint of another known code base; None for all others."""
    keys = _state_dict(content)
    for name, patterns, advice in _OTHERS:
        if all(_some(keys, pattern) for pattern in patterns):
            return f"{name}; {advice}"
    return None


def convert(content: Any, source: str | Path) -> Converted:
    """The checkpoint `content`, as torch.load returns it, in our names.

    Raises UserError naming `source`, and the keys in question, for a checkpoint of another code base; keys that are
    missing, unknown or of another shape; classifiers that disagree about the number of identities; weights that are
    no floating-point numbers, NaN or Inf.
    """
    method = method_of(content)
    if method is None:
        what = describe(content) or f"nothing known (it holds: {_held(content)}); expected {EXPECTED}"
        raise UserError(f"{source}: {what}")
    given = _state_dict(content)
    others = [key for key, value in given.items() if not isinstance(value, Tensor)]
    if others:
        raise UserError(f"{source}: no tensor at {_first(others)} of its state dict; expected {EXPECTED}")
    num_classes, feature_dim = _identities(given, method, source), _vote(given, r"global_reduction\.", 1 << 16, 512)
    expected = _expected(method, num_classes, feature_dim)
    _account(given, dict(expected.values()), method, source)
    model, notes = {}, []
    for ours, (theirs, shape) in expected.items():
        if theirs in given:
            model[ours] = _plain(given[theirs], theirs, source)
        else:  # a counter; the others are accounted for
            model[ours] = torch.zeros(shape, dtype=torch.int64)
        if theirs == _CONVOLUTION:
            model[ours] = model[ours].flatten(1)
    kinds = Counter(_short(value.dtype) for value in given.values() if value.is_floating_point())
    notes += [f"{count} tensors converted from {kind} to float32" for kind, count in kinds.items() if kind != "float32"]
    absent = len(expected) - len(given)
    if absent:
        notes.append(f"{absent} {COUNTER.removeprefix('.')} missing (torch before 0.4.1 wrote none): set to 0")
    epoch = content.get("epoch")
    return Converted(
        method=method,
        num_classes=num_classes,
        feature_dim=feature_dim,
        epoch=int(epoch) if isinstance(epoch, int | np.integer) and epoch >= 0 else None,
        model=model,
        tensors=len(given),
        notes=tuple(notes),
    )


def _state_dict(content: Any) -> dict[str, Any]:
    """The state dict in `content`, bare or below a key, without DataParallel's prefix; empty if there is none."""
    if not isinstance(content, Mapping):
        return {}
    inner = next((content[key] for key in ("state_dict", "model") if isinstance(content.get(key), Mapping)), content)
    if not all(isinstance(key, str) for key in inner):
        return {}
    prefix = "module." if inner and all(key.startswith("module.") for key in inner) else ""
    return {key.removeprefix(prefix): value for key, value in inner.items()}


def _identities(given: Mapping[str, Tensor], method: str, source: str | Path) -> int:
    """Rows of the classifiers. Raises UserError if each is whole, but they are not of one size."""
    found = {}
    for prefix in [p for p in (_SHARED | _BRANCHES[method]) if "softmax" in p]:
        weight, bias = (given.get(f"{prefix}{name}") for name in ("weight", "bias"))
        if weight is not None and bias is not None and weight.dim() == 2 and weight.shape[:1] == bias.shape:
            found[prefix.removesuffix(".")] = len(bias)
    if len(set(found.values())) > 1:
        sizes = ", ".join(f"{name} {size}" for name, size in found.items())
        raise UserError(f"{source}: its classifiers tell apart different numbers of identities ({sizes})")
    return _vote(given, r"(global_)?softmax\d?\.", 1 << 24, 1)


def _vote(given: Mapping[str, Tensor], pattern: str, most: int, default: int) -> int:
    """What most keys that match `pattern` say about their number of rows: a single misshapen one is then named."""
    rows = (len(value) for key, value in given.items() if re.match(pattern, key) and value.dim())
    counted = Counter(count for count in rows if 0 < count <= most)
    return counted.most_common(1)[0][0] if counted else default


def _expected(method: str, num_classes: int, feature_dim: int) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Key of our state dict -> the authors' key and shape."""
    config = ModelConfig(method=method, weights="none", num_classes=num_classes, feature_dim=feature_dim)
    with torch.device("meta"):
        state = build_model(Config(model=config)).state_dict()
    prefixes = {ours: theirs for theirs, ours in (_SHARED | _BRANCHES[method]).items()}
    found = {}
    for key, value in state.items():
        ours = next(prefix for prefix in prefixes if key.startswith(prefix))
        theirs = prefixes[ours] + key.removeprefix(ours)
        found[key] = theirs, (*value.shape, 1, 1) if theirs == _CONVOLUTION else tuple(value.shape)
    return found


def _account(
    given: Mapping[str, Tensor], expected: Mapping[str, tuple[int, ...]], method: str, source: str | Path
) -> None:
    """Raises UserError unless every key is there and known, in its shape; batch-norm's counters may be missing."""
    missing = [key for key in expected if key not in given and not key.endswith(COUNTER)]
    unknown = [key for key in given if key not in expected]
    shapes = [
        f"{key} {list(given[key].shape)} instead of {list(shape)}"
        for key, shape in expected.items()
        if key in given and given[key].shape != shape
    ]
    found = (("missing", missing), ("unknown", unknown), ("of another shape", shapes))
    parts = [f"{len(keys)} {what} ({_first(keys)})" for what, keys in found if keys]
    if parts:
        raise UserError(
            f"{source}: not a whole checkpoint of {CODE[method]}: {', '.join(parts)} among its keys; "
            "expected the file as their training script saves it"
        )


def _plain(value: Tensor, key: str, source: str | Path) -> Tensor:
    """`value` in a storage of its own: float32, or int64 for one of batch-norm's counters.

    Raises UserError for weights in other numbers than floating-point ones, and for NaN and Inf, naming the key.
    """
    counter = key.endswith(COUNTER)
    if value.layout != torch.strided or not (value.is_floating_point() or counter):
        raise UserError(f"{source}: {key} is {_short(value.dtype)}; expected plain floating-point weights")
    plain = value.detach().to(torch.float64 if counter else torch.float32)
    if not plain.isfinite().all():
        raise UserError(f"{source}: {key} holds NaN or Inf: the training had diverged, or the file is damaged")
    return plain.to(torch.int64 if counter else torch.float32).clone(memory_format=torch.contiguous_format)


def _held(content: Any) -> str:
    keys = list(_state_dict(content) or content) if isinstance(content, Mapping) else []
    return _first(keys) if keys else type(content).__name__


def _first(keys: Iterable[Any]) -> str:
    keys = list(map(str, keys))
    return ", ".join(keys[:SHOWN]) + (", ..." if len(keys) > SHOWN else "")


def _some(keys: Iterable[str], pattern: str) -> bool:
    return any(re.match(pattern, key) for key in keys)


def _count(keys: Iterable[str], prefixes: Iterable[str]) -> int:
    return sum(key.startswith(tuple(prefixes)) for key in keys)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
