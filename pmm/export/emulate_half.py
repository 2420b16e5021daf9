"""A half-precision ONNX file judged without a GPU: fp32 arithmetic, every tensor rounded to the file's own type.

ONNX Runtime's CPU provider has no bf16 convolution, and computes an fp16 graph in fp32 throughout, which hides what
overflows. This rewrites the file so that it runs there with the rounding, and the overflow, that a GPU has between
operators (which accumulates in fp32 within one). Loads no torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pmm.artifacts.manifest import Manifest

if TYPE_CHECKING:
    import onnx


def emulated(proto: onnx.ModelProto) -> onnx.ModelProto:
    """A copy of `proto` in which operators on fp16 or bf16 tensors take and give fp32, with casts in between.

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
