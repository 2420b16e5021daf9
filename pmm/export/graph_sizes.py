"""Types and sizes of the tensors in an ONNX graph, for one image. Loads no torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from pmm.export.graph_folding import folded
from pmm.export.half_precision import emulated
from pmm.utils.errors import InvalidFile, UserError

if TYPE_CHECKING:
    import onnx


class ImageSizes(NamedTuple):
    """The tensors by their names, as far as they follow from the image's size."""

    types: dict[str, int]
    """As onnx.TensorProto names them."""
    shapes: dict[str, list[int]]
    """An unknown size is 0."""
    batch: int
    """Images in these shapes: 1, or the static batch of the graph."""


def image_input(proto: onnx.ModelProto) -> onnx.ValueInfoProto:
    """The graph's first input; old files list their weights among the inputs. Raises InvalidFile if it has none."""
    constants = {tensor.name for tensor in proto.graph.initializer}
    for value in proto.graph.input:
        if value.name not in constants:
            return value
    raise InvalidFile("its graph has no input", expected="one that takes images")


def image_sizes(proto: onnx.ModelProto, needed: Sequence[str] = ()) -> ImageSizes:
    """Types and shapes for one image, or for the static batch.

    Args:
        needed: tensors whose sizes matter. If onnx's inference leaves one of them open (it does not follow all that
            old exporters compute of sizes), ONNX Runtime computes the constants that sizes are made of.

    Raises InvalidFile for a graph without an input.
    """
    import onnx

    single = onnx.ModelProto()
    single.CopyFrom(proto)
    images = image_input(single).type.tensor_type.shape.dim
    batch = 1
    if images:
        batch = images[0].dim_value = images[0].dim_value or 1
    del single.graph.value_info[:]  # recorded with a symbolic batch
    for output in single.graph.output:
        output.type.tensor_type.ClearField("shape")
    sizes = _inferred(single, batch)
    if all(sizes.shapes.get(name) and all(sizes.shapes[name]) for name in needed):
        return sizes
    return _inferred(_with_computed_sizes(single), batch)


def _inferred(proto: onnx.ModelProto, batch: int) -> ImageSizes:
    import onnx

    inferred = onnx.shape_inference.infer_shapes(proto, data_prop=True)
    types, shapes = {}, {}
    for value in (*inferred.graph.value_info, *inferred.graph.output, *inferred.graph.input):
        tensor = value.type.tensor_type
        types[value.name], shapes[value.name] = tensor.elem_type, [d.dim_value for d in tensor.shape.dim]
    for tensor in inferred.graph.initializer:
        types[tensor.name], shapes[tensor.name] = tensor.data_type, list(tensor.dims)
    return ImageSizes(types, shapes, batch)


def _with_computed_sizes(proto: onnx.ModelProto) -> onnx.ModelProto:
    """`proto`, whose sizes are all fixed, with what follows from them as constants; as it is if ONNX Runtime cannot
    load it."""
    try:
        # as fp32: ONNX Runtime's CPU provider has few operators in half precision
        constants = {tensor.name: tensor for tensor in folded(emulated(proto)).graph.initializer}
    except UserError:
        return proto
    stored = {tensor.name for tensor in proto.graph.initializer}
    nodes = [node for node in proto.graph.node if constants.keys().isdisjoint(node.output)]
    del proto.graph.node[:]
    proto.graph.node.extend(nodes)
    proto.graph.initializer.extend(tensor for name, tensor in constants.items() if name not in stored)
    return proto
