"""Compares an ONNX graph with the manifest inside the file: other tools quantise, cast or prune a file and keep its
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

from pmm.utils.errors import InvalidFile, reason_of

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
    """Digests of what a file computes, without its metadata, its documentation and the names of its operators."""

    exact: str
    """Of its inputs, outputs, operators and numbers, all as they are."""
    weights: str
    """Of the numbers in its matrices, in whatever order and layout."""


def graph_digest(proto: onnx.ModelProto) -> GraphDigest:
    """The digests of the graph of `proto`, with its weights inside. Raises InvalidFile if those are damaged."""
    return GraphDigest(exact=_exact_digest(proto), weights=_weights_digest(proto.graph))


def _exact_digest(proto: onnx.ModelProto) -> str:
    digest, graph = hashlib.sha256(), proto.graph
    digest.update(repr(sorted((entry.domain, entry.version) for entry in proto.opset_import)).encode())
    for entries, texts in (
        (proto.functions, ()),
        (graph.sparse_initializer, ()),
        ((*graph.input, *graph.output), ("doc_string", "metadata_props")),
        (graph.node, ("name", "doc_string", "metadata_props")),
    ):
        for entry in entries:
            plain = type(entry)()
            plain.CopyFrom(entry)
            for field in texts:
                plain.ClearField(field)
            digest.update(plain.SerializeToString(deterministic=True))
    for tensor in sorted(graph.initializer, key=lambda tensor: tensor.name):
        content = tensor.raw_data or tensor.SerializeToString(deterministic=True)
        digest.update(repr((tensor.name, *tensor.dims, tensor.data_type, len(content))).encode())
        digest.update(content)
    return digest.hexdigest()


def _weights_digest(graph: onnx.GraphProto) -> str:
    """Stays the same where a tool only transposes or pads weights, restores those in 8 bits, or rewrites operators and
    what these add and scale by: vectors count nothing."""
    restored = _restored_weights(graph)
    sums = {_sum_of_numbers(_array(narrow).astype(np.float32) * _array(scale)) for narrow, scale in restored.values()}
    # older exporters have weights in attributes, and tools make initialisers of them
    values = (attribute.t for node in graph.node for attribute in node.attribute if attribute.name == "value")
    for tensor in (*(tensor for tensor in graph.initializer if tensor.name not in restored), *values):
        if _FEW <= prod(tensor.dims) > max(tensor.dims):
            sums.add(_sum_of_numbers(tensor))
    return hashlib.sha256(np.array(sorted(sums - {0}), np.uint64).tobytes()).hexdigest()


def _restored_weights(graph: onnx.GraphProto) -> dict[str, tuple[onnx.TensorProto, onnx.TensorProto]]:
    """Weights in 8 bits by their names, with the scales by which a Mul after a Cast restores them: tools compute it
    ahead."""
    import onnx

    stored = {tensor.name: tensor for tensor in graph.initializer}
    casts = {name: node.input[0] for node in graph.node if node.op_type == "Cast" and node.input
             for name in node.output}  # fmt: skip
    found = {}
    for node in graph.node:
        if node.op_type != "Mul" or len(node.input) != 2:
            continue
        narrow, scale = stored.get(casts.get(node.input[0], "")), stored.get(node.input[1])
        if narrow is None or scale is None:
            continue
        if (narrow.data_type, scale.data_type) != (onnx.TensorProto.INT8, onnx.TensorProto.FLOAT):
            continue
        # a result that is larger than the integers is none of ours, and may not fit the memory
        sizes = zip(reversed(scale.dims), reversed(narrow.dims), strict=False)
        if len(scale.dims) <= len(narrow.dims) and all(size in (1, whole) for size, whole in sizes):
            found[narrow.name] = narrow, scale
    return found


def _array(tensor: onnx.TensorProto) -> npt.NDArray[Any]:
    """Raises InvalidFile for more or fewer numbers than its dimensions say."""
    import onnx

    try:
        return onnx.numpy_helper.to_array(tensor)
    except Exception as error:  # of several types, as the versions of onnx differ
        raise InvalidFile(f"its tensor {tensor.name!r} is damaged ({reason_of(error)})") from error


def _sum_of_numbers(tensor: onnx.TensorProto | npt.NDArray[Any]) -> int:
    """A hash of the numbers in a tensor that does not depend on their order; zeros count nothing."""
    if isinstance(tensor, np.ndarray):
        raw, count = tensor.tobytes(), tensor.size
    else:  # a copy of the numbers only where they are not stored as they are in memory
        raw, count = tensor.raw_data or _array(tensor).tobytes(), prod(tensor.dims)
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
    """Compare the graph of the file `path` with the copy of the manifest inside it, where no manifest is beside it.

    A graph that computes in the same types, on weights of the same numbers, may have been simplified, and may have been
    changed for the worse: one line (logger "pmm") says so.

    Raises InvalidFile if its types or its weights are others, or the manifest does not say what they were.
    """
    if manifest.graph and _exact_digest(proto) == manifest.graph.exact:
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
    if manifest.graph is None:
        problem = "the manifest inside it does not say what its graph was"
        raise InvalidFile(problem, path=path, hint="export the file again")
    compared = "the types that it computes in, not its weights, which lie in another file"
    if not _has_external_weights(proto.graph):
        compared = "the types that it computes in and the numbers in its weights, not their order"
        try:
            weights = _weights_digest(proto.graph)
        except InvalidFile as error:
            error.path = path
            raise
        if weights != manifest.graph.weights:
            problem = "another tool changed it: its weights are not those that the manifest inside it was written for"
            raise InvalidFile(problem, path=path, expected="the weights of the export", hint=hint)
    logging.getLogger("pmm").warning(
        "%s: another tool changed it since its export, and its embeddings may be others. Compared were %s. See whether "
        "it still gives the same: pmm selftest %s; or take it as a network of its own: pmm adopt %s",
        *(path, compared, path, path),
    )


def _has_external_weights(graph: onnx.GraphProto) -> bool:
    import onnx

    return any(tensor.data_location == onnx.TensorProto.EXTERNAL for tensor in graph.initializer)


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
    if not node.input:
        return "unknown"
    sources = [makers.get(name) for name in node.input[:2]]
    eight_bits = (tensor.INT8, tensor.UINT8)
    if all(s is not None and s.op_type == "DequantizeLinear" and types.get(_first(s)) in eight_bits for s in sources):
        return "int8"
    return names.get(types.get(node.input[1 if len(node.input) > 1 else 0], 0), "unknown")


def _first(node: onnx.NodeProto) -> str:
    """What a node reads first; empty in a damaged file, where it reads nothing."""
    return node.input[0] if node.input else ""


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
