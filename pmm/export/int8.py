"""Static int8 quantisation of an exported fp32 graph, with ONNX Runtime's quantizer: one recipe per target.

Loads no torch.
"""

from __future__ import annotations

import contextlib
import io
import logging
import tempfile
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from pmm.evaluation.parity.numeric import numeric_parity
from pmm.export.int8_layers import (
    LAYERS,
    LINEAR,
    give_own_parameters,
    layer_names,
    main_inputs,
    quantisable,
    with_unique_names,
)
from pmm.export.int8_weights import float_layers, store_in_8_bits
from pmm.runtime.ort_session import open_session

if TYPE_CHECKING:
    import onnx

BATCH = 8
PROBES = 16
"""Images to calibrate on at a time, and to measure the cost of layers on, where the batch is not static."""


@dataclass(frozen=True)
class _Target:
    """How a backend needs the file to be quantised."""

    operators: tuple[str, ...]
    symmetric: bool
    """Signed activations with zero point 0, as TensorRT demands; else unsigned ones, which CPUs multiply faster, and
    weights of 7 bits, whose sums no CPU cuts off (see hardware.int8_overflows): the file is right on all of them."""
    float_outputs: tuple[str, ...]
    """Operators of which only what goes in is quantised, not what comes out."""
    options: dict[str, Any]
    narrow_heads: bool = True
    """Layers that compute in floats have their weights in 8 bits."""


_TARGETS = {
    # TensorRT fuses Q/DQ pairs at the inputs of each convolution and at the shortcut of each residual Add (see
    # `main_inputs`), and refuses an int32 bias. The weights are stored in 8 bits behind a Dequantize alone: a third of
    # the file, and the same engine, as Q/DQ on fp32
    "tensorrt": _Target(
        ("Conv", "MatMul", "Gemm", "Add"),
        True,
        ("Conv", "MatMul", "Gemm", "Add"),
        {
            "ActivationSymmetric": True,
            "WeightSymmetric": True,
            "QuantizeBias": False,
            "DedicatedQDQPair": True,
        },
    ),
    # on a CPU every step between two convolutions stays in 8 bits: with the Relu after the residual Add left out, each
    # block would go through floats once. What follows linear layers has no 8-bit kernels (LayerNormalization, Gelu,
    # Softmax): their products give floats, as MatMulIntegerToFloat and QGemm
    "cpu": _Target(("Conv", "MatMul", "Gemm", "Add", "Mul", "Relu", "Clip", "MaxPool"), False, ("MatMul", "Gemm"), {}),
    # as for other CPUs, but what `int8_opencv` has no form for stays in floats
    "opencv": _Target(("Conv", "Add", "Mul", "Relu", "Clip", "MaxPool"), False, (), {}, narrow_heads=False),
}


