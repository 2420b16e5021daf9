"""Networks of timm as feature maps: what they must have, and what is wrong with those that lack it.

Imports timm, which is optional, where it is used.
"""

from __future__ import annotations

import contextlib
import difflib
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from pmm.config import TIMM
from pmm.utils.errors import InvalidValue, UserError, one_of, reason_of
from pmm.utils.extras import import_library

STRIDES = (16, 32)
PROBE = 512
"""Pixels of the side of an image that a network is tried on, without computing anything."""
REACH_SECONDS = 10
"""How long the server of timm's weights may take to answer at all."""
MOST_TAGS = 4
"""Weights of a network that are offered in place of others."""
LIST = 'python -c "import timm; print(*timm.list_models())"'
"""The command that lists the networks of timm."""
_PAIRWISE = ("bmm", "baddbmm", "_scaled_dot_product", "scaled_dot_product")
"""Operators of attention: products of feature vectors with each other."""


class TimmNetwork(NamedTuple):
    """A network of timm: images [N, 3, H, W] -> a list of one map [N, `channels`, H / `stride`, W / `stride`]."""

    net: nn.Module
    channels: int
    stride: int


class _Facts(NamedTuple):
    channels: int
    stride: int
    options: dict[str, Any]


def timm_network(name: str) -> TimmNetwork:
    """The network of that name in timm, randomly initialised, with stride 16 where timm can make it so.

    Raises InvalidValue, with all that is wrong, if there is no such network or its last map is not usable;
    MissingLibrary without timm.
    """
    facts = _facts(name)
    return TimmNetwork(_create(name, facts.options), facts.channels, facts.stride)


def has_imagenet_weights(name: str) -> bool:
    """Whether timm has trained weights for the network of that name. Raises as `timm_network`."""
    _facts(name)
    weights = _pretrained(name)
    return any(getattr(weights, source, None) for source in ("hf_hub_id", "url", "file"))


def imagenet_state(name: str) -> dict[str, Tensor]:
    """The trained weights that timm has for the network of that name, with the keys of `timm_network`; timm downloads
    and keeps them.

    Raises UserError if there are none, or the download fails.
    """
    if not has_imagenet_weights(name):
        hint = "give a file with --init FILE, or --weights none"
        raise UserError(f"--weights imagenet: timm has no trained weights for {TIMM}{name}", hint=hint)
    try:
        if repository := _pretrained(name).hf_hub_id:
            _reach(repository)
        return dict(_create(name, _facts(name).options, pretrained=True).state_dict())
    except Exception as error:  # what its downloads raise is the business of several libraries
        raise UserError(
            f"--weights imagenet: timm's download for {TIMM}{name} failed ({reason_of(error)})",
            hint="give a file with --init FILE, or --weights none",
        ) from error


def _reach(repository: str) -> None:
    """Raises an error of huggingface_hub if weights that are not on this machine yet cannot be downloaded from there:
    the download itself would try for a minute, with two lines for each of its attempts, and no setting shortens that.
    """
    hub = import_library("huggingface_hub")
    repository, _, revision = repository.partition("@")
    try:
        hub.snapshot_download(repository, revision=revision or None, local_files_only=True)
    except hub.errors.LocalEntryNotFoundError:
        with contextlib.suppress(hub.errors.HfHubHTTPError):  # it was reached; what it says, the download says too
            hub.model_info(repository, revision=revision or None, timeout=REACH_SECONDS)


def other_statistics(name: str, mean: tuple[float, ...], std: tuple[float, ...]) -> str:
    """A note if timm's weights for the network of that name were trained with another mean or standard deviation."""
    theirs = _pretrained(name)
    if tuple(theirs.mean) == mean and tuple(theirs.std) == std:
        return ""
    flags = f"--mean {' '.join(map(str, theirs.mean))} --std {' '.join(map(str, theirs.std))}"
    return f"timm's weights for {TIMM}{name} were trained with {flags}"


