"""Static int8 quantisation of an exported fp32 graph, with ONNX Runtime's quantizer: one recipe per target.

Loads no torch.
"""

from __future__ import annotations

import contextlib
import io
import logging
import tempfile
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from pmm.evaluation.parity.numeric import numeric_parity
from pmm.export.half_precision import pools
from pmm.export.options import MIN_SHARE
from pmm.export.parity_check import ParityFailed
from pmm.export.precision import onnx_precision
from pmm.runtime.ort_session import open_session

if TYPE_CHECKING:
    import onnx

BATCH = 8
PROBES = 16
"""Images to calibrate on at a time, and to measure the cost of layers on, where the batch is not static."""


_KEEPS_SIZE = ("Conv", "Relu", "Clip", "Sigmoid", "HardSigmoid", "HardSwish", "Mul", "Div", "Add")
"""Operators of squeeze and excitation, which make one value per channel of one value per channel."""


@dataclass(frozen=True)
class _Target:
    """What a backend wants to see in the file."""

    operators: tuple[str, ...]
    symmetric: bool
    """Signed activations with zero point 0, as TensorRT demands; else unsigned ones, which CPUs multiply faster, and
    weights of 7 bits, whose sums no CPU cuts off (see hardware.int8_overflows): the file is right on all of them."""
    options: dict[str, Any]

    @property
    def inputs_only(self) -> bool:
        """Only what goes into an operator is quantised, not what comes out of it."""
        return "OpTypesToExcludeOutputQuantization" in self.options


_TARGETS = {
    # TensorRT fuses Q/DQ pairs at the inputs of each convolution and at the shortcut of each residual Add (see
    # `_main_inputs`), and refuses an int32 bias. The weights are stored in 8 bits behind a Dequantize alone: a third of
    # the file, and the same engine, as Q/DQ on fp32
    "tensorrt": _Target(
        ("Conv", "Add"),
        True,
        {
            "ActivationSymmetric": True,
            "WeightSymmetric": True,
            "QuantizeBias": False,
            "DedicatedQDQPair": True,
            "OpTypesToExcludeOutputQuantization": ["Conv", "Add"],
        },
    ),
    # on a CPU every step between two convolutions stays in 8 bits: with the Relu after the residual Add left out, each
    # block would go through floats once
    "cpu": _Target(("Conv", "Add", "Relu", "Clip", "MaxPool"), False, {}),
}


class Quantizer:
    """Calibrates once; `build` then gives the quantised graph with any layers kept in fp32."""

    def __init__(self, proto: onnx.ModelProto, target: str, images: Sequence[npt.NDArray[Any]], input: str) -> None:
        """
        Args:
            proto: the fp32 graph.
            target: tensorrt or cpu.
            images: batches to calibrate on, as the graph's input `input` takes them.
        """
        from onnxruntime.quantization import CalibrationMethod, create_calibrator
        from tqdm import tqdm

        self.proto, self.target = proto, _TARGETS[target]
        self._main = _main_inputs(proto) if self.target.inputs_only else {}
        self._nodes = _quantisable(proto, self.target.operators)
        batches = iter(tqdm(images, desc="calibrating", unit="batch", leave=False, disable=None))
        reader = type("Batches", (), {"get_next": lambda self: next(({input: b} for b in batches), None)})()
        with tempfile.TemporaryDirectory() as folder, _quiet():
            source, augmented = Path(folder) / "model.onnx", str(Path(folder) / "augmented.onnx")
            source.write_bytes(proto.SerializeToString())
            # the extremes over all crops: on ReLU networks percentiles cut what tells people apart
            calibrator = create_calibrator(source, None, augmented, calibrate_method=CalibrationMethod.MinMax)
            calibrator.collect_data(reader)
            self.ranges = calibrator.compute_data()

    @property
    def layers(self) -> list[str]:
        """The convolutions that are quantised, by the name of their weights, in the graph's order."""
        return [_layer(node) for node in self._nodes if node.op_type == "Conv"]

    def with_dependencies(self, layers: Collection[str]) -> list[str]:
        """`layers` and those that have to stay in fp32 for what goes into `layers` to stay in fp32."""
        nodes = (node for layer in layers for node in self._excluded(layer))
        return list(dict.fromkeys(_layer(node) for node in nodes if node.op_type == "Conv"))

    def build(self, keep: Collection[str] = ()) -> onnx.ModelProto:
        """The quantised graph; the convolutions `keep`, and what goes into them, stay in fp32."""
        import onnx
        from onnxruntime.quantization import QuantType
        from onnxruntime.quantization.qdq_quantizer import QDQQuantizer

        copy = onnx.ModelProto()
        copy.CopyFrom(self.proto)
        with _quiet():
            quantizer = QDQQuantizer(
                copy,
                True,  # a scale per output channel of the weights
                not self.target.symmetric,  # weights of 7 bits
                QuantType.QInt8,
                QuantType.QInt8 if self.target.symmetric else QuantType.QUInt8,
                self.ranges,
                [node.name for node in self._nodes],
                [node.name for layer in keep for node in self._excluded(layer)],
                list(self.target.operators),
                dict(self.target.options),
            )
            quantizer.quantize_model()
            quantizer.model.topological_sort()
        proto = quantizer.model.model
        self._leave_main_inputs(proto.graph)
        # the quantizer writes a newer format
        proto.ir_version = self.proto.ir_version
        del proto.opset_import[:], proto.metadata_props[:]
        proto.opset_import.extend(self.proto.opset_import)
        del proto.graph.value_info[:]
        onnx.checker.check_model(proto, full_check=True)
        return proto

    def _excluded(self, layer: str) -> Iterator[onnx.NodeProto]:
        """The convolution `layer` and the sum that it is fused with or, where a target quantises outputs too, all back
        to what computes its input."""
        makers = {name: node for node in self.proto.graph.node for name in node.output}
        node = next(n for n in self.proto.graph.node if n.op_type == "Conv" and _layer(n) == layer)
        yield node
        yield from (add for add in self.proto.graph.node if self._main.get(add.name) == node.output[0])
        while not self.target.inputs_only and (node := makers.get(node.input[0])) is not None:
            if node.op_type not in self.target.operators:
                return
            yield node
            if node.op_type in ("Conv", "Add"):
                return

    def _leave_main_inputs(self, graph: onnx.GraphProto) -> None:
        """Take the Q/DQ pairs between a residual Add and its main input out again."""
        makers = {name: node for node in graph.node for name in node.output}
        for node in [node for node in graph.node if node.name in self._main]:
            for position, name in enumerate(node.input):
                back = makers[name]
                if back.op_type == "DequantizeLinear" and makers[back.input[0]].input[0] == self._main[node.name]:
                    node.input[position] = self._main[node.name]
                    graph.node.remove(makers[back.input[0]])
                    graph.node.remove(back)
        used = {name for node in graph.node for name in node.input}
        for tensor in [tensor for tensor in graph.initializer if tensor.name not in used]:
            graph.initializer.remove(tensor)


