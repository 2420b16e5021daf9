"""The layers of an ONNX graph that 8 bits make faster, and what they are called. Loads no torch."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Sequence
from math import prod
from typing import TYPE_CHECKING

from pmm.export.graph_sizes import image_sizes
from pmm.export.half_precision import pools

if TYPE_CHECKING:
    import onnx

LINEAR = ("MatMul", "Gemm")
LAYERS = ("Conv", *LINEAR)
"""Operators with weights, whose products are in 8 bits."""

_KEEPS_SIZE = ("Conv", "Relu", "Clip", "Sigmoid", "HardSigmoid", "HardSwish", "Mul", "Div", "Add", "Flatten")
"""Operators of squeeze and excitation, which make one value per channel of one value per channel."""

_NUMBERED = re.compile(r"(val_|onnx::\w+_|t_|tensor_|v_?)?\d*")
"""Names that exporters give to weights of which they made others: transposed, or with a batch-norm folded in."""

_IN_GRAPH = re.compile(r"trunk\.network\.graph\.(\w+?)(_weight|_bias)?(_folded)?")
"""Weights and biases of an adopted network of torch, with the name that they have in its graph."""


def quantisable(proto: onnx.ModelProto, operators: Collection[str]) -> list[onnx.NodeProto]:
    """The nodes of `operators` that 8 bits make faster.

    Of linear layers those with constant weights [K, N] that many positions of an image go through: no products of two
    computed tensors (attention), and no heads on pooled vectors, or on a class token. Not the layers of squeeze and
    excitation, which have hardly any multiplications, and of sums only those of a convolution's output with another
    map. With Mul among `operators`, also sums of several maps that were weighed by channel, and the weighing.
    """
    convolved = {name for node in proto.graph.node if node.op_type == "Conv" for name in node.output}
    constants = {tensor.name: len(tensor.dims) for tensor in proto.graph.initializer}
    linear = [node for node in proto.graph.node if node.op_type in LINEAR and node.op_type in operators]
    positions = _positions(proto, [node.input[0] for node in linear]) if linear else {}
    vectors: set[str] = set()
    """What is one value per channel, not a map."""
    found = []
    weighed: dict[str, onnx.NodeProto] = {}
    """Maps times one value per channel, and sums of these alone, by their names."""
    for node in proto.graph.node:
        computed = {name for name in node.input if name} - constants.keys()
        if pools(node) or (node.op_type in _KEEPS_SIZE and computed and computed <= vectors):
            vectors |= set(node.output)
        elif (node.op_type == "Mul" and computed & vectors) or (
            node.op_type == "Add" and weighed.keys() >= {*node.input}
        ):
            weighed[node.output[0]] = node
        if node.op_type not in operators or node.op_type == "Mul" or not vectors.isdisjoint(node.input):
            continue
        if node.op_type == "Add" and (constants.keys() & set(node.input) or convolved.isdisjoint(node.input)):
            continue
        if node.op_type in LINEAR and not (
            node.input[0] in computed
            and constants.get(node.input[1]) == 2
            and positions.get(node.input[0], 2) > 1
            and not any(attribute.name == "transA" and attribute.i for attribute in node.attribute)
        ):
            continue
        found.append(node)
    return [*found, *_summed(proto, weighed)] if "Mul" in operators else found


def _summed(proto: onnx.ModelProto, weighed: dict[str, onnx.NodeProto]) -> list[onnx.NodeProto]:
    """Of the maps `weighed` those that only sums of such maps read, and these sums: the streams of OSNet. Left in
    floats, they would part the convolutions before them from those after."""
    sums = {name for name, node in weighed.items() if node.op_type == "Add"}
    elsewhere = {name for node in proto.graph.node if node.output[0] not in sums for name in node.input}
    return [node for name, node in weighed.items() if name in sums or name not in elsewhere]


def _positions(proto: onnx.ModelProto, names: Sequence[str]) -> dict[str, int]:
    """How many feature vectors of one image tensors [..., C] hold, `names` among them, where sizes are known."""
    sizes = image_sizes(proto, names)
    return {name: prod(shape[:-1]) // sizes.batch for name, shape in sizes.shapes.items() if shape and all(shape)}


def main_inputs(proto: onnx.ModelProto) -> dict[str, str]:
    """The residual Adds by name, and of each the input that is not the shortcut: the output of a convolution whose
    input nothing else reads (a shortcut's convolution reads where the ways part).

    NVIDIA's advice on placing Q/DQ (TensorRT's documentation, "Explicit Quantization"; modelopt.onnx does the same) is
    to quantise the shortcut only: the convolution, the Add and the Relu then become one kernel with 8 bits in and out,
    while a pair on the main input parts the Add from its convolution.
    """
    makers = {name: node for node in proto.graph.node for name in node.output}
    readers = Counter(name for node in proto.graph.node for name in node.input)
    constants = {tensor.name for tensor in proto.graph.initializer}
    found: dict[str, str] = {}
    for add in (node for node in proto.graph.node if node.op_type == "Add" and constants.isdisjoint(node.input)):
        for name in add.input:
            maker = makers.get(name)
            if maker is not None and maker.op_type == "Conv" and readers[maker.input[0]] == 1:
                found.setdefault(add.name, name)
    return found


def layer_names(proto: onnx.ModelProto) -> dict[str, str]:
    """Names of the layers by their weights: layers that share weights have one name, and are one layer.

    The name of the weights in the user's network or, where the exporter replaced it by a number, that of the bias, else
    that of the first node that reads them.
    """
    constants = {tensor.name for tensor in proto.graph.initializer}
    readers = Counter(name for node in proto.graph.node for name in node.input)
    added = {name: node for node in proto.graph.node if node.op_type == "Add" for name in node.input}
    names: dict[str, str] = {}
    for node in proto.graph.node:
        if node.op_type not in LAYERS or node.input[1] in names:
            continue
        biases = list(node.input[2:])
        if node.op_type == "MatMul" and node.output[0] in added:
            biases += [name for name in added[node.output[0]].input if name in constants]
        biases = [name for name in biases if readers[name] == 1]  # equal ones become one, of a name of one of them
        scope = node.name.removesuffix(f"/{node.op_type}").strip("/").replace("/", ".")
        scope = re.sub(r"(\w+)\.(?=\1\.)", "", scope)  # /blocks/blocks.0/fc1 is blocks.0.fc1
        candidates = (*map(_layer, (node.input[1], *biases)), scope)
        readable = (name for name in candidates if not _NUMBERED.fullmatch(name))
        name = next((name for name in readable if name not in names.values()), node.input[1])
        names[node.input[1]] = name
    return names


def _layer(parameter: str) -> str:
    """What the layer of a weight or bias is called."""
    in_graph = _IN_GRAPH.fullmatch(parameter)
    return in_graph[1] if in_graph else parameter.removesuffix(".weight").removesuffix(".bias")


def with_unique_names(proto: onnx.ModelProto) -> onnx.ModelProto:
    """`proto`, or a copy in which every node has a name of its own: quantizers tell nodes apart by their names."""
    import onnx

    names = Counter(node.name for node in proto.graph.node)
    if all(name and count == 1 for name, count in names.items()):
        return proto
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    for index, node in enumerate(copy.graph.node):
        if not node.name or names[node.name] > 1:
            node.name = f"{node.name or node.op_type}_{index}"
            while node.name in names:
                node.name += "_"
            names[node.name] += 1
    return copy


def give_own_parameters(proto: onnx.ModelProto) -> None:
    """Give each layer of `proto` that shares its weights or bias copies of its own: ONNX Runtime converts those of
    quantised layers under the names that they have, and refuses the file where one comes twice."""
    stored = {tensor.name: tensor for tensor in proto.graph.initializer}
    seen: set[str] = set()
    for node in (node for node in proto.graph.node if node.op_type in LAYERS):
        for position, name in enumerate(node.input[1:], 1):
            if name in seen and name in stored:
                own = proto.graph.initializer.add()
                own.CopyFrom(stored[name])
                own.name = node.input[position] = f"{name}_of_{node.name}"
            seen.add(name)
