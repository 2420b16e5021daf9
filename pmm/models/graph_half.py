"""Networks that are graphs of ATen operators, in mixed precision: products in half, what is sensitive in fp32.

Of what is neither, a value is computed in half where it is made of halves, constants and the outputs of normalisations,
which are near 1: so the maps, and the sums that run along the depth of a network, are in half from the first product
on, as in the networks of our own methods. Every sum rounds once, relative to its size, and whatever reads it to
normalise it does so in fp32. Where a statistic comes in (a mean, a norm, a power, an exponential), whose range half
may not have, fp32 lasts until the next product.
"""

from __future__ import annotations

from enum import Enum
from math import inf
from operator import getitem
from typing import Any

import torch
from torch import Tensor, fx

from pmm.models.graph_macs import operator_name, product_macs
from pmm.models.graph_passes import add_constant, attribute, fold_constants, known_shapes, remove_unused

LEAST_HALF = 0.99
"""Least share of the multiply-accumulates in half."""

_LAYOUT = frozenset((
    "alias", "cat", "channel_shuffle", "chunk", "clone", "constant_pad_nd", "contiguous", "detach", "expand",
    "expand_as", "flatten", "flip", "gather", "index", "index_select", "max_pool1d", "max_pool2d",
    "max_pool2d_with_indices", "movedim", "narrow", "pad", "permute", "pixel_shuffle", "pixel_unshuffle",
    "reflection_pad2d", "repeat", "replication_pad2d", "reshape", "roll", "select", "slice", "split",
    "split_with_sizes", "squeeze", "stack", "t", "tile", "transpose", "unbind", "unflatten", "unsqueeze", "view",
    "_unsafe_view",
))  # fmt: skip
"""Values come out as they went in, or the largest of them."""

_ELEMENTWISE = frozenset((
    "abs", "add", "avg_pool1d", "avg_pool2d", "clamp", "clamp_max", "clamp_min", "div", "elu", "gelu", "hardsigmoid",
    "hardswish", "hardtanh", "leaky_relu", "masked_fill", "maximum", "minimum", "mul", "neg", "prelu", "relu", "relu6",
    "rsub", "sigmoid", "silu", "sub", "tanh", "where",
))  # fmt: skip
"""Cheap, and in half as exact as their inputs."""

_NORMALISATIONS = frozenset((
    "_native_batch_norm_legit_no_training", "batch_norm", "group_norm", "instance_norm", "layer_norm",
    "native_group_norm", "native_layer_norm", "rms_norm", "softmax", "_softmax",
))  # fmt: skip
"""Computed in fp32, as their inputs may be large; their outputs are near 1."""


class _Kind(Enum):
    """Of the value of a node."""

    OTHER = "whole numbers, sizes, booleans"
    CONSTANT = "fp32, stored in the type of what reads it"
    HALF = "half"
    NORMAL = "fp32 in a range that half has"
    WIDE = "fp32 that stays so until the next product"


@torch.no_grad()
def cast_graph(graph: fx.GraphModule, dtype: torch.dtype, example: Tensor) -> fx.GraphModule:
    """Let `graph`, in place, compute its products in `dtype`, fp16 or bf16, with their weights stored so.

    What comes after global pooling or the choice of a token, where all is vectors per image, stays in fp32, unless
    that leaves less than 99 % of the multiply-accumulates in half; then the products there are in half too. Images and
    embeddings stay fp32. Batch-norms are to be folded before: here they compute in fp32.

    Args:
        graph: images [N, 3, H, W] float32 -> embeddings [N, D] float32.
        example: some images of its size.

    Raises ValueError for a product whose multiply-accumulates cannot be counted.
    """
    fold_constants(graph)
    pair = example[:1].expand(2, *example.shape[1:])
    with known_shapes(graph, pair):
        _Caster(graph, dtype).run()
    remove_unused(graph)
    with known_shapes(graph, pair):  # fails where types do not fit
        pass
    return graph


