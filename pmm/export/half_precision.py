"""ONNX graphs in half precision: judged without a GPU, and int8 with its other steps in fp16. Loads no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from pmm.artifacts.manifest import Manifest
from pmm.export.graph_folding import opset_of

if TYPE_CHECKING:
    import onnx

_STEPS = ("QuantizeLinear", "DequantizeLinear")
_NAMES = {1: "fp32", 10: "fp16", 16: "bf16"}
LARGEST = {10: 65504.0, 16: 3.3895313892515355e38}
"""By the numbers of onnx.TensorProto."""


def pools(node: onnx.NodeProto) -> bool:
    """Whether `node` makes one value per channel of a map."""
    return node.op_type.startswith(("Reduce", "Global"))


def emulated(proto: onnx.ModelProto) -> onnx.ModelProto:
    """A copy of `proto` in which operators on fp16 or bf16 tensors take and give fp32, with casts in between.

    ONNX Runtime's CPU provider has no bf16 convolution, and computes an fp16 graph in fp32 throughout, which hides
    overflows. The copy runs on it with the rounding, and the overflow, that a GPU has between operators (within one, it
    accumulates in fp32).

    Run it with graph optimisations off: a cast to half and back is the point, not a redundancy.
    """
    import onnx
    from onnx import TensorProto, helper

    half = (TensorProto.FLOAT16, TensorProto.BFLOAT16)
    types = tensor_types(proto)
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    nodes = list(copy.graph.node)
    del copy.graph.node[:], copy.graph.value_info[:]
    for index, node in enumerate(nodes):
        narrow_out = [name for name in node.output if types.get(name) in half]
        if node.op_type == "Cast" or not (narrow_out or any(types.get(name) in half for name in node.input)):
            copy.graph.node.append(node)
            continue
        for position, name in enumerate(node.input):
            if types.get(name) in half:
                wide = f"{name}/wide{index}.{position}"
                copy.graph.node.append(helper.make_node("Cast", [name], [wide], to=TensorProto.FLOAT))
                node.input[position] = wide
        for position, name in enumerate(node.output):
            if name in narrow_out:
                node.output[position] = f"{name}/wide"
        copy.graph.node.append(node)
        for name in narrow_out:
            copy.graph.node.append(helper.make_node("Cast", [f"{name}/wide"], [name], to=types[name]))
    return copy


def half_type(manifest: Manifest) -> str:
    """fp16 or bf16 if the file's trunk has floats of that type, else nothing."""
    stored = (manifest.quantization or {}).get("fallback", manifest.precision)
    return stored if stored in ("fp16", "bf16") else ""


def tensor_types(proto: onnx.ModelProto) -> dict[str, int]:
    """The element type of every tensor by its name, as onnx.TensorProto names them."""
    import onnx

    inferred = onnx.shape_inference.infer_shapes(proto)
    values = (*inferred.graph.value_info, *inferred.graph.input, *inferred.graph.output)
    types = {value.name: value.type.tensor_type.elem_type for value in values}
    return {**types, **{tensor.name: tensor.data_type for tensor in inferred.graph.initializer}}


def fp16_between(proto: onnx.ModelProto) -> onnx.ModelProto:
    """A copy of the quantised graph `proto` with the trunk's floats in fp16; what comes before and after stays in fp32.

    Faster on a GPU, where a strongly typed engine keeps the file's types.

    The trunk is as in an fp16 export: all from the first convolution to the maps that are pooled. Its weights stay in 8
    bits; scales become fp16, which QuantizeLinear and DequantizeLinear take from opset 19 on.
    """
    import onnx

    nodes = list(proto.graph.node)
    trunk = _trunk(nodes)
    inside = {index for index, node in enumerate(nodes) if id(node) in trunk}
    return narrowed(proto, inside, onnx.TensorProto.FLOAT16)


