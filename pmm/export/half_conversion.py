"""Converts an fp32 graph of another program to half precision, and keeps what rounding harms in fp32. Loads no torch.

As automatic mixed precision does it: products and the cheap steps between them in half, what sums up or divides by a
sum (normalisations, reductions) in fp32.
"""

from __future__ import annotations

from collections.abc import Collection
from math import prod
from typing import TYPE_CHECKING, Literal

from pmm.export.graph_folding import check_flat, folded, opset_of, with_opset
from pmm.export.graph_sizes import ImageSizes, image_input, image_sizes
from pmm.export.half_precision import narrowed, pools, takes, tensor_types
from pmm.export.int8_layers import LAYERS, layer_names
from pmm.export.options import MIN_OPSET
from pmm.export.precision import PRODUCTS
from pmm.utils.errors import InvalidFile

if TYPE_CHECKING:
    import onnx

HalfType = Literal["fp16", "bf16"]
TYPES: dict[HalfType, int] = {"fp16": 10, "bf16": 16}
"""As onnx.TensorProto numbers them."""

_BETWEEN = frozenset(
    (
        # activations
        *("Relu", "LeakyRelu", "PRelu", "Clip", "Elu", "Selu", "Celu", "Sigmoid", "HardSigmoid", "HardSwish", "Tanh"),
        *("Gelu", "Erf", "Mish", "Swish", "Softplus", "Softsign", "Softmax"),
        # arithmetic
        *("Add", "Sub", "Mul", "Div", "Neg", "Abs", "Min", "Max", "Where"),
        # layout
        *("Reshape", "Transpose", "Flatten", "Squeeze", "Unsqueeze", "Concat", "Split", "Slice", "Gather", "Expand"),
        *("Tile", "Pad", "Identity", "DepthToSpace", "SpaceToDepth", "Resize"),
        # windows
        *("MaxPool", "AveragePool"),
    )
)
"""Steps that half precision harms no more than the products around them."""
_SIZES = ("Shape", "Size")
"""They read a tensor of any type, and give its sizes."""


def to_half(proto: onnx.ModelProto, precision: HalfType, keep: Collection[str] = ()) -> onnx.ModelProto:
    """A copy of the graph `proto` with its products in fp16 or bf16; inputs and outputs stay fp32.

    Batch-norm is folded first. In fp32 stay normalisations, reductions, powers and logarithms, and all that works on
    pooled vectors (the heads), but not the vectors that weigh a map's channels. Of a graph that is quantised, whose
    batch-norm was folded before, it is the steps that are not in 8 bits.

    Args:
        keep: names of layers that stay in fp32 too, with their weights (see `layers_in_half`).

    Raises:
        InvalidFile: the graph is not in fp32, branches, loops, or cannot be written in the opset that the type needs.
    """
    return narrow_products(prepared(proto, precision), precision, keep)


def prepared(proto: onnx.ModelProto, precision: HalfType) -> onnx.ModelProto:
    """What `to_half` does first, whatever is kept in fp32: the graph folded and checked, in the opset of the type."""
    quantised = any(node.op_type == "QuantizeLinear" for node in proto.graph.node)
    if quantised:
        check_flat(proto)
    else:
        proto = folded(proto)
    if quantised or precision == "bf16":
        proto = with_opset(proto, MIN_OPSET["int8-fp16" if precision == "fp16" else precision])
    image_input(proto)
    _check_fp32(proto)
    return proto


def narrow_products(
    proto: onnx.ModelProto, precision: HalfType, keep: Collection[str] = (), *, heads: bool = False
) -> onnx.ModelProto:
    """What `to_half` does then; `heads`: also the products of pooled vectors are in half."""
    half = TYPES[precision]
    return narrowed(proto, _chosen(proto, half, keep, heads=heads), half)


def layers_in_half(
    proto: onnx.ModelProto, precision: HalfType, *, heads: bool = False
) -> dict[str, list[onnx.NodeProto]]:
    """The layers of a graph of `prepared` whose products `narrow_products` puts in half precision, by the names that
    int8's have, in the graph's order."""
    chosen, names = _chosen(proto, TYPES[precision], heads=heads), layer_names(proto)
    layers: dict[str, list[onnx.NodeProto]] = {}
    for index, node in enumerate(proto.graph.node):
        if index in chosen and node.op_type in LAYERS:
            layers.setdefault(names[node.input[1]], []).append(node)
    return layers


def _check_fp32(proto: onnx.ModelProto) -> None:
    import onnx

    names: dict[int, str] = {onnx.TensorProto.FLOAT16: "fp16", onnx.TensorProto.BFLOAT16: "bf16"}
    for name, kind in tensor_types(proto).items():
        if kind in names:
            raise InvalidFile(
                f"{name} is {names[kind]} in it", expected="a graph in fp32", hint="export the network in fp32"
            )