class Quantizer:
    """Calibrates once; `build` then gives the quantised graph with any layers kept in fp32."""

    precision = "int8"

    def __init__(self, proto: onnx.ModelProto, target: str, images: Sequence[npt.NDArray[Any]], input: str) -> None:
        """
        Args:
            proto: the fp32 graph.
            target: tensorrt, cpu or opencv.
            images: batches to calibrate on, as the graph's input `input` takes them.
        """
        from onnxruntime.quantization import CalibrationMethod, create_calibrator
        from tqdm import tqdm

        self.proto, self.target = with_unique_names(proto), _TARGETS[target]
        self._main = main_inputs(self.proto) if "Add" in self.target.float_outputs else {}
        self._nodes = quantisable(self.proto, self.target.operators)
        self._quantised = {node.name for node in self._nodes}
        self._in_floats = float_layers(self.proto, self._quantised) if self.target.narrow_heads else []
        """Only their weights are stored in 8 bits."""
        self._names = layer_names(self.proto)
        batches = iter(tqdm(images, desc="calibrating", unit="batch", leave=False, disable=None))
        reader = type("Batches", (), {"get_next": lambda self: next(({input: b} for b in batches), None)})()
        with tempfile.TemporaryDirectory() as folder, _quiet():
            source, augmented = Path(folder) / "model.onnx", str(Path(folder) / "augmented.onnx")
            source.write_bytes(self.proto.SerializeToString())
            # the extremes over all crops: on ReLU networks percentiles cut what tells people apart
            calibrator = create_calibrator(
                source, list(self.target.operators), augmented, calibrate_method=CalibrationMethod.MinMax
            )
            calibrator.infer_session = _reducing_session(augmented)
            calibrator.collect_data(reader)
            self.ranges = calibrator.compute_data()

    @property
    def layers(self) -> list[str]:
        """The layers that are quantised, by the names of their weights, in the graph's order; last those of which only
        the weights are."""
        nodes = (*self._nodes, *self._in_floats)
        return list(dict.fromkeys(self._names[node.input[1]] for node in nodes if node.op_type in LAYERS))

    def only_weights(self, keep: Collection[str] = ()) -> list[str]:
        """The layers, without those of `keep`, that have only their weights in 8 bits and compute in floats."""
        return [
            name for name in dict.fromkeys(self._names[node.input[1]] for node in self._in_floats) if name not in keep
        ]

    def with_dependencies(self, layers: Collection[str]) -> list[str]:
        """`layers` and those that have to stay in fp32 for what goes into `layers` to stay in fp32."""
        nodes = (node for layer in layers for node in self._excluded(layer))
        return list(dict.fromkeys(self._names[node.input[1]] for node in nodes if node.op_type in LAYERS))

    def build(self, keep: Collection[str] = ()) -> onnx.ModelProto:
        """The quantised graph; the layers `keep`, and what goes into them, stay in fp32."""
        excluded = [node.name for layer in keep for node in self._excluded(layer)]
        return self._built(excluded, self.target.float_outputs)

    def _built(self, excluded: Collection[str], float_outputs: Collection[str]) -> onnx.ModelProto:
        """The quantised graph, in which the nodes `excluded` stay in fp32; `float_outputs` as `_Target` has them."""
        import onnx
        from onnxruntime.quantization import QuantType
        from onnxruntime.quantization.qdq_quantizer import QDQQuantizer

        copy = onnx.ModelProto()
        copy.CopyFrom(self.proto)
        give_own_parameters(copy)
        options = {"OpTypesToExcludeOutputQuantization": list(float_outputs), **self.target.options}
        with _quiet():
            quantizer = QDQQuantizer(
                copy,
                True,  # a scale per output channel of the weights
                not self.target.symmetric,  # weights of 7 bits
                QuantType.QInt8,
                QuantType.QInt8 if self.target.symmetric else QuantType.QUInt8,
                self.ranges,
                [node.name for node in self._nodes],
                list(excluded),
                list(self.target.operators),
                options,
            )
            quantizer.quantize_model()
            quantizer.model.topological_sort()
        proto = quantizer.model.model
        self._leave_main_inputs(proto.graph)
        self._leave_float_inputs(proto.graph, excluded)
        in_floats = {node.name for node in self._in_floats} - {*excluded}
        store_in_8_bits(proto.graph, in_floats, dequantize=self.target.symmetric)
        _remove_unread(proto.graph)
        # the quantizer writes a newer format
        proto.ir_version = self.proto.ir_version
        del proto.opset_import[:], proto.metadata_props[:]
        proto.opset_import.extend(self.proto.opset_import)
        del proto.graph.value_info[:]
        onnx.checker.check_model(proto, full_check=True)
        return proto

    def by_cost(self, probes: Sequence[npt.NDArray[Any]]) -> list[str]:
        """The layers, from the one that alone in 8 bits moves the embeddings of `probes` most.

        With all others in 8 bits too, the harm of a few would hide what one of these costs.
        """
        from tqdm import tqdm

        expected, errors = _embeddings(self.proto, probes), {}
        for layer in tqdm(self.layers, desc="sensitivity", unit="layer", leave=False, disable=None):
            # not by `build` without the other layers: where a target quantises outputs too, what goes into these, and
            # so this layer, would stay in fp32 with them
            others = [
                node.name
                for node in (*self._nodes, *self._in_floats)
                if node.op_type not in LAYERS or self._names[node.input[1]] != layer
            ]
            # what comes out counts for the layers that read it: to keep these keeps it in fp32 too
            alone = self._built(others, self.target.operators)
            errors[layer] = 1 - numeric_parity(expected, _embeddings(alone, probes)).mean_cosine
        return sorted(errors, key=lambda layer: errors[layer], reverse=True)

    def _excluded(self, layer: str) -> Iterator[onnx.NodeProto]:
        """The nodes of `layer` and the sums that they are fused with or, where a target quantises outputs too, all back
        to what computes their inputs."""
        makers = {name: node for node in self.proto.graph.node for name in node.output}
        for node in self.proto.graph.node:
            if node.op_type not in LAYERS or self._names[node.input[1]] != layer:
                continue
            yield node
            if node.name not in self._quantised:  # what goes into it is not in 8 bits for its sake
                continue
            yield from (add for add in self.proto.graph.node if self._main.get(add.name) == node.output[0])
            before = makers.get(node.input[0])
            while before is not None and self._gives_8_bits(before):
                yield before
                if before.op_type in ("Conv", "Add"):
                    break
                before = makers.get(before.input[0])

    def _gives_8_bits(self, node: onnx.NodeProto) -> bool:
        return node.name in self._quantised and node.op_type not in self.target.float_outputs

    def _leave_main_inputs(self, graph: onnx.GraphProto) -> None:
        """Take the Q/DQ pairs between a residual Add and its main input out again."""
        makers = {name: node for node in graph.node for name in node.output}
        for node in (node for node in graph.node if node.name in self._main):
            for position, name in enumerate(node.input):
                back = makers.get(name)
                quantised = makers.get(back.input[0]) if back and back.op_type == "DequantizeLinear" else None
                if quantised and quantised.input[0] == self._main[node.name]:
                    node.input[position] = self._main[node.name]

    def _leave_float_inputs(self, graph: onnx.GraphProto, excluded: Collection[str]) -> None:
        """Let nodes that are not quantised read the floats that they read before, unless those are made in 8 bits.

        The quantizer puts a Q/DQ pair before all readers of a tensor. In a transformer LayerNormalization and the
        residual sum read it too, and a residual stream that is rounded in every block moves the embeddings. In networks
        of convolutions alone such readers are few, and their files stay what they are.
        """
        if not any(node.op_type in LINEAR for node in self._nodes):
            return
        quantised = self._quantised - set(excluded)
        in_8_bits = {name for node in self._nodes if node.name in quantised and self._gives_8_bits(node)
                     for name in node.output}  # fmt: skip
        before = {node.name: list(node.input) for node in self.proto.graph.node}
        weights = {tensor.name: tensor for tensor in self.proto.graph.initializer}
        restored = set()
        for node in (node for node in graph.node if node.name in before.keys() - quantised):
            for position, name in enumerate(before[node.name]):
                if node.input[position] != name and name not in in_8_bits:
                    node.input[position] = name
                    restored.add(name)
        stored = {tensor.name for tensor in graph.initializer}
        graph.initializer.extend(weights[name] for name in weights if name in restored - stored)


def _remove_unread(graph: onnx.GraphProto) -> None:
    """Remove Q/DQ pairs and constants that nothing reads any more."""
    read = Counter(name for node in graph.node for name in node.input)
    read.update(value.name for value in graph.output)
    for node in reversed(list(graph.node)):
        if node.op_type in ("QuantizeLinear", "DequantizeLinear") and not read[node.output[0]]:
            read.subtract(node.input)
            graph.node.remove(node)
    for tensor in [tensor for tensor in graph.initializer if not read[tensor.name]]:
        graph.initializer.remove(tensor)


def _embeddings(proto: onnx.ModelProto, batches: Sequence[npt.NDArray[Any]]) -> npt.NDArray[np.float32]:
    session = open_session(proto.SerializeToString())
    name = session.get_inputs()[0].name
    return np.concatenate([session.run(None, {name: batch})[0] for batch in batches])


def _reducing_session(file: str) -> Any:
    """The calibrator's session, but it reduces each tensor to its extremes as soon as that can be: in ONNX Runtime's
    default order most tensors of a batch are held at once, four gigabytes of them in a small Swin transformer."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.execution_order = onnxruntime.ExecutionOrder.PRIORITY_BASED
    return onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])


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
