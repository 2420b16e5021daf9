"""Int8 graphs as OpenCV 4.6 reads them. Loads no torch.

OpenCV 4.6 computes convolutions in 8 bits only as QLinearConv, takes a tensor for 8 bits if its name is NAME_quantized
and there are constants NAME_scale and NAME_zero_point, and does not dequantise constants. OpenVINO (2026.4) refuses
such a file or computes it wrongly: in QLinearConv it takes the scales of the output channels for those of the input.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import numpy as np

from pmm.export.portable_graph import remove_unread

if TYPE_CHECKING:
    import onnx


def for_opencv(proto: onnx.ModelProto) -> onnx.ModelProto:
    """A copy of `proto`, which is quantised with QuantizeLinear and DequantizeLinear, with QLinearConv and the names
    that OpenCV 4.6 expects. ONNX Runtime computes the same bits from both.

    A convolution with a result that something reads in floats stays in floats.
    """
    import onnx

    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    _name_quantized_tensors(copy.graph)
    _join_convolutions(copy.graph)
    _restore_constants(copy.graph)
    remove_unread(copy.graph)
    onnx.checker.check_model(copy, full_check=True)
    return copy


def _name_quantized_tensors(graph: onnx.GraphProto) -> None:
    from onnx import numpy_helper

    constants, new_names = {tensor.name: tensor for tensor in graph.initializer}, {}
    for node in (node for node in graph.node if node.op_type == "QuantizeLinear"):
        name = node.input[0]
        new_names[node.output[0]] = f"{name}_quantized"
        for position, role in ((1, "scale"), (2, "zero_point")):  # several tensors may share theirs
            own = f"{name}_{role}"
            if own not in constants:
                constants[own] = numpy_helper.from_array(numpy_helper.to_array(constants[node.input[position]]), own)
                graph.initializer.append(constants[own])
            node.input[position] = own
    for node in graph.node:
        for names in (node.input, node.output):
            for position, name in enumerate(names):
                names[position] = new_names.get(name, name)


def _join_convolutions(graph: onnx.GraphProto) -> None:
    from onnx import helper

    makers = {name: node for node in graph.node for name in node.output}
    readers = Counter(name for node in graph.node for name in node.input)
    readers.update(value.name for value in graph.output)
    quantizers = {node.input[0]: node for node in graph.node if node.op_type == "QuantizeLinear"}
    for node in [node for node in graph.node if node.op_type == "Conv"]:
        dequantizers = [makers.get(name) for name in node.input]
        quantizer = quantizers.get(node.output[0])
        if quantizer is None or readers[node.output[0]] > 1:
            continue
        if not all(each is not None and each.op_type == "DequantizeLinear" for each in dequantizers):
            continue
        images, weights, *bias = [each.input for each in dequantizers if each is not None]
        inputs = [*images, *weights, *quantizer.input[1:], *(each[0] for each in bias)]
        joined = helper.make_node("QLinearConv", inputs, quantizer.output, node.name)
        joined.attribute.extend(node.attribute)
        joined.metadata_props.extend(node.metadata_props)
        node.CopyFrom(joined)
        graph.node.remove(quantizer)


def _restore_constants(graph: onnx.GraphProto) -> None:
    """Constants that are dequantised become floats."""
    from onnx import helper, numpy_helper

    constants = {tensor.name: tensor for tensor in graph.initializer}
    for node in [node for node in graph.node if node.op_type == "DequantizeLinear" and node.input[0] in constants]:
        narrow, scale, zero = (numpy_helper.to_array(constants[name]) for name in node.input)
        axis = next((helper.get_attribute_value(each) for each in node.attribute if each.name == "axis"), 1)
        along = [-1 if position == axis else 1 for position in range(narrow.ndim)] if scale.ndim else []
        floats = (narrow.astype(np.float32) - zero.astype(np.float32).reshape(along)) * scale.reshape(along)
        graph.initializer.append(numpy_helper.from_array(floats, node.output[0]))
        graph.node.remove(node)
