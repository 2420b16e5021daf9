"""Checkpoints of the PMM authors' code and of BDB's -> checkpoints of pmm, weight by weight."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pmm.artifacts.adopted_file import AS_IT_IS, is_adopted_network
from pmm.artifacts.checkpoint import FORMAT, KEYS, is_checkpoint, save, versions
from pmm.artifacts.known_checkpoints import BRANCHES, CODE, SHARED, describe_known, known_method, state_dict_of
from pmm.artifacts.torch_file import COUNTER, as_float32, first_names, read_torch_file
from pmm.config import Config, DataConfig, ModelConfig
from pmm.data.crop_statistics import CropStatistics
from pmm.models.registry import build_model
from pmm.presets import preset
from pmm.utils.errors import InvalidFile
from pmm.utils.files import sha256

EXPECTED = "a checkpoint of the PMM authors' code or of BDB's"

_CONVOLUTION = "global_reduction.0.weight"  # 1x1, where pmm's is linear


@dataclass(frozen=True, kw_only=True)
class ConvertedCheckpoint:
    """A checkpoint of other code by pmm's names."""

    method: str
    num_classes: int
    feature_dim: int
    epoch: int | None
    """Epochs trained, if the file says so."""
    model: dict[str, Tensor]
    """State dict of pmm's model, float32, each tensor with its own storage."""
    tensors: int
    """Tensors that were read."""
    notes: tuple[str, ...]
    """What was changed."""


def import_checkpoint(
    source: Path,
    out: Path,
    data: DataConfig,
    *,
    identities: int | None = None,
    statistics: CropStatistics | None = None,
) -> str:
    """Write the checkpoint `source` of the PMM authors' code, or of BDB's, to `out`, as one of pmm's.

    Args:
        source: what their training script saved, or the bare state dict.
        out: file to write.
        data: crop size and data set of the new configuration; the rest is preset paper's, and the file's shapes.
        identities: that the data set has for training, if it is at hand.
        statistics: of its training crops, likewise; left out where the data set has other identities.

    Returns:
        One line: what was read.

    Raises:
        InvalidFile: another kind of file, or weights that are not exactly those of the network (`convert`).
        UserError: crops too small for it.
    """
    content = read_torch_file(source, EXPECTED)
    if is_adopted_network(content):
        raise InvalidFile("it is an adopted network: there is nothing to import", path=source, hint=AS_IT_IS)
    if is_checkpoint(content):
        problem = "it is already a PMM checkpoint: there is nothing to import"
        raise InvalidFile(problem, path=source, hint="every command takes it as it is")
    converted = convert(content, source)
    base = preset("paper")
    model = dataclasses.replace(
        base.model,
        method=converted.method,
        weights="none",
        num_classes=converted.num_classes,
        feature_dim=converted.feature_dim,
    )
    config = dataclasses.replace(base, data=data, model=model)
    with torch.device("meta"):
        build_model(config)  # a crop size that the network does not take would be refused by every later command
    code, classes = CODE[converted.method], converted.num_classes
    checkpoint = {
        **dict.fromkeys(KEYS),
        "format": FORMAT,
        "model": converted.model,
        "config": config.to_dict(),
        "epoch": converted.epoch or 0,
        "best": -1.0,
        "crop_statistics": dataclasses.asdict(statistics) if statistics and identities == classes else None,
        # not trained by these versions: nothing may later say so
        "versions": {**versions(), "pmm kernels": f"none, imported from {code}", "imported": sha256(source)},
    }
    save(out, checkpoint)
    epoch = "an unknown epoch" if converted.epoch is None else f"epoch {converted.epoch}"
    line = f"{source}: {converted.method} of {code}, {classes} identities, {epoch}, {converted.tensors} tensors"
    notes = converted.notes
    if identities not in (None, classes):
        notes = (*notes, f"the data set has {identities} identities for training: it was trained on another")
    return "; ".join((line, *notes))