class _Caster:
    """One walk along a graph whose nodes have shapes for two images."""

    def __init__(self, graph: fx.GraphModule, dtype: torch.dtype) -> None:
        self.graph, self.dtype = graph, dtype
        self.nodes = list(graph.graph.nodes)
        self.kinds: dict[fx.Node, _Kind] = {}
        self.copies: dict[fx.Node, fx.Node] = {}
        self.head = self._head()
        macs = {node: count for node in self.nodes if (count := product_macs(node))}
        in_head = sum(count for node, count in macs.items() if node in self.head)
        all_in_half = in_head > (1 - LEAST_HALF) * sum(macs.values())
        self.half_products = {node for node in macs if all_in_half or node not in self.head}
        self.wanted = self._wanted_in_half()

    def run(self) -> None:
        for node in self.nodes:
            self.kinds[node] = kind = self._kind(node)
            if node.target is not getitem and (node.op == "output" or _is_tensor(node)):
                self._read(node, half=kind is _Kind.HALF)

    def _kind(self, node: fx.Node) -> _Kind:
        """Of what `node` gives, from what it reads."""
        name, sources = operator_name(node), {self.kinds[each] for each in node.all_input_nodes} - {_Kind.OTHER}
        if not _is_float32(node):
            return _Kind.OTHER
        if node.op != "call_function":
            return _Kind.CONSTANT if node.op == "get_attr" else _Kind.WIDE
        if node.target is getitem:
            return sources.pop()
        if node in self.half_products:
            return _Kind.HALF
        if node in self.head:
            return _Kind.HALF if name in _LAYOUT and sources == {_Kind.HALF} else _Kind.WIDE
        if name in _NORMALISATIONS or not sources:
            return _Kind.NORMAL
        if name not in _LAYOUT | _ELEMENTWISE or _Kind.WIDE in sources or self._is_beyond_half(node):
            return _Kind.WIDE
        return _Kind.HALF if _Kind.HALF in sources or node in self.wanted else _Kind.NORMAL

    def _head(self) -> set[fx.Node]:
        """The nodes of which nothing follows but vectors, one per image, up to the embeddings."""
        head: set[fx.Node] = set()
        for node in reversed(self.nodes):
            users = [user for user in node.users if user.op == "output" or _is_tensor(user)]
            last = all(user.op == "output" or user in head for user in users)
            if node.op == "call_function" and users and last and _is_vector(node):
                head.add(node)
        return head

    def _wanted_in_half(self) -> set[fx.Node]:
        """The nodes whose value reaches a product in half through cheap steps alone: these are then in half too."""
        wanted: set[fx.Node] = set()
        for node in reversed(self.nodes):
            cheap = operator_name(node) in _LAYOUT | _ELEMENTWISE or node.target is getitem
            if cheap and any(user in wanted or user in self.half_products for user in node.users):
                wanted.add(node)
        return wanted

    def _is_beyond_half(self, node: fx.Node) -> bool:
        """Whether a number that it reads is infinite or next to nothing in half, or may be, as a divisor."""
        if operator_name(node) not in _ELEMENTWISE:
            return False
        limits = torch.finfo(self.dtype)
        constants = [source for source in node.all_input_nodes if source.op == "get_attr"]
        scalars = [value for source in constants if (value := attribute(self.graph, source)).dim() == 0]
        numbers = [abs(float(value)) for value in (*node.args, *scalars) if isinstance(value, int | float | Tensor)]
        divisor = node.args[1] if operator_name(node) == "div" else None
        divides = isinstance(divisor, fx.Node) and divisor not in constants
        return divides or any(limits.max < number < inf or 0 < number < limits.tiny for number in numbers)

    def _read(self, node: fx.Node, *, half: bool) -> None:
        """Let `node` take each of its floats in half, or as fp32, cast or stored once for all that read it so."""

        def read(source: fx.Node) -> fx.Node:
            if self.kinds[source] is _Kind.OTHER or half == (self.kinds[source] is _Kind.HALF):
                return source
            if source not in self.copies:
                self.copies[source] = self._copy(source, torch.float32 if not half else self.dtype, before=node)
            return self.copies[source]

        node.args, node.kwargs = fx.map_arg((node.args, node.kwargs), read)

    def _copy(self, source: fx.Node, dtype: torch.dtype, *, before: fx.Node) -> fx.Node:
        if self.kinds[source] is not _Kind.CONSTANT:
            with self.graph.graph.inserting_before(before):
                return self.graph.graph.call_function(torch.ops.aten.to.dtype, (source, dtype))
        value, limits = attribute(self.graph, source), torch.finfo(dtype)
        # a mask's -1e9 would become -inf, and a row of them NaN
        value = torch.where(value.isinf(), value, value.clamp(limits.min, limits.max)).to(dtype)
        return add_constant(self.graph, f"{source.target}_half", value, before=before)


def _values(node: fx.Node) -> list[Any]:
    value: Any = node.meta.get("val")
    return list(value) if isinstance(value, list | tuple) else [value]


def _is_tensor(node: fx.Node) -> bool:
    """Whether it makes tensors."""
    return node.op == "call_function" and isinstance(_values(node)[0], Tensor)


def _is_float32(node: fx.Node) -> bool:
    """Whether the tensor that it gives, or the first of several, is."""
    first = _values(node)[0]
    return node.op != "output" and isinstance(first, Tensor) and first.dtype is torch.float32


def _is_vector(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.shape[:1] == (2,) and value.numel() == 2 * max([*value.shape[1:], 1])