def _main_inputs(proto: onnx.ModelProto) -> dict[str, str]:
    """The residual Adds by name, and of each the input that is not the shortcut: the output of a convolution whose
    input nothing else reads (a shortcut's convolution reads where the ways part).

    NVIDIA's advice on placing Q/DQ (TensorRT's documentation, "Explicit Quantization"; modelopt.onnx does the same) is
    to quantise the shortcut only: the convolution, the Add and the Relu then become one kernel with 8 bits in and out,
    while a pair on the main input parts the Add from its convolution.
    """
    makers = {name: node for node in proto.graph.node for name in node.output}
    readers = Counter(name for node in proto.graph.node for name in node.input)
    main_inputs: dict[str, str] = {}
    for add in (node for node in proto.graph.node if node.op_type == "Add"):
        for name in add.input:
            maker = makers.get(name)
            if maker is not None and maker.op_type == "Conv" and readers[maker.input[0]] == 1:
                main_inputs.setdefault(add.name, name)
    return main_inputs


def _quantisable(proto: onnx.ModelProto, operators: Collection[str]) -> list[onnx.NodeProto]:
    """The nodes of `operators` that 8 bits make faster.

    Not the convolutions of squeeze and excitation, which have hardly any multiplications, and of sums only those of a
    convolution's output with another map.
    """
    convolved = {name for node in proto.graph.node if node.op_type == "Conv" for name in node.output}
    constants = {tensor.name for tensor in proto.graph.initializer}
    vectors: set[str] = set()
    """What is one value per channel, not a map."""
    found = []
    for node in proto.graph.node:
        computed = {name for name in node.input if name} - constants
        if pools(node) or (node.op_type in _KEEPS_SIZE and computed and computed <= vectors):
            vectors |= set(node.output)
        residual = not constants & set(node.input) and bool(convolved & set(node.input))
        if node.op_type in operators and vectors.isdisjoint(node.input) and (node.op_type != "Add" or residual):
            found.append(node)
    return found


def _layer(convolution: onnx.NodeProto) -> str:
    return convolution.input[1].removesuffix(".weight")


def quantize_with_fallback(
    quantizer: Quantizer, passes: Callable[[onnx.ModelProto], None], probes: Sequence[npt.NDArray[Any]]
) -> tuple[onnx.ModelProto, list[str]]:
    """The quantised graph and the layers that had to stay in fp32 for it to pass, most costly first.

    Args:
        passes: raises ParityFailed for a graph whose embeddings moved too far.
        probes: a few of the batches calibrated on; what each layer costs is measured on them.

    Raises:
        ParityFailed: it does not pass with most of the multiplications in int8.
    """
    keep: list[str] = []
    ranked: list[str] = []
    failure = ParityFailed("too few layers can be quantised")
    while True:
        proto = quantizer.build(keep)
        if onnx_precision(proto).share.get("int8", 0.0) < MIN_SHARE["int8"]:
            kept = len(quantizer.with_dependencies(keep))
            failure.problem += f", with {kept} of {len(ranked)} layers kept in fp32"
            raise failure
        try:
            passes(proto)
            return proto, quantizer.with_dependencies(keep)
        except ParityFailed as error:
            failure = error
        ranked = ranked or _by_cost(quantizer, probes)
        keep = ranked[: len(keep) + max(1, len(keep) // 2)]


def _by_cost(quantizer: Quantizer, probes: Sequence[npt.NDArray[Any]]) -> list[str]:
    """The layers, from the one whose return to fp32 mends the embeddings most."""
    from tqdm import tqdm

    expected = _embeddings(quantizer.proto, probes)

    def error(keep: Collection[str]) -> float:
        parity = numeric_parity(expected, _embeddings(quantizer.build(keep), probes))
        return 1 - parity.mean_cosine

    layers = quantizer.layers
    errors = {
        layer: error([layer]) for layer in tqdm(layers, desc="sensitivity", unit="layer", leave=False, disable=None)
    }
    return sorted(layers, key=lambda layer: errors[layer])


def _embeddings(proto: onnx.ModelProto, batches: Sequence[npt.NDArray[Any]]) -> npt.NDArray[np.float32]:
    session = open_session(proto.SerializeToString())
    name = session.get_inputs()[0].name
    return np.concatenate([session.run(None, {name: batch})[0] for batch in batches])


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The quantizer advises on the root logger, and prints."""
    level = logging.getLogger().level
    logging.getLogger().setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.getLogger().setLevel(level)
