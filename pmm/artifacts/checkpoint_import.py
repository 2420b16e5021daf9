"""Checkpoints of the PMM authors' code and of BDB's -> checkpoints of ours, weight by weight."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pmm.artifacts.checkpoint import FORMAT, KEYS, save, versions
from pmm.artifacts.known_checkpoints import BRANCHES, CODE, SHARED, describe, method_of, state_dict_of
from pmm.artifacts.torch_file import read_torch_file
from pmm.config import Config, DataConfig, ModelConfig, preset
from pmm.models.registry import build_model
from pmm.utils.errors import UserError
from pmm.utils.files import sha256

EXPECTED = "a checkpoint of the PMM authors' code or of BDB's"
COUNTER = ".num_batches_tracked"
SHOWN = 3

_CONVOLUTION = "global_reduction.0.weight"  # 1x1, where ours is linear


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


def import_checkpoint(source: Path, out: Path, data: DataConfig, *, identities: int | None = None) -> str:
    """Write the checkpoint `source` of the PMM authors' code, or of BDB's, as one of ours to `out`.

    Args:
        source: what their training script saved, or the bare state dict.
        out: file to write.
        data: crop size and data set of the new configuration; the rest is preset paper's, and the file's shapes.
        identities: that the data set has for training, if it is at hand.

    Returns:
        One line: what was read.

    Raises:
        UserError: another kind of file, weights that are not exactly those of the network (`convert`), or
            crops too small for it.
    """
    content = read_torch_file(source, EXPECTED)
    if isinstance(content, dict) and str(content.get("format", "")).startswith("pmm-checkpoint"):
        raise UserError(f"{source}: a checkpoint of ours, nothing to import; every command takes it as it is")
    found = convert(content, source)
    base = preset("paper")
    model = dataclasses.replace(
        base.model,
        method=found.method,
        weights="none",
        num_classes=found.num_classes,
        feature_dim=found.feature_dim,
    )
    config = dataclasses.replace(base, data=data, model=model)
    with torch.device("meta"):
        build_model(config)  # a crop size that the network does not take would be refused by every later command
    code = CODE[found.method]
    checkpoint = {
        **dict.fromkeys(KEYS),
        "format": FORMAT,
        "model": found.model,
        "config": config.to_dict(),
        "epoch": found.epoch or 0,
        "best": -1.0,
        # ours did not train it: nothing may later say so
        "versions": {**versions(), "pmm kernels": f"none, imported from {code}", "imported": sha256(source)},
    }
    save(out, checkpoint)
    epoch = "an unknown epoch" if found.epoch is None else f"epoch {found.epoch}"
    line = f"{source}: {found.method} of {code}, {found.num_classes} identities, {epoch}, {found.tensors} tensors"
    notes = found.notes
    if identities not in (None, found.num_classes):
        notes = (*notes, f"the data set has {identities} identities for training: it was trained on another")
    return "; ".join((line, *notes))


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
    given = state_dict_of(content)
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


def _identities(given: Mapping[str, Tensor], method: str, source: str | Path) -> int:
    """Rows of the classifiers. Raises UserError if each is whole, but they are not of one size."""
    found = {}
    for prefix in [p for p in (SHARED | BRANCHES[method]) if "softmax" in p]:
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
    prefixes = {ours: theirs for theirs, ours in (SHARED | BRANCHES[method]).items()}
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
    keys = list(state_dict_of(content) or content) if isinstance(content, Mapping) else []
    return _first(keys) if keys else type(content).__name__


def _first(keys: Iterable[Any]) -> str:
    keys = list(map(str, keys))
    return ", ".join(keys[:SHOWN]) + (", ..." if len(keys) > SHOWN else "")


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