@cache
def _facts(name: str) -> _Facts:
    """Of the network of that name, tried on the meta device. Raises InvalidValue."""
    config = _known(name)
    try:
        with torch.device("meta"):
            net, options = _with_stride_16(name)
    except Exception as error:  # some have no feature maps, which timm says in many ways
        raise _unusable(name, [f"timm makes no feature maps of it ({reason_of(error)})"]) from error
    height, width = config.input_size[1:] if config.fixed_input_size else (PROBE, PROBE)
    problems = [f"it takes images of {height}x{width} only"] if config.fixed_input_size else []
    products = _Pairwise()
    try:
        with products:
            maps = net.eval()(torch.empty(1, 3, height, width, device="meta"))[-1]
    except Exception as error:
        raise _unusable(name, [*problems, f"it takes no {height}x{width} images ({reason_of(error)})"]) from error
    if products.seen:
        problems.append(f"it is not purely convolutional ({', '.join(sorted(products.seen))})")
    channels = net.feature_info.channels()[-1]
    problems += _problems_of_map(maps, channels, height, width)
    if not problems and (idle := _idle(net, maps)):
        problems.append(f"{len(idle)} of its weights do not reach the map (as {idle[0]})")
    if problems:
        raise _unusable(name, problems)
    return _Facts(channels, height // maps.shape[2], options)


def _known(name: str) -> Any:
    """`_pretrained` of the network of that name. Raises InvalidValue if timm has no such network, or no such weights
    for it."""
    timm, flag, value = import_library("timm"), "--backbone", f"{TIMM}{name}"
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), n=3)
        hint = f"did you mean {' or '.join(TIMM + each for each in near)}?" if near else f"to list them: {LIST}"
        raise InvalidValue(flag, value, "a network that timm has", hint=hint)
    try:
        return _pretrained(name)
    except RuntimeError as error:  # there is such a network, without weights of that name
        base = name.partition(".")[0]
        known = [TIMM + each for each in (base, *timm.list_pretrained(f"{base}.*")[:MOST_TAGS])]
        raise InvalidValue(flag, value, f"weights that timm has for {base}", hint=f"use {one_of(known)}") from error


def _problems_of_map(maps: Tensor, channels: int, height: int, width: int) -> list[str]:
    """What is wrong with the last map, [1, channels, h, w] of an image of that size."""
    problems = []
    if maps.dim() != 4 or maps.shape[1] != channels:
        problems.append(f"its last output is {list(maps.shape)}, and [1, {channels}, h, w] is needed")
    elif not any(maps.shape[2:] == (height // stride, width // stride) for stride in STRIDES):
        problems.append(f"its last map has {maps.shape[2]}x{maps.shape[3]} cells for {height}x{width} pixels")
    if channels % 4:
        problems.append(f"its map has {channels} channels, not a multiple of 4")
    return problems


def _unusable(name: str, problems: list[str]) -> InvalidValue:
    expected = "a convolutional network whose last map [N, C, h, w] has stride 16 or 32"
    return InvalidValue("--backbone", f"{TIMM}{name}", expected, hint=f"what is wrong: {'; '.join(problems)}")


def _with_stride_16(name: str) -> tuple[Any, dict[str, Any]]:
    """The network, and what made it; with its own stride where timm cannot change it."""
    try:
        return _create(name, {"output_stride": 16}), {"output_stride": 16}
    except (TypeError, AssertionError, NotImplementedError, ValueError):
        return _create(name, {}), {}


def _create(name: str, options: dict[str, Any], *, pretrained: bool = False) -> Any:
    timm = import_library("timm")
    return timm.create_model(name, pretrained=pretrained, features_only=True, out_indices=(-1,), **options)


def _pretrained(name: str) -> Any:
    """How timm's weights were trained: mean, std, input_size, fixed_input_size, and where they are. Raises RuntimeError
    if timm has the network but no weights of that name."""
    return import_library("timm.models").get_pretrained_cfg(name)


def _idle(net: nn.Module, maps: Tensor) -> list[str]:
    """The weights that get no gradient from `maps`."""
    named = [(key, weight) for key, weight in net.named_parameters() if weight.requires_grad]
    gradients = torch.autograd.grad(maps.sum(), [weight for _, weight in named], allow_unused=True)
    return [key for (key, _), gradient in zip(named, gradients, strict=True) if gradient is None]


class _Pairwise(TorchDispatchMode):
    """Notes the operators of attention that run within it."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name.startswith(_PAIRWISE):
            self.seen.add(name)
        return func(*args, **(kwargs or {}))