def narrowed(proto: onnx.ModelProto, inside: set[int], half: int) -> onnx.ModelProto:
    """A copy of `proto` in which the nodes at the indices `inside` take and give floats of the type `half`, with casts
    between them and the others. The graph's inputs and outputs keep their types."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    types, opset = tensor_types(proto), opset_of(proto)
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    nodes, last = list(copy.graph.node), []
    stored = {tensor.name: tensor for tensor in copy.graph.initializer}
    made = {name for index, node in enumerate(nodes) if index in inside for name in node.output}
    narrow = {name for name in made if types.get(name) == TensorProto.FLOAT}
    for output in [value.name for value in copy.graph.output if value.name in narrow]:
        inner = f"{output}/{_NAMES[half]}"
        for node in nodes:
            for names in (node.input, node.output):
                names[:] = [inner if name == output else name for name in names]
        last.append(helper.make_node("Cast", [inner], [output], name=output, to=TensorProto.FLOAT))
        narrow.add(inner)
        types[inner] = TensorProto.FLOAT
    converted: set[str] = set()
    del copy.graph.node[:], copy.graph.value_info[:]
    for index, node in enumerate(nodes):
        within = index in inside
        for position, name in enumerate(node.input):
            if types.get(name) != TensorProto.FLOAT or (name in narrow) == within:
                continue
            if within and not takes(node, half, opset, position):  # as the scales of Resize
                continue
            kind = half if within else TensorProto.FLOAT
            cast = f"{name}/{_NAMES[kind]}"
            if cast not in converted and name in stored:
                values = rounded(numpy_helper.to_array(stored[name]), half)
                if node.op_type in _STEPS:
                    values = np.maximum(values, np.finfo(np.float16).smallest_subnormal)  # a scale of 0 is refused
                copy.graph.initializer.append(numpy_helper.from_array(values, cast))
            elif cast not in converted:
                copy.graph.node.append(helper.make_node("Cast", [name], [cast], name=cast, to=kind))
            converted.add(cast)
            node.input[position] = cast
        copy.graph.node.append(node)
    copy.graph.node.extend(last)
    used = {name for node in copy.graph.node for name in node.input}
    for name in stored.keys() - used:
        copy.graph.initializer.remove(stored[name])
    onnx.checker.check_model(copy, full_check=True)
    return copy


def takes(node: onnx.NodeProto, kind: int, opset: int, position: int = 0) -> bool:
    """Whether the operator of `node` takes the type `kind` for an input, by ONNX's definition of it in that opset."""
    import onnx

    if node.domain not in ("", "ai.onnx"):
        return False
    inputs = onnx.defs.get_schema(node.op_type, opset).inputs
    name = onnx.TensorProto.DataType.Name(kind).lower()
    return bool(inputs) and f"tensor({name})" in inputs[min(position, len(inputs) - 1)].types


def rounded(values: npt.NDArray[Any], half: int) -> npt.NDArray[Any]:
    """As that type; what is finite stays finite, as the large negative numbers of masks."""
    import onnx

    largest = LARGEST[half]
    within = np.where(np.isfinite(values), np.clip(values, -largest, largest), values)
    return within.astype(onnx.helper.tensor_dtype_to_np_dtype(half))


def _trunk(nodes: list[onnx.NodeProto]) -> set[int]:
    """The ids of the nodes from the first convolution to the maps that the heads pool, and of their Q/DQ pairs."""
    makers = {name: node for node in nodes for name in node.output}
    ahead: dict[int, onnx.NodeProto] = {}
    """Nodes that a convolution, or a product of the trunk's linear layers, is made of."""
    sources = [node for node in nodes if node.op_type in ("Conv", "MatMul")]
    while sources:
        node = sources.pop()
        if id(node) not in ahead:
            ahead[id(node)] = node
            sources += [makers[name] for name in node.input if name in makers]
    trunk: set[int] = set()
    for node in nodes:
        end = pools(node) and id(node) not in ahead
        if node.op_type == "Conv" or (not end and any(id(makers.get(name)) in trunk for name in node.input)):
            trunk.add(id(node))
    # a QuantizeLinear takes the type of its input, a DequantizeLinear gives that of what reads it
    back = {name: id(node) for node in nodes if node.op_type == "DequantizeLinear" for name in node.output}
    return trunk | {back[name] for node in nodes if id(node) in trunk for name in node.input if name in back}
