"""The precision that an ONNX file computes in, read back from the file. Loads no torch."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

from pmm.artifacts.onnx_content import PRODUCTS, product_type
from pmm.export.graph_sizes import image_sizes
from pmm.export.options import MIN_SHARE, MIN_SHARE_WITH_KEPT
from pmm.utils.errors import InvalidFile

if TYPE_CHECKING:
    import onnx


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

    def check(self, precision: str, file: str | Path, graph: str = "it", *, kept: bool = False) -> None:
        """Raises InvalidFile if too little of the graph in `file` is computed in `precision`; `kept`: layers were kept
        in fp32 on purpose."""
        least = MIN_SHARE_WITH_KEPT if kept else MIN_SHARE.get(precision, 1.0)
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

    Each is of its `product_type`.

    Raises InvalidFile for a graph without an input, or without such products.
    """
    products = [node for node in proto.graph.node if node.op_type in (*PRODUCTS, "QLinearConv") and not node.domain]
    sizes = image_sizes(proto, [name for node in products for name in (*_factors(node)[:2], node.output[0])])
    makers = {output: node for node in proto.graph.node for output in node.output}
    counted = ((product_type(node, makers, sizes.types), macs(node, sizes.shapes) // sizes.batch) for node in products)
    return tally(counted, path)


def macs(node: onnx.NodeProto, shapes: dict[str, list[int]]) -> int:
    """Multiply-accumulates of a product: outputs times the length of the sum behind each; 0 where sizes are unknown."""
    output, (first, *others) = shapes.get(node.output[0], []), [shapes.get(name, []) for name in _factors(node)]
    if node.op_type == "Einsum":
        return _einsum_macs(node, [first, *others])
    if not (output and first and others[0]):
        return 0
    if node.op_type in ("Conv", "QLinearConv"):
        return prod(output) * prod(others[0][1:])
    if node.op_type == "ConvTranspose":
        # of one number it is a repetition (see `portable_graph`), which no builder or runtime counts
        return prod(first) * prod(others[0][1:]) if prod(first[1:]) > 1 else 0
    transposed = any(attribute.name == "transA" and attribute.i for attribute in node.attribute)
    return prod(output) * first[0 if transposed else -1]


def _factors(node: onnx.NodeProto) -> Sequence[str]:
    """What a product multiplies; in QLinearConv a scale and a zero point follow each factor."""
    return node.input if node.op_type != "QLinearConv" else (node.input[0], node.input[3])


def _einsum_macs(node: onnx.NodeProto, inputs: list[list[int]]) -> int:
    """The product of the sizes of all its indices; 0 for one factor, which is not multiplied by anything."""
    equation = next(attribute.s for attribute in node.attribute if attribute.name == "equation").decode()
    sizes: dict[str, int] = {}
    for term, shape in zip(equation.partition("->")[0].replace(" ", "").split(","), inputs, strict=True):
        named = len(term.replace("...", ""))
        # what "..." stands for is counted from the right, as in broadcasting
        dots = [f".{len(shape) - named - index}" for index in range(len(shape) - named)]
        before, found, after = term.partition("...")
        for index, size in zip([*before, *(dots if found else ()), *after], shape, strict=False):
            sizes[index] = max(size, sizes.get(index, 0))
    return prod(sizes.values()) if len(inputs) > 1 and all(inputs) else 0
