"""Batch-norm folded into the convolution or linear layer before it, in fp32, before anything is cast or traced."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

from pmm.models.instance_batch_norm import InstanceBatchNorm

_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)
_Norm = nn.BatchNorm1d | nn.BatchNorm2d | InstanceBatchNorm
_Layer = nn.Conv2d | nn.Linear
TOLERANCE = 1e-3
"""Largest 2-norm of the difference that folding may make on the example, relative to the output's."""


@torch.inference_mode(False)  # whose tensors do not count what is written into them
@torch.no_grad()
def fold_batch_norms(module: nn.Module, example: Tensor) -> nn.Module:
    """Fold, in place, each batch-norm of an eval-mode module that reads the output of one convolution or linear layer.

    Which those are is seen on `example`, what the module takes; what follows within a batch-norm (timm has its
    activation there) stays in its place. Others, of sums or concatenations, remain. Raises ValueError if the folded
    module computes something else.
    """
    expected = module(example)
    names = {child: name for name, child in module.named_modules()}
    for norm, layer in _pairs(module, example).items():
        _replace(module, names[layer], _folded(layer, norm))
        _replace(module, names[norm], _remainder(norm))
    check_folded(module(example), expected)
    return module


def check_folded(found: Tensor, expected: Tensor) -> None:
    """Raises ValueError if the output `found` after folding differs from the one before by more than TOLERANCE."""
    change = float((found - expected).norm() / expected.norm().clamp(min=1e-12))
    if not change <= TOLERANCE:  # nor is NaN
        raise ValueError(f"folding the batch-norms changed the output by {change:.1%}")


def _pairs(module: nn.Module, example: Tensor) -> dict[_Norm, _Layer]:
    """Each batch-norm whose input is the very output of a layer, and that layer; both run once in the module."""
    makers: dict[int, tuple[_Layer, Tensor, int]] = {}
    pairs: dict[_Norm, _Layer] = {}
    calls: dict[nn.Module, int] = {}

    def after(child: nn.Module, inputs: Any, output: Tensor) -> None:
        calls[child] = calls.get(child, 0) + 1
        # kept, so that no other tensor has its id
        makers[id(output)] = child, output, output._version  # type: ignore[assignment]

    def before(child: nn.Module, inputs: Any) -> None:
        calls[child] = calls.get(child, 0) + 1
        layer, _, version = makers.get(id(inputs[0]), (None, None, 0))
        if layer is not None and inputs[0]._version == version:  # else an activation wrote into it
            pairs[child] = layer  # type: ignore[index]

    hooks = []
    for child in module.modules():
        if isinstance(child, nn.Conv2d | nn.Linear):
            hooks.append(child.register_forward_hook(after))
        elif isinstance(child, (*_BATCH_NORMS, InstanceBatchNorm)):
            hooks.append(child.register_forward_pre_hook(before))
    try:
        module(example)
    finally:
        for hook in hooks:
            hook.remove()
    readers = list(pairs.values())
    return {n: m for n, m in pairs.items() if calls[n] == calls[m] == 1 and readers.count(m) == 1}


def _folded(layer: _Layer, norm: _Norm) -> _Layer:
    if isinstance(norm, InstanceBatchNorm):
        return _fold_rows(layer, norm)  # type: ignore[arg-type]
    return fuse_linear_bn_eval(layer, norm) if isinstance(layer, nn.Linear) else fuse_conv_bn_eval(layer, norm)


def _fold_rows(layer: nn.Conv2d, norm: InstanceBatchNorm) -> nn.Conv2d:
    """`layer` with the batch-norm of the last channels in its last rows."""
    last = copy.deepcopy(layer)
    last.weight = nn.Parameter(layer.weight[norm.instances :])
    last.bias = None if layer.bias is None else nn.Parameter(layer.bias[norm.instances :])
    last = fuse_conv_bn_eval(last, norm.BN)
    assert last.bias is not None
    whole = copy.deepcopy(layer)
    first = torch.zeros(norm.instances) if layer.bias is None else layer.bias[: norm.instances]
    whole.weight = nn.Parameter(torch.cat([layer.weight[: norm.instances], last.weight]))
    whole.bias = nn.Parameter(torch.cat([first, last.bias]))
    return whole


def _remainder(norm: _Norm) -> nn.Module:
    """What is left of a batch-norm that was folded."""
    if isinstance(norm, InstanceBatchNorm):
        rest = copy.deepcopy(norm)
        rest.BN = nn.Identity()  # type: ignore[assignment]
        return rest
    steps = [step for step in norm.children() if not isinstance(step, nn.Identity)]  # of timm's BatchNormAct2d
    return nn.Sequential(*steps) if steps else nn.Identity()


def _replace(module: nn.Module, name: str, new: nn.Module) -> None:
    owner, _, attribute = name.rpartition(".")
    module.get_submodule(owner)._modules[attribute] = new
