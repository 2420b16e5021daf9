"""Weights stored in 8 bits for layers that compute in floats: a quarter of the size, and the products stay in floats.
Loads no torch."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from math import prod
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from pmm.export.int8_layers import LAYERS, LINEAR

if TYPE_CHECKING:
    import onnx

LEAST = 4096
"""Weights of a layer from which on it is worth the operators that restore them."""
LARGEST = 127
"""Of the integers: symmetric, as TensorRT demands."""


def float_layers(proto: onnx.ModelProto, quantised: Collection[str]) -> list[onnx.NodeProto]:
    """The layers with constant weights that are not among the nodes `quantised`: heads, and what else works on pooled
    vectors. Weights are [N, K, ...], of linear layers [K, N] or, transposed, [N, K]."""
    import onnx

    large = {
        tensor.name: len(tensor.dims)
        for tensor in proto.graph.initializer
        if tensor.data_type == onnx.TensorProto.FLOAT and prod(tensor.dims) >= LEAST
    }
    layers = (node for node in proto.graph.node if node.op_type in LAYERS and node.input[1] in large)
    return [
        node
        for node in layers
        if node.name not in quantised and (node.op_type not in LINEAR or large[node.input[1]] == 2)
    ]


def store_in_8_bits(graph: onnx.GraphProto, nodes: Collection[str], *, dequantize: bool) -> None:
    """Replace the weights of the layers `nodes` by integers with a scale per output channel, in place, and
    restore them in front of the layers.

    Args:
        dequantize: with DequantizeLinear, which TensorRT wants, and keeps in its engines. Else with Cast and Mul, which
            ONNX Runtime computes once, on loading: a DequantizeLinear it computes in each run, or it rounds what the
            layer reads too (MatMulNBits).
    """
    from onnx import TensorProto, helper, numpy_helper

    stored, restoring, done = {tensor.name: tensor for tensor in graph.initializer}, [], set()
    for node in (node for node in graph.node if node.name in nodes):
        name, axis = node.input[1], _output_axis(node)
        restored = f"{name}_restored_{axis}"
        node.input[1] = restored
        if restored in done:
            continue
        done.add(restored)
        integers, scales = _in_8_bits(numpy_helper.to_array(stored[name]), axis)
        scales = scales.reshape(-1) if dequantize else scales
        narrow, scale = f"{name}_8_bits_{axis}", f"{name}_scale_{axis}"
        graph.initializer.append(numpy_helper.from_array(integers, narrow))
        graph.initializer.append(numpy_helper.from_array(scales, scale))
        if dequantize:
            # without a zero point ONNX Runtime adds one of another shape, and refuses it
            zero = f"{name}_zero_point_{axis}"
            graph.initializer.append(numpy_helper.from_array(np.zeros_like(scales, np.int8), zero))
            made = [helper.make_node("DequantizeLinear", [narrow, scale, zero], [restored], restored, axis=axis)]
        else:
            wide = f"{narrow}_wide"
            made = [
                helper.make_node("Cast", [narrow], [wide], wide, to=TensorProto.FLOAT),
                helper.make_node("Mul", [wide, scale], [restored], restored),
            ]
        restoring += made
    _put_first(graph, restoring)


def _output_axis(node: onnx.NodeProto) -> int:
    """Of a layer's weights."""
    transposed = any(attribute.name == "transB" and attribute.i for attribute in node.attribute)
    return 0 if node.op_type == "Conv" or transposed else 1


def _in_8_bits(weights: npt.NDArray[np.float32], axis: int) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.float32]]:
    """Weights with N channels along `axis` as integers, and scales that broadcast to them."""
    peaks = np.abs(weights).max(tuple(other for other in range(weights.ndim) if other != axis), keepdims=True)
    scales = np.maximum(peaks / LARGEST, np.finfo(np.float32).tiny)  # of a channel of zeros too
    return np.rint(weights / scales).astype(np.int8), scales


def _put_first(graph: onnx.GraphProto, nodes: Sequence[onnx.NodeProto]) -> None:
    following = list(graph.node)
    del graph.node[:]
    graph.node.extend([*nodes, *following])