def _chosen(proto: onnx.ModelProto, half: int, keep: Collection[str] = (), *, heads: bool = False) -> set[int]:
    """The indices of the nodes that compute in half precision, without the layers `keep`."""
    import onnx

    sizes = image_sizes(proto, [node.output[0] for node in proto.graph.node if node.op_type in PRODUCTS])
    types, opset = tensor_types(proto), opset_of(proto)
    nodes = list(proto.graph.node)
    makers = {name: node for node in nodes for name in node.output}
    ahead = _ahead_of_maps(nodes, sizes)
    from_sizes: set[str] = {tensor.name for tensor in proto.graph.initializer}
    """What follows from sizes and constants, not from the pixels."""
    narrow: set[str] = set()
    """Tensors in half precision."""
    kept: set[str] = set()
    """Tensors in fp32 that would be in half if no layer were kept: what is computed of them and of half is in half."""
    names = layer_names(proto) if keep else {}
    chosen: set[int] = set()
    for index, node in enumerate(nodes):
        if node.op_type in _SIZES or from_sizes.issuperset(filter(None, node.input)):
            from_sizes |= set(node.output)
            if node.op_type in _SIZES and node.input[0] in narrow:
                chosen.add(index)
            continue
        if node.op_type == "DequantizeLinear" and makers[node.input[0]].input[0] in narrow:
            chosen.add(index)
            narrow |= set(node.output)
            continue
        floats = [name for name in node.input if types.get(name) == onnx.TensorProto.FLOAT and name not in from_sizes]
        if node.op_type == "QuantizeLinear" and node.input[0] in narrow:
            chosen.add(index)
        first = next((at for at, name in enumerate(node.input) if types.get(name) == onnx.TensorProto.FLOAT), 0)
        if types.get(node.output[0]) != onnx.TensorProto.FLOAT or not takes(node, half, opset, first):
            continue
        near = narrow | kept
        if node.op_type in PRODUCTS:
            inside = not _is_vector(node.output[0], sizes) or heads or (id(node) in ahead and near.issuperset(floats))
        elif pools(node):
            inside = id(node) in ahead and near.issuperset(floats) and _weighs_channels(node, nodes, sizes)
        else:
            inside = node.op_type in _BETWEEN and _stays_narrow(node, floats, near, from_sizes)
        is_kept = names.get(node.input[1]) in keep if node.op_type in LAYERS else kept.issuperset(floats)
        if inside and keep and is_kept:
            kept |= set(node.output)
        elif inside:
            chosen.add(index)
            narrow |= set(node.output)
    # of weights, and of what goes into the first product, they give the type that is read
    read = {name for index in chosen for name in nodes[index].input}
    return chosen | {
        at for at, node in enumerate(nodes) if node.op_type == "DequantizeLinear" and node.output[0] in read
    }


def _stays_narrow(node: onnx.NodeProto, floats: list[str], narrow: set[str], from_sizes: set[str]) -> bool:
    """Whether all that a cheap step computes with is in half already."""
    if node.op_type == "Div" and node.input[1] not in from_sizes:
        return False  # as in linear attention: a sum of products may be next to 0
    return bool(floats) and narrow.issuperset(floats)


def _ahead_of_maps(nodes: list[onnx.NodeProto], sizes: ImageSizes) -> set[int]:
    """The ids of the nodes that a product over many positions of the image is made of: all but the heads."""
    makers = {name: node for node in nodes for name in node.output}
    found: set[int] = set()
    pending = [node for node in nodes if node.op_type in PRODUCTS and not _is_vector(node.output[0], sizes)]
    while pending:
        node = pending.pop()
        if id(node) not in found:
            found.add(id(node))
            pending += [makers[name] for name in node.input if name in makers]
    return found


def _is_vector(name: str, sizes: ImageSizes) -> bool:
    """Whether a tensor holds one value per channel: [N, C], [N, C, 1, 1], [N, 1, C]."""
    shape = sizes.shapes.get(name, [])
    known = bool(shape) and all(shape)
    return known and max(shape[1:], default=1) == prod(shape) // sizes.batch


def _weighs_channels(node: onnx.NodeProto, nodes: list[onnx.NodeProto], sizes: ImageSizes) -> bool:
    """Whether `node` is the mean or maximum that squeeze and excitation begins with, and no part of a normalisation."""
    plain = node.op_type in ("GlobalAveragePool", "GlobalMaxPool", "ReduceMean", "ReduceMax")
    if not plain or not _is_vector(node.output[0], sizes):
        return False
    return all(other.op_type != "Sub" for other in nodes if node.output[0] in other.input)
