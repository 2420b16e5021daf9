"""What is in an ONNX graph, held against the manifest inside: other tools quantise, cast or prune a file and keep its
metadata. Loads no torch."""

from __future__ import annotations

import contextlib
import hashlib
import logging
from collections import Counter
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from pmm.utils.errors import InvalidFile

if TYPE_CHECKING:
    import onnx

    from pmm.artifacts.manifest import Manifest

PRODUCTS = ("Conv", "ConvTranspose", "Gemm", "MatMul", "Einsum")
"""Operators that multiply, in the types of what they read."""
_FUSED = ("FusedConv", "FusedGemm", "FusedMatMul")
"""The same with more steps, as ONNX Runtime writes them."""
INTEGER_PRODUCTS = ("QLinearConv", "QLinearMatMul", "ConvInteger", "MatMulInteger")
"""Of the standard, on 8-bit integers; only some runtimes know them."""
_INTEGER = (*INTEGER_PRODUCTS, "MatMulIntegerToFloat", "DynamicQuantizeMatMul", "QGemm", "QAttention")
"""And those of ONNX Runtime."""
_FEW = 64
"""Numbers; tensors with fewer are constants of operators, which tools merge, and no weights."""
_KNOWN = 1024
"""Numbers; sizes and axes have fewer, and are all that types and shapes follow from."""
_CHUNK = 1 << 20


@dataclass(frozen=True, kw_only=True)
class GraphDigest:
    """Of a graph without its metadata and the names of its operators."""

    weights: str
    """Of the numbers in its weights, in whatever order and layout; empty if they lie in another file."""
    operators: str
    """Of all else: its operators, how they are connected, and small constants."""


def graph_digest(proto: onnx.ModelProto) -> GraphDigest:
    """Of the graph of `proto`; weights stay the same where a tool only transposes or pads them, restores those in 8
    bits, or changes the operators around them."""
    import onnx

    restored = _restored_weights(proto.graph)
    weights, operators = {_sum_of_numbers(values) for values in restored.values()}, hashlib.sha256()
    narrow = {name for names in restored for name in names}
    for tensor in sorted(proto.graph.initializer, key=lambda tensor: tensor.name):
        if prod(tensor.dims) < _FEW:
            operators.update(tensor.SerializeToString(deterministic=True))
        elif tensor.data_location != onnx.TensorProto.EXTERNAL and tensor.name not in narrow:
            weights.add(_sum_of_numbers(tensor))
    for node in proto.graph.node:
        plain = onnx.NodeProto()
        plain.CopyFrom(node)
        for attribute in plain.attribute:  # older exporters have weights there, and tools make initialisers of them
            if attribute.name == "value" and prod(attribute.t.dims) >= _FEW:
                weights.add(_sum_of_numbers(attribute.t))
                attribute.t.Clear()
        for field in ("name", "doc_string", "metadata_props"):
            plain.ClearField(field)
        operators.update(plain.SerializeToString(deterministic=True))
    external = any(tensor.data_location == onnx.TensorProto.EXTERNAL for tensor in proto.graph.initializer)
    numbers = hashlib.sha256(np.sort(np.array(sorted(weights - {0}), np.uint64)).tobytes()).hexdigest()
    return GraphDigest(weights="" if external else numbers, operators=operators.hexdigest())


def _restored_weights(graph: onnx.GraphProto) -> dict[tuple[str, str], npt.NDArray[np.float32]]:
    """What Cast and Mul make of weights in 8 bits, by the names of these and their scales: tools compute it ahead."""
    import onnx

    stored = {tensor.name: tensor for tensor in graph.initializer}
    casts = {node.output[0]: node.input[0] for node in graph.node if node.op_type == "Cast" and node.input[0] in stored}
    products = ((casts.get(node.input[0], ""), node.input[1]) for node in graph.node if node.op_type == "Mul")
    pairs = [(narrow, scale) for narrow, scale in products if narrow in stored and scale in stored]
    arrays = {
        name: onnx.numpy_helper.to_array(stored[name])
        for pair in pairs
        for name in pair
        if stored[name].data_location != onnx.TensorProto.EXTERNAL
    }
    return {pair: arrays[pair[0]].astype(np.float32) * arrays[pair[1]] for pair in pairs if arrays.keys() >= {*pair}}


def _sum_of_numbers(tensor: onnx.TensorProto | npt.NDArray[Any]) -> int:
    """A hash of the numbers in a tensor that does not depend on their order; zeros count nothing."""
    import onnx

    if isinstance(tensor, np.ndarray):
        raw, count = tensor.tobytes(), tensor.size
    else:  # a copy of the numbers only where they are not stored as they are in memory
        raw, count = tensor.raw_data or onnx.numpy_helper.to_array(tensor).tobytes(), prod(tensor.dims)
    size = next((size for size in (8, 4, 2, 1) if len(raw) == size * count), 1)
    words: npt.NDArray[Any] = np.frombuffer(raw, f"<u{size}")
    total = np.uint64(0)
    with np.errstate(over="ignore"):
        for start in range(0, len(words), _CHUNK):
            mixed = words[start : start + _CHUNK].astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
            mixed ^= mixed >> np.uint64(32)
            mixed *= np.uint64(0xD6E8FEB86659FD93)
            mixed ^= mixed >> np.uint64(29)
            total += mixed.sum(dtype=np.uint64)
    return int(total)


