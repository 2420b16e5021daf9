"""In which precision does an ONNX file compute? Read back from the file, never assumed. Loads no torch."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

from pmm.export.options import MIN_SHARE
from pmm.utils.errors import InvalidFile

if TYPE_CHECKING:
    import onnx

PRODUCTS = ("Conv", "Gemm", "MatMul")


@dataclass(frozen=True)
class GraphPrecision:
    """Multiply-accumulates of one image through a graph, per type."""

    macs: dict[str, int]

    @property
    def total(self) -> int:
        return sum(self.macs.values())

    @property
    def share(self) -> dict[str, float]:
        """Largest first; they add up to 1."""
        return {name: self.macs[name] / self.total for name in sorted(self.macs, key=lambda n: -self.macs[n])}

    @property
    def precision(self) -> str:
        """The type of most multiplications."""
        return max(self.macs, key=lambda name: self.macs[name])

    def check(self, precision: str, file: str | Path, graph: str = "it") -> None:
        """Raises InvalidFile if too little of the graph in `file` is computed in `precision`."""
        least = MIN_SHARE.get(precision, 1.0)
        if self.share.get(precision, 0.0) < least:
            shares = ", ".join(f"{share:.1%} {name}" for name, share in self.share.items())
            raise InvalidFile(
                f"{graph} has {shares} of its MACs", path=file, expected=f"{least:.0%} or more in {precision}"
            )


def tally(products: Iterable[tuple[str, int]], path: str | Path | None = None) -> GraphPrecision:
    """Add up (type, multiply-accumulates). Raises InvalidFile, of `path`, if there are none."""
    macs: dict[str, int] = defaultdict(int)
    for name, count in products:
        macs[name] += count
    if not sum(macs.values()):
        raise InvalidFile("no convolution or matrix product with known sizes in the graph", path=path)
    return GraphPrecision(dict(macs))


def onnx_precision(proto: onnx.ModelProto, path: str | Path | None = None) -> GraphPrecision:
    """Count the convolutions and matrix products of `proto` for one image.

    A product is int8 if both its inputs are dequantised 8-bit tensors, else of the type of its weights.
    """
    import onnx

    single = onnx.ModelProto()
    single.CopyFrom(proto)
    images = single.graph.input[0].type.tensor_type.shape.dim[0]
    batch = images.dim_value = images.dim_value or 1  # a static one is part of what follows
    del single.graph.value_info[:]  # recorded with a symbolic batch
    for output in single.graph.output:
        output.type.tensor_type.shape.Clear()
    inferred = onnx.shape_inference.infer_shapes(single, data_prop=True)
    types, shapes = {}, {}
    for value in (*inferred.graph.value_info, *inferred.graph.output, *inferred.graph.input):
        tensor = value.type.tensor_type
        types[value.name], shapes[value.name] = tensor.elem_type, [d.dim_value for d in tensor.shape.dim]
    for tensor in inferred.graph.initializer:
        types[tensor.name], shapes[tensor.name] = tensor.data_type, list(tensor.dims)
    makers = {output: node for node in inferred.graph.node for output in node.output}
    products = (node for node in inferred.graph.node if node.op_type in PRODUCTS)
    return tally(((_type(node, makers, types), _macs(node, shapes) // batch) for node in products), path)


def _type(node: onnx.NodeProto, makers: dict[str, onnx.NodeProto], types: dict[str, int]) -> str:
    import onnx

    proto = onnx.TensorProto
    names: dict[int, str] = {proto.FLOAT: "fp32", proto.FLOAT16: "fp16", proto.BFLOAT16: "bf16"}
    eight_bits = (proto.INT8, proto.UINT8)
    sources = [makers.get(name) for name in node.input[:2]]
    if all(s is not None and s.op_type == "DequantizeLinear" and types.get(s.input[0]) in eight_bits for s in sources):
        return "int8"
    return names.get(types.get(node.input[1], 0), "unknown")


def _macs(node: onnx.NodeProto, shapes: dict[str, list[int]]) -> int:
    """Outputs times the length of the sum behind each."""
    output, weight = shapes.get(node.output[0], []), shapes.get(node.input[1], [])
    if node.op_type == "Conv":
        return prod(output) * prod(weight[1:]) if output else 0
    return prod(output) * shapes[node.input[0]][-1] if output and node.input[0] in shapes else 0
