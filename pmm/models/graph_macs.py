"""Multiply-accumulates of the products in graphs of ATen operators."""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from torch import fx

CONVOLUTIONS = ("conv1d", "conv2d", "conv3d")
TRANSPOSED_CONVOLUTIONS = ("conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
PRODUCTS = (
    *CONVOLUTIONS, *TRANSPOSED_CONVOLUTIONS, "convolution", "linear", "matmul", "mm", "bmm", "mv", "dot", "addmm",
    "addmv", "baddbmm", "scaled_dot_product_attention", "einsum",
)  # fmt: skip
_UNCOUNTED = (
    "addbmm", "bilinear", "_trilinear", "tensordot", "inner", "outer", "cdist", "chain_matmul", "linalg_multi_dot",
    "lstm", "gru", "rnn_tanh", "rnn_relu", "_convolution", "_native_multi_head_attention",
    "_transformer_encoder_layer_fwd",
)  # fmt: skip
"""Other operators that multiply matrices, and what attention becomes on one device."""


def operator_name(node: fx.Node) -> str:
    """`conv2d` of `aten.conv2d.default`; nothing for what is no ATen operator."""
    return node.target.overloadpacket.__name__ if isinstance(node.target, torch._ops.OpOverload) else ""


def product_macs(node: fx.Node) -> int | None:
    """The multiply-accumulates of `node`, or None if it is no product.

    Of one image where `meta["val"]` has a symbolic batch, else of as many as the example had.

    Raises ValueError for a product that cannot be counted.
    """
    name = operator_name(node)
    if name not in PRODUCTS:
        if name in _UNCOUNTED or name.startswith("_scaled_dot_product"):
            raise ValueError(f"{node.target} is not counted")
        return None
    output = _shape(node)
    operands = [_shape(argument) for argument in _tensors(node)]
    if name in CONVOLUTIONS or (name == "convolution" and not node.args[6]):
        return prod(output) * prod(operands[1][1:])
    if name in (*TRANSPOSED_CONVOLUTIONS, "convolution"):
        return prod(operands[0]) * prod(operands[1][1:])
    if name == "scaled_dot_product_attention":
        queries, keys, values = operands[:3]
        return prod(queries[:-1]) * keys[-2] * (queries[-1] + values[-1])
    if name == "einsum":
        return _einsum(str(node.args[0]), operands)
    summed = operands[1] if name.startswith(("addm", "badd")) else operands[0]
    return prod(output) * summed[-1]


def product_type(node: fx.Node) -> torch.dtype:
    """The type that the product `node` takes: that of its weights, or of its other factor."""
    first = 2 if operator_name(node) in ("addmm", "addmv", "baddbmm") else 1
    return _tensors(node)[first].meta["val"].dtype


def _tensors(node: fx.Node) -> list[fx.Node]:
    """What the product `node` multiplies, in its order."""
    if operator_name(node) == "einsum":
        return list(node.args[1])  # type: ignore[arg-type]
    return [argument for argument in node.args if isinstance(argument, fx.Node)]


def _shape(node: fx.Node) -> list[int]:
    return [_for_one_image(dim) for dim in node.meta["val"].shape]


def _for_one_image(dim: Any) -> int:
    """A size that follows from the batch, for a batch of 1: windows of attention are 64 per image."""
    if isinstance(dim, int):
        return dim
    expression = dim.node.expr
    return int(expression.subs(dict.fromkeys(expression.free_symbols, 1)))


def _einsum(equation: str, operands: list[list[int]]) -> int:
    """The product of the sizes of all indices. Raises ValueError unless there are two factors."""
    if len(operands) != 2:
        raise ValueError(f"aten.einsum of {equation} is not counted")
    sizes: dict[str, int] = {}
    for term, shape in zip(equation.replace(" ", "").split("->")[0].split(","), operands, strict=True):
        before, _, after = term.partition("...")
        # what "..." stands for is aligned at its end
        unnamed = [f".{index}" for index in range(len(shape) - len(before) - len(after), 0, -1)]
        for index, size in zip([*before, *unnamed, *after], shape, strict=True):
            sizes[index] = max(size, sizes.get(index, 1))
    return prod(sizes.values())