def check_content(proto: onnx.ModelProto, manifest: Manifest, path: Path) -> None:
    """Hold the graph of the file `path` against the copy of its manifest inside, where none lies beside it.

    A graph with the same weights that computes in the same types may have been simplified: one line (logger "pmm") says
    so.

    Raises InvalidFile if its types or its weights are others.
    """
    digest = graph_digest(proto) if manifest.graph else None
    if digest and digest == manifest.graph:
        return
    hint = f"use the file as it was exported, or take this one as a network of its own: pmm adopt {path}"
    declared = {name: share for name, share in manifest.precision_share.items() if share}
    found = product_types(proto)
    if found.keys() - declared or manifest.precision_found not in found:
        says = ", ".join(f"{share:.1%} {name}" for name, share in declared.items())
        types = ", ".join(f"{count} in {name}" for name, count in found.most_common()) or "none"
        raise InvalidFile(
            f"another tool changed it: its convolutions and matrix products are now {types}",
            path=path,
            expected=f"what the manifest inside it says, {says} of its MACs",
            hint=hint,
        )
    if digest is None or manifest.graph is None:  # of an earlier version
        return
    if digest.weights and digest.weights != manifest.graph.weights:
        problem = "another tool changed it: its weights are not those that the manifest inside it was written for"
        raise InvalidFile(problem, path=path, expected="the weights of the export", hint=hint)
    if digest.operators != manifest.graph.operators:
        same = "its precision and weights are" if digest.weights else "its precision is"
        logging.getLogger("pmm").warning("%s: another tool rewrote its operators; %s those of the export", path, same)


def product_types(proto: onnx.ModelProto) -> Counter[str]:
    """How many convolutions and matrix products compute in which type, as `product_type` names it."""
    nodes = [node for node in proto.graph.node if node.op_type in (*PRODUCTS, *_FUSED, *_INTEGER, "MatMulNBits")]
    makers = {name: node for node in proto.graph.node for name in node.output}
    types = _types(proto)
    return Counter(name for node in nodes if (name := product_type(node, makers, types)) != "unknown")


def product_type(node: onnx.NodeProto, makers: dict[str, onnx.NodeProto], types: dict[str, int]) -> str:
    """int8 if both factors are dequantised 8-bit tensors, else the type of the weights or, where both factors are
    computed, of the second one.

    Args:
        makers: the nodes of the graph by what they give.
        types: of the tensors by name, as onnx.TensorProto numbers them.
    """
    import onnx

    tensor = onnx.TensorProto
    names: dict[int, str] = {tensor.FLOAT: "fp32", tensor.FLOAT16: "fp16", tensor.BFLOAT16: "bf16"}
    if node.op_type in _INTEGER:
        return "int8"
    if node.op_type == "MatMulNBits":
        bits = next((attribute.i for attribute in node.attribute if attribute.name == "bits"), 4)
        return f"{bits} bits"
    sources = [makers.get(name) for name in node.input[:2]]
    eight_bits = (tensor.INT8, tensor.UINT8)
    if all(s is not None and s.op_type == "DequantizeLinear" and types.get(s.input[0]) in eight_bits for s in sources):
        return "int8"
    return names.get(types.get(node.input[1 if len(node.input) > 1 else 0], 0), "unknown")


def _types(proto: onnx.ModelProto) -> dict[str, int]:
    """Of the tensors by name, as far as they follow; inferred without the weights. In a graph that is not valid, whose
    reader says so, only those of the stored ones."""
    import onnx

    light, graph = onnx.ModelProto(), proto.graph
    light.ir_version = proto.ir_version
    light.opset_import.extend(proto.opset_import)
    light.functions.extend(proto.functions)
    light.graph.node.extend(graph.node)
    light.graph.input.extend(graph.input)
    light.graph.output.extend(graph.output)
    for tensor in graph.initializer:
        if prod(tensor.dims) < _KNOWN:
            light.graph.initializer.append(tensor)
        else:
            light.graph.initializer.add(name=tensor.name, data_type=tensor.data_type, dims=tensor.dims)
    types: dict[str, int] = {}
    with contextlib.suppress(onnx.shape_inference.InferenceError):
        inferred = onnx.shape_inference.infer_shapes(light).graph
        values = (*inferred.value_info, *inferred.input, *inferred.output)
        types = {value.name: value.type.tensor_type.elem_type for value in values}
    return {**types, **{tensor.name: tensor.data_type for tensor in graph.initializer}}
