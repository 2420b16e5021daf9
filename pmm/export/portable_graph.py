"""Graphs as torch's exporter writes them, in operators that every reader of ONNX knows. Loads no torch."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from pmm.export.graph_folding import opset_of
from pmm.export.half_precision import takes

if TYPE_CHECKING:
    import onnx

_POOLS = {"ReduceMean": "GlobalAveragePool", "ReduceMax": "GlobalMaxPool"}
_LEAST = 1e-18, 1e-4
"""Of norms that are divided by: a larger one is no guard against zeros, and the square of a smaller one is zero."""
_Shape = list[int | str]
"""Of a tensor; what depends on the batch is a name."""


def make_portable(proto: onnx.ModelProto) -> None:
    """Rewrite `proto`, of opset 18 or newer and with its tensors' shapes recorded, in place; it computes the same.

    - The mean and the maximum of a map over its height and width become pooling operators: reductions that take their
      axes as an input stop OpenCV 4.6, and ONNX Runtime's symbolic shape inference.
    - Division by a norm, as `torch.nn.functional.normalize` has it, becomes steps that OpenCV 4.6 knows.
    - What is repeated along an axis has constants for its sizes: torch computes them of the number of images, which
      OpenCV up to 4.13 takes for a constant.
    - A hard sigmoid that gates something else has a Relu after it, which changes no bit: OpenCV, 5.0 too, takes its
      product with whatever it may be for a hard swish, and says nothing.
    """
    shapes = _recorded_shapes(proto)
    _pool_maps(proto, shapes)
    _divide_by_norms(proto, shapes)
    _repeat_by_constants(proto, shapes)
    _part_gates(proto.graph)
    remove_unread(proto.graph)


def remove_unread(graph: onnx.GraphProto) -> None:
    """Remove nodes, constants and recorded shapes of what nothing reads."""
    read = {value.name for value in graph.output}
    for node in reversed(list(graph.node)):
        if read.isdisjoint(node.output):
            graph.node.remove(node)
        else:
            read.update(node.input)
    for tensor in [tensor for tensor in graph.initializer if tensor.name not in read]:
        graph.initializer.remove(tensor)
    made = {name for node in graph.node for name in node.output}
    for value in [value for value in graph.value_info if value.name not in made]:
        graph.value_info.remove(value)


def _pool_maps(proto: onnx.ModelProto, shapes: dict[str, _Shape]) -> None:
    from onnx import helper

    constants = _small_constants(proto)
    types = {value.name: value.type.tensor_type.elem_type for value in proto.graph.value_info}
    for index, node in reversed(list(enumerate(proto.graph.node))):
        if node.op_type not in _POOLS or len(shapes.get(node.input[0], [])) != 4 or node.input[-1] not in constants:
            continue
        pool = helper.make_node(_POOLS[node.op_type], node.input[:1], node.output, node.name)
        axes = sorted(axis % 4 for axis in constants[node.input[-1]].ravel().tolist())
        if axes != [2, 3] or not takes(pool, types.get(node.input[0], 0), opset_of(proto)):
            continue
        new = [pool]
        if not next((attribute.i for attribute in node.attribute if attribute.name == "keepdims"), 1):
            pool.output[0] += "/map"
            new.append(helper.make_node("Flatten", pool.output, node.output, f"{node.name}/flat", axis=1))
        _replace(proto.graph, index, new)


def _divide_by_norms(proto: onnx.ModelProto, shapes: dict[str, _Shape]) -> None:
    """Vectors [N, D] over max(norm, least) become the same over sqrt(D * mean of squares + least * least), the mean by
    pooling. Zeros stay zeros, and of norms a thousand times `least` or more no bit differs by that."""
    from onnx import helper

    constants, makers = _small_constants(proto), {name: node for node in proto.graph.node for name in node.output}
    for index, node in reversed(list(enumerate(proto.graph.node))):
        divisor = makers.get(node.input[-1]) if node.op_type == "Div" else None
        if divisor is not None and divisor.op_type == "Expand":
            divisor = makers.get(divisor.input[0])
        if divisor is None or divisor.op_type != "Clip" or len(divisor.input) != 2:
            continue
        norm, least = makers.get(divisor.input[0]), constants.get(divisor.input[1])
        if norm is None or norm.op_type != "ReduceL2" or norm.input[0] != node.input[0] or least is None:
            continue
        images, dim = shapes.get(node.input[0], ["", ""])[-2:]
        if shapes.get(norm.output[0]) != [images, 1] or not isinstance(dim, int) or least.dtype != np.float32:
            continue
        if not all(_LEAST[0] <= each <= _LEAST[1] for each in least.ravel()):
            continue
        name, last, new = node.output[0], node.input[0], []
        steps: list[tuple[str, list[str], dict[str, Any]]] = [
            ("Mul", [last], {}),
            ("Reshape", [_add_constant(proto, f"{name}/as_map", np.array([-1, 1, 1, dim]))], {}),
            ("GlobalAveragePool", [], {}),
            ("Mul", [_add_constant(proto, f"{name}/dim", np.array(dim, np.float32))], {}),
            ("Add", [_add_constant(proto, f"{name}/least", np.square(least))], {}),
            ("Sqrt", [], {}),
            # OpenCV 4.6 divides by what has the same shape alone, and 4.10 to 4.14 expand for one batch size alone;
            # of a Resize ONNX Runtime's symbolic shape inference does not know that it leaves the batch
            (
                "ConvTranspose",
                [_add_constant(proto, f"{name}/ones", np.ones((1, 1, 1, dim), np.float32))],
                {"kernel_shape": [1, dim]},
            ),
            ("Flatten", [], {"axis": 1}),
        ]
        for step, (operator, others, attributes) in enumerate(steps):
            output = f"{name}/norm{step}"
            new.append(helper.make_node(operator, [last, *others], [output], output, **attributes))
            last = output
        new.append(helper.make_node("Div", [node.input[0], last], node.output, node.name))
        _replace(proto.graph, index, new)


def _repeat_by_constants(proto: onnx.ModelProto, shapes: dict[str, _Shape]) -> None:
    constants = _small_constants(proto)
    for node in (node for node in proto.graph.node if node.op_type == "Expand" and node.input[1] not in constants):
        before, after = (shapes.get(name, []) for name in (node.input[0], node.output[0]))
        if len(after) < len(before) or 0 in after:  # not recorded
            continue
        added: _Shape = [1] * (len(after) - len(before))
        # a size of 1 leaves the one that the tensor has
        sizes = [1 if size == same else size for size, same in zip(after, added + before, strict=True)]
        if sizes and all(isinstance(size, int) for size in sizes):
            node.input[1] = _add_constant(proto, f"{node.output[0]}/sizes", np.array(sizes))


def _part_gates(graph: onnx.GraphProto) -> None:
    from onnx import helper

    factors = [{*node.input} for node in graph.node if node.op_type == "Mul"]
    for index, node in reversed(list(enumerate(graph.node))):
        if node.op_type == "HardSigmoid" and any(
            node.output[0] in both and node.input[0] not in both for both in factors
        ):
            gate = node.output[0]
            node.output[0] = f"{gate}/gate"
            relu = helper.make_node("Relu", node.output, [gate], gate)
            relu.metadata_props.extend(node.metadata_props)
            graph.node.insert(index + 1, relu)


def _recorded_shapes(proto: onnx.ModelProto) -> dict[str, _Shape]:
    values = (*proto.graph.value_info, *proto.graph.input, *proto.graph.output)
    return {value.name: [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
            for value in values}  # fmt: skip


def _small_constants(proto: onnx.ModelProto) -> dict[str, npt.NDArray[Any]]:
    from onnx import numpy_helper

    return {tensor.name: numpy_helper.to_array(tensor) for tensor in proto.graph.initializer if prod(tensor.dims) <= 8}


def _add_constant(proto: onnx.ModelProto, name: str, value: npt.NDArray[Any]) -> str:
    from onnx import numpy_helper

    proto.graph.initializer.append(numpy_helper.from_array(value, name))
    return name


def _replace(graph: onnx.GraphProto, index: int, nodes: Sequence[onnx.NodeProto]) -> None:
    """Put `nodes` where the one at `index` is; they come from the same module."""
    for node in nodes:
        node.metadata_props.extend(graph.node[index].metadata_props)
    del graph.node[index]
    for node in reversed(nodes):
        graph.node.insert(index, node)
