"""fp16 and bf16 of adopted networks, with the layers that rounding harms most in fp32. Loads no torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from pmm.artifacts.manifest import InputContract
from pmm.data.preprocessing import Preprocessing
from pmm.evaluation.parity.numeric import numeric_parity
from pmm.export.fallback import convert_with_fallback
from pmm.export.graph_sizes import image_input
from pmm.export.half_conversion import TYPES, HalfType, layers_in_half, narrow_products, prepared
from pmm.export.half_precision import LARGEST, emulated, rounded
from pmm.export.options import MIN_SHARE
from pmm.export.parity_check import ParityCheck, ParityFailed
from pmm.export.precision import onnx_precision
from pmm.export.reference import in_memory
from pmm.runtime.ort_session import open_session
from pmm.utils.errors import InvalidInput

if TYPE_CHECKING:
    import onnx


PROBES = 4
"""Images on which the cost of layers is measured: rounded weights move all embeddings alike."""
QUICK_CROPS = 16
"""Of those of the parity check, for the attempts that fail."""


def half_with_fallback(
    proto: onnx.ModelProto,
    precision: HalfType,
    parity_check: ParityCheck | None,
    contract: InputContract,
    size: Preprocessing,
    name: str,
) -> tuple[onnx.ModelProto, list[str]]:
    """The fp32 graph `proto` in half precision, and the layers that had to stay in fp32 for it to pass its parity check
    with the rounding of a GPU, most costly first (see `convert_with_fallback`).

    Args:
        parity_check: None converts all.
        contract, size: what the graph takes.
        name: of the file, for messages.

    Raises:
        InvalidFile: as `to_half`.
        ParityFailed: it does not pass with most of the multiplications in half.
    """
    converter = HalfConverter(proto, precision)
    if parity_check is None:
        return converter.build(), []

    def passes(candidate: onnx.ModelProto, allowance: float) -> None:
        embed = in_memory(emulated(candidate), contract, size, optimise=False)
        check = dataclasses.replace(parity_check, allowance=allowance)
        for each in (check.sample(QUICK_CROPS), check):
            try:
                each.check(embed, precision, name, f"fp32 arithmetic, every tensor rounded to {precision}")
            except InvalidInput as error:  # too large for half
                raise ParityFailed(f"parity failed: {error.problem}", path=name) from error

    probes = parity_check.sample(PROBES).crops
    if contract.batch:
        probes = np.resize(probes, (contract.batch, *probes.shape[1:]))
    images = [contract.feed(probes, size)]
    try:
        return convert_with_fallback(converter, passes, images, fewest=True)
    except ParityFailed as error:
        others = "fp16, which rounds less, or fp32" if precision == "bf16" else "fp32"
        error.hint = f"nothing was written; use --precision {others}"
        raise


class HalfConverter:
    """Folds the graph once; `build` then casts it, with any layers kept in fp32.

    The heads are in half too where too little of the graph would be without them.
    """

    def __init__(self, proto: onnx.ModelProto, precision: HalfType) -> None:
        """Raises InvalidFile as `to_half`."""
        self.precision: HalfType = precision
        self.proto = prepared(proto, precision)
        # small networks may have a large head
        share = onnx_precision(narrow_products(self.proto, precision)).share.get(precision, 0.0)
        self._heads = share < MIN_SHARE[precision]
        self._layers = layers_in_half(self.proto, precision, heads=self._heads)

    def build(self, keep: Collection[str] = ()) -> onnx.ModelProto:
        """The graph in half precision; the layers `keep` stay in fp32."""
        return narrow_products(self.proto, self.precision, keep, heads=self._heads)

    def with_dependencies(self, layers: Collection[str]) -> list[str]:
        """`layers`: any of them can stay in fp32 alone."""
        return list(layers)

    def by_cost(self, probes: Sequence[npt.NDArray[Any]]) -> list[str]:
        """The layers, first those that read or give numbers beyond the range of half, then from the one that moves the
        embeddings of `probes` most when its weights alone are rounded.

        What a layer reads and gives is rounded in any case: to keep it in fp32 saves its weights.
        """
        from tqdm import tqdm

        graph, peaks = self._measurable()
        session, images = open_session(graph.SerializeToString()), image_input(self.proto).name
        output = self.proto.graph.output[0].name

        def embeddings(weights: dict[str, npt.NDArray[Any]]) -> npt.NDArray[np.float32]:
            return np.concatenate([session.run([output], {images: batch, **weights})[0] for batch in probes])

        names = list(peaks)
        most = np.max([session.run([peaks[name] for name in names], {images: batch}) for batch in probes], 0)
        beyond = {name for name, peak in zip(names, most, strict=True) if not peak <= LARGEST[TYPES[self.precision]]}
        stored = {tensor.name: tensor for tensor in self.proto.graph.initializer}
        expected, costs = embeddings({}), {}
        for layer, nodes in tqdm(self._layers.items(), desc="sensitivity", unit="layer", leave=False, disable=None):
            weights = {name: self._rounded(stored[name]) for name in _weights(nodes, self.proto.graph)}
            parity = numeric_parity(expected, embeddings(weights))
            too_large = any(not beyond.isdisjoint((node.input[0], node.output[0])) for node in nodes)
            costs[layer] = (too_large, 1 - parity.mean_cosine)
        return sorted(costs, key=lambda layer: costs[layer], reverse=True)

    def _measurable(self) -> tuple[onnx.ModelProto, dict[str, str]]:
        """The graph with the weights of the layers as inputs that have a default, and further outputs: the largest
        number of what each layer reads and gives, by the names of these tensors."""
        import onnx
        from onnx import TensorProto, helper

        proto, peaks = onnx.ModelProto(), {}
        proto.CopyFrom(self.proto)
        proto.ir_version = max(proto.ir_version, 4)  # before, inputs had no default
        nodes = [node for layer in self._layers.values() for node in layer]
        weights = _weights(nodes, proto.graph)
        for tensor in proto.graph.initializer:
            if tensor.name in weights:
                proto.graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
        for name in dict.fromkeys(name for node in nodes for name in (node.input[0], node.output[0])):
            size, peaks[name] = f"{name}/size", f"{name}/peak"
            proto.graph.node.append(helper.make_node("Abs", [name], [size]))
            proto.graph.node.append(helper.make_node("ReduceMax", [size], [peaks[name]], keepdims=0))
            proto.graph.output.append(helper.make_tensor_value_info(peaks[name], TensorProto.FLOAT, []))
        return proto, peaks

    def _rounded(self, tensor: onnx.TensorProto) -> npt.NDArray[np.float32]:
        from onnx import numpy_helper

        return rounded(numpy_helper.to_array(tensor), TYPES[self.precision]).astype(np.float32)


def _weights(nodes: Sequence[onnx.NodeProto], graph: onnx.GraphProto) -> set[str]:
    """The names of the weights and biases of a layer, which is these nodes."""
    stored = {tensor.name for tensor in graph.initializer}
    made = {node.output[0] for node in nodes if node.op_type == "MatMul"}
    sums = [node for node in graph.node if node.op_type == "Add" and not made.isdisjoint(node.input)]
    return {name for node in (*nodes, *sums) for name in node.input if name in stored}