def convert(content: Any, source: str | Path) -> ConvertedCheckpoint:
    """The checkpoint `content`, as torch.load returns it, by pmm's names.

    Raises InvalidFile of the path `source`, naming the keys in question, for a checkpoint of another code base; keys
    that are missing, unknown or of another shape; classifiers that disagree about the number of identities; weights
    that are no floating-point numbers, NaN or Inf.
    """
    method = known_method(content)
    if method is None:
        if foreign := describe_known(content, source):
            raise InvalidFile(foreign, path=source)
        raise InvalidFile(f"unknown checkpoint (it holds: {_summary(content)})", path=source, expected=EXPECTED)
    state = state_dict_of(content)
    if no_tensors := [key for key, value in state.items() if not isinstance(value, Tensor)]:
        raise InvalidFile(f"no tensor at {first_names(no_tensors)} of its state dict", path=source, expected=EXPECTED)
    num_classes, feature_dim = _identities(state, method, source), _vote(state, r"global_reduction\.", 1 << 16, 512)
    expected = _expected(method, num_classes, feature_dim)
    _check_keys(state, dict(expected.values()), method, source)
    model, notes = {}, []
    for key, (source_key, shape) in expected.items():
        if source_key in state:
            model[key] = as_float32(state[source_key], source_key, source).clone(memory_format=torch.contiguous_format)
        else:  # a counter; all other keys are present
            model[key] = torch.zeros(shape, dtype=torch.int64)
        if source_key == _CONVOLUTION:
            model[key] = model[key].flatten(1)
    kinds = Counter(_short(value.dtype) for value in state.values() if value.is_floating_point())
    notes += [f"{count} tensors converted from {kind} to float32" for kind, count in kinds.items() if kind != "float32"]
    absent = len(expected) - len(state)
    if absent:
        notes.append(f"{absent} {COUNTER.removeprefix('.')} missing (torch before 0.4.1 wrote none): set to 0")
    epoch = content.get("epoch")
    return ConvertedCheckpoint(
        method=method,
        num_classes=num_classes,
        feature_dim=feature_dim,
        epoch=int(epoch) if isinstance(epoch, int | np.integer) and epoch >= 0 else None,
        model=model,
        tensors=len(state),
        notes=tuple(notes),
    )


def _identities(state: Mapping[str, Tensor], method: str, source: str | Path) -> int:
    """The number of identities that the classifiers have. Raises InvalidFile if each is whole, but they are not of one
    size."""
    sizes = {}
    for prefix in [p for p in (SHARED | BRANCHES[method]) if "softmax" in p]:
        weight, bias = (state.get(f"{prefix}{name}") for name in ("weight", "bias"))
        if weight is not None and bias is not None and weight.dim() == 2 and weight.shape[:1] == bias.shape:
            sizes[prefix.removesuffix(".")] = len(bias)
    if len(set(sizes.values())) > 1:
        listed = ", ".join(f"{name} {size}" for name, size in sizes.items())
        raise InvalidFile(f"its classifiers have different numbers of identities ({listed})", path=source)
    return _vote(state, r"(global_)?softmax\d?\.", 1 << 24, 1)


def _vote(state: Mapping[str, Tensor], pattern: str, most: int, default: int) -> int:
    """The number of rows of most keys that match `pattern`: a single misshapen one is then named."""
    rows = (len(value) for key, value in state.items() if re.match(pattern, key) and value.dim())
    counted = Counter(count for count in rows if 0 < count <= most)
    return counted.most_common(1)[0][0] if counted else default


def _expected(method: str, num_classes: int, feature_dim: int) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Key of pmm's state dict -> the authors' key and shape."""
    config = ModelConfig(method=method, weights="none", num_classes=num_classes, feature_dim=feature_dim)
    with torch.device("meta"):
        state = build_model(Config(model=config)).state_dict()
    prefixes = {prefix: source_prefix for source_prefix, prefix in (SHARED | BRANCHES[method]).items()}
    source_keys = {}
    for key, value in state.items():
        prefix = next(prefix for prefix in prefixes if key.startswith(prefix))
        source_key = prefixes[prefix] + key.removeprefix(prefix)
        source_keys[key] = source_key, (*value.shape, 1, 1) if source_key == _CONVOLUTION else tuple(value.shape)
    return source_keys


def _check_keys(
    state: Mapping[str, Tensor], expected: Mapping[str, tuple[int, ...]], method: str, source: str | Path
) -> None:
    """Raises InvalidFile unless every key is present and known, in its shape; batch-norm's counters may be missing."""
    missing = [key for key in expected if key not in state and not key.endswith(COUNTER)]
    unknown = [key for key in state if key not in expected]
    shapes = [
        f"{key} {list(state[key].shape)} instead of {list(shape)}"
        for key, shape in expected.items()
        if key in state and state[key].shape != shape
    ]
    problems = (("missing", missing), ("unknown", unknown), ("of another shape", shapes))
    parts = [f"{len(keys)} {problem} ({first_names(keys)})" for problem, keys in problems if keys]
    if parts:
        raise InvalidFile(
            f"not a whole checkpoint of {CODE[method]}: {', '.join(parts)} among its keys",
            path=source,
            expected="the file as their training script saves it",
        )


def _summary(content: Any) -> str:
    keys = list(state_dict_of(content) or content) if isinstance(content, Mapping) else []
    return first_names(keys) if keys else type(content).__name__


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
