"""An ONNX file that others wrote, read whole and refused where it is nothing that every backend can run. Loads no
torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pmm.artifacts.onnx_content import INTEGER_PRODUCTS
from pmm.artifacts.onnx_file import EXPORT, read_onnx, with_weights_inside
from pmm.utils.errors import InvalidFile, reason_of

if TYPE_CHECKING:
    import onnx

MIN_OPSET = 7
"""The oldest that ONNX Runtime promises to run."""
AGAIN = "export the network again"
STANDARD = ("", "ai.onnx")
"""Both names of the operators that the standard defines."""


@dataclass(frozen=True)
class ForeignOnnx:
    """The graph with all its weights, and where it comes from."""

    path: Path
    proto: onnx.ModelProto
    sha256: str
    """Of the file; weights that lie beside it are not in it."""

    @property
    def opset(self) -> int:
        """Of the standard's operators; 0 if the file does not say."""
        return max((entry.version for entry in self.proto.opset_import if entry.domain in STANDARD), default=0)

    @property
    def producer(self) -> str:
        """The program that wrote it, as `pytorch 2.4.0`."""
        return f"{self.proto.producer_name} {self.proto.producer_version}".strip()


def read_foreign_onnx(path: str | Path) -> ForeignOnnx:
    """Read a file that pmm did not write, with weights that lie beside it.

    Raises InvalidFile: no ONNX file; one of ours; weights that are outside its folder, missing, or more than one file
    can hold; operators that are not of the standard, or of integers; an opset before 7.
    """
    try:
        file = read_onnx(path, external_data=True, foreign=True)
    except InvalidFile as error:
        error.hint = AGAIN if error.hint == EXPORT else error.hint
        raise
    if file.stored_manifest is not None:
        hint = "use it as it is: pmm evaluate, export, bench and others take it"
        raise InvalidFile("it has a manifest of ours already", path=file.path, hint=hint)
    proto = with_weights_inside(file)
    if proto.functions:
        proto = _inlined(proto, file.path)
    foreign = ForeignOnnx(file.path, proto, file.sha256)
    custom = sorted({f"{node.domain}::{node.op_type}" for node in nodes_in(proto.graph) if node.domain not in STANDARD})
    if custom:
        raise InvalidFile(
            f"it has operators that only some runtimes know: {', '.join(custom)[:200]}",
            path=file.path,
            expected="operators of the ONNX standard",
            hint="export the network again without them; a file that ONNX Runtime optimised or quantised has them, its "
            "source has not",
        )
    integer = sorted({node.op_type for node in nodes_in(proto.graph)} & {*INTEGER_PRODUCTS})
    if integer:
        raise InvalidFile(
            f"it is quantised, and has {', '.join(integer)}, which only some runtimes know",
            path=file.path,
            expected="Q/DQ pairs (QuantizeLinear, DequantizeLinear) around its operators, or a file in fp32",
            hint="adopt the file that it was made from, and quantise that: pmm export onnx --precision int8",
        )
    if foreign.opset < MIN_OPSET:
        expected = f"{MIN_OPSET} or newer"
        raise InvalidFile(f"its opset is {foreign.opset}", path=file.path, expected=expected, hint=AGAIN)
    _check(proto, file.path)
    return foreign


def nodes_in(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    """Every node, also of the graphs inside nodes."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                yield from nodes_in(inner)


def _inlined(proto: onnx.ModelProto, path: Path) -> onnx.ModelProto:
    """With the bodies of its own functions in their place."""
    import onnx.inliner

    try:
        return onnx.inliner.inline_local_functions(proto)
    except Exception as error:  # its exceptions are of C++
        raise InvalidFile(f"its functions cannot be resolved ({reason_of(error)})", path=path) from error


def _check(proto: onnx.ModelProto, path: Path) -> None:
    import onnx

    shapes = [value.type.tensor_type for value in (*proto.graph.input, *proto.graph.output)]
    missing = [kind for kind in shapes if kind.elem_type and not kind.HasField("shape")]
    for kind in missing:  # which the checker wants, and no runtime does
        kind.shape.SetInParent()
    try:
        onnx.checker.check_model(proto)
    except Exception as error:  # its own type, or ValueError for a graph of more than 2 GiB
        raise InvalidFile(f"not a valid ONNX graph ({reason_of(error)})", path=path, hint=AGAIN) from error
    finally:
        for kind in missing:
            kind.ClearField("shape")
