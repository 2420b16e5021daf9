"""ONNX graphs of other tools, made fit to be quantised and cast: batch-norm folded, constants computed, a newer opset.

Loads no torch.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from pmm.runtime.memory import reason
from pmm.runtime.ort_session import onnx_runtime
from pmm.utils.errors import InvalidFile

if TYPE_CHECKING:
    import onnx


_REARRANGING = (
    "CommonSubexpressionElimination",
    "GemmTransposeFusion",
    "MatMulAddFusion",
    "MatmulTransposeFusion",
    "ReshapeFusion",
    "TransposeOptimizer",
)
"""Steps of ONNX Runtime's basic optimisation that fold nothing, and after which tensors have other names."""


def folded(proto: onnx.ModelProto) -> onnx.ModelProto:
    """A copy of the fp32 graph `proto` as ONNX Runtime simplifies it: batch-norm is folded into convolutions, constants
    are initialisers, what does nothing is gone. It is plain ONNX of the same opset.

    Raises InvalidFile for a graph that ONNX Runtime cannot load, or with parts that are graphs themselves.
    """
    import onnx

    check_flat(proto)
    ort = onnx_runtime()
    source = onnx.ModelProto()
    source.CopyFrom(proto)
    constants = {tensor.name for tensor in source.graph.initializer}
    inputs = [value for value in source.graph.input if value.name not in constants]
    del source.graph.input[:]  # what is listed there may be overridden, and is not folded
    source.graph.input.extend(inputs)
    source.ir_version = max(source.ir_version, 4)  # before, weights had to be listed
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC  # no operators of its own
    options.log_severity_level = 4
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "folded.onnx"
        options.optimized_model_filepath = str(file)
        try:
            ort.InferenceSession(
                source.SerializeToString(),
                options,
                providers=["CPUExecutionProvider"],
                disabled_optimizers=list(_REARRANGING),
            )
        except Exception as error:  # ORT raises its own exception types, one per kind of bad file
            raise InvalidFile(f"ONNX Runtime cannot load it ({reason(error)})") from error
        result = onnx.load(file)
    known, used = ({node.domain for node in graph.graph.node} for graph in (source, result))
    if new := used - known:
        raise InvalidFile(f"ONNX Runtime {ort.__version__} wrote operators of {', '.join(sorted(new))} into it")
    versions = [entry for entry in result.opset_import if entry.domain in used | {""}]
    del result.opset_import[:], result.graph.value_info[:]
    result.opset_import.extend(versions)
    return result


def check_flat(proto: onnx.ModelProto) -> None:
    """Raises InvalidFile for a graph that branches or loops."""
    import onnx

    for node in proto.graph.node:
        if any(
            attribute.type in (onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS) for attribute in node.attribute
        ):
            raise InvalidFile(
                f"operator {node.op_type} ({node.name or node.output[0]}) decides or repeats while it runs",
                expected="a graph of fixed steps",
                hint="export the network again with the shapes and branches of its deployment fixed",
            )


def opset_of(proto: onnx.ModelProto) -> int:
    """Version of ONNX's own operators."""
    return max((entry.version for entry in proto.opset_import if entry.domain in ("", "ai.onnx")), default=1)


def with_opset(proto: onnx.ModelProto, least: int) -> onnx.ModelProto:
    """`proto`, or a copy in opset `least` if it is older. Raises InvalidFile where onnx cannot convert it."""
    import onnx

    if opset_of(proto) >= least:
        return proto
    try:
        converted = onnx.version_converter.convert_version(proto, least)
        onnx.checker.check_model(converted, full_check=True)
    except Exception as error:  # of onnx's C++ code
        raise InvalidFile(
            f"onnx cannot convert it from opset {opset_of(proto)} to {least} ({reason(error)})",
            hint=f"export the network again with opset_version={least}",
        ) from error
    converted.ir_version = max(proto.ir_version, onnx.helper.OP_SET_ID_VERSION_MAP["ai.onnx", least])
    return converted
