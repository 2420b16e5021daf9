"""The precision of an engine, read from the parsed network and from the built engine.

Loads no torch.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

from pmm.export.precision import GraphPrecision, tally
from pmm.utils.errors import InvalidFile, UserError


def network_precision(trt: Any, network: Any, path: Path | None = None) -> GraphPrecision:
    """Multiply-accumulates per type of a parsed network; a strongly typed build keeps its types.

    A product whose two inputs come out of Dequantize layers is int8, else of the type it gives.
    """
    layers = [network.get_layer(index) for index in range(network.num_layers)]
    makers = {layer.get_output(0).name: layer for layer in layers if layer.num_outputs}
    with _one_image(network):
        return tally(_products(trt, layers, makers), path)


@contextlib.contextmanager
def _one_image(network: Any) -> Iterator[None]:
    """With sizes known: where windows of an image are part of the batch, as in Swin transformers, they are -1 too."""
    tensors = [network.get_input(index) for index in range(network.num_inputs)]
    shapes = [tuple(tensor.shape) for tensor in tensors]
    for tensor, shape in zip(tensors, shapes, strict=True):
        tensor.shape = tuple(abs(size) for size in shape[:1]) + shape[1:]
    try:
        yield
    finally:
        for tensor, shape in zip(tensors, shapes, strict=True):
            tensor.shape = shape


def _products(trt: Any, layers: list[Any], makers: dict[str, Any]) -> Iterator[tuple[str, int]]:
    names = {trt.float32: "fp32", trt.float16: "fp16", trt.bfloat16: "bf16"}
    for layer in layers:
        if layer.type not in (trt.LayerType.CONVOLUTION, trt.LayerType.MATRIX_MULTIPLY):
            continue
        data, output = layer.get_input(0), layer.get_output(0)
        weights = layer.get_input(1) if layer.num_inputs > 1 else None
        if layer.type == trt.LayerType.CONVOLUTION:
            # the binding returns layers as their base class; its documentation casts them in this way
            layer.__class__ = trt.IConvolutionLayer
            terms = abs(data.shape[1]) // layer.num_groups * prod(layer.kernel_size_nd)
        else:
            terms = abs(data.shape[-1])
        sources = [_source(trt, tensor, makers) for tensor in (data, weights)]
        dequantised = [
            source is not None and source.type == trt.LayerType.DEQUANTIZE and source.get_input(0).dtype == trt.int8
            for source in sources
        ]
        # a dynamic batch is -1: one image
        yield "int8" if all(dequantised) else names.get(output.dtype, "other"), abs(prod(output.shape)) * terms


def _source(trt: Any, tensor: Any, makers: dict[str, Any]) -> Any:
    """The layer that gives `tensor`, whose shape may have changed since: the parser makes weights [K, N] of linear
    layers [1, K, N]."""
    layer = makers.get(tensor.name) if tensor is not None else None
    while layer is not None and layer.type == trt.LayerType.SHUFFLE:
        layer = makers.get(layer.get_input(0).name)
    return layer


class Inspection(NamedTuple):
    """The types in a built engine, by the engine inspector."""

    types: frozenset[str]
    """Of all tensors, weights and kernels: fp32, tf32, fp16, bf16, int8."""
    silent: int
    """Layers without a type in the answer."""

    def confirms(self, precision: str, engine: str, *, tf32: bool = False) -> bool:
        """True if the engine computes in `precision`; False if the inspector does not show it.

        Args:
            tf32: an fp32 engine may use TF32.

        Raises:
            InvalidFile: the inspector shows another precision.
        """
        lower = self.types & ({"fp16", "bf16", "int8"} | (set() if tf32 else {"tf32"})) if precision == "fp32" else None
        if lower or (self.types and precision not in self.types and not self.silent):
            types = ", ".join(sorted(self.types))
            raise InvalidFile(f"the engine inspector shows {types} in it", path=engine, expected=precision)
        return precision in self.types


def inspected(inspector_json: str) -> Inspection:
    """Read the engine inspector's JSON (detailed verbosity).

    TensorRT 8.6 and 10 give a tensor's type and layout together under "Format/Datatype", as "Channel major FP16 format
    where channel % 8 == 0"; 11 splits them. Without an execution context whose shapes are set, both give "N/A due to
    dynamic shapes" (NvInferRuntime.h, IEngineInspector), and some engines do so even with one; the type is then
    that of the weights, or part of the kernel's name (sm80_xmma_fprop_implicit_gemm_f16f16_...).

    Raises UserError for an answer that is no such JSON.
    """
    types = [layer.types for _, layer in _layers(inspector_json)]
    return Inspection(frozenset().union(*types), sum(not of_layer for of_layer in types))


class Layer(NamedTuple):
    """One layer by the engine inspector; empty where it has nothing."""

    type: str
    format: str
    """Layout and type of its outputs."""
    types: frozenset[str]
    """As in `Inspection`."""


def layers_of(inspector_json: str) -> dict[str, Layer]:
    """The layers by name. Raises UserError as `inspected`."""
    return dict(_layers(inspector_json))


def _layers(inspector_json: str) -> list[tuple[str, Layer]]:
    try:
        return [_layer(layer) for layer in json.loads(inspector_json)["Layers"]]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"cannot read the engine inspector's answer ({type(error).__name__})") from error


def _layer(layer: Any) -> tuple[str, Layer]:
    if isinstance(layer, str):
        return layer, Layer("", "", frozenset())
    types = frozenset(_types(layer))
    formats = [" ".join(filter(None, map(tensor.get, _FORMATS))) for tensor in layer.get("Outputs", [])]
    return layer.get("Name", ""), Layer(layer.get("LayerType", ""), ", ".join(dict.fromkeys(formats)), types)


_DATATYPES = ("Format/Datatype", "Datatype", "DataType")
_FORMATS = ("Format", *_DATATYPES)


_WORDS = {"float": "fp32", "fp32": "fp32", "half": "fp16", "fp16": "fp16", "bfloat16": "bf16", "bf16": "bf16",
          "int8": "int8"}  # fmt: skip
_OPERANDS = {"tf32": "tf32", "bf16": "bf16", "f16": "fp16", "f32": "fp32", "i8": "int8", "s8": "int8"}
_KERNEL = re.compile(rf"(?<![a-z0-9])({'|'.join(_OPERANDS)})(?={'|'.join(_OPERANDS)}|i32|s32)")
"""The first operand in a kernel's name: f16 in ..._gemm_f16f16_f16f32_f32_..."""


def _types(layer: Any) -> set[str]:
    """Of one layer."""
    # what Myelin compiled as a whole shows its outer tensors only
    opaque = layer.get("LayerType") == "Myelin" or "ForeignNode" in layer.get("Name", "")
    tensors = [] if opaque else [*layer.get("Inputs", []), *layer.get("Outputs", [])]
    texts = [tensor.get(key, "") for tensor in tensors for key in _DATATYPES]
    weights = layer.get("Weights", {})
    texts.append(weights.get("Type", "") if isinstance(weights, dict) and weights.get("Count", 1) else "")
    types = {_WORDS[word] for text in texts for word in re.findall(r"[a-z0-9]+", text.lower()) if word in _WORDS}
    kernel = _KERNEL.search(str(layer.get("TacticName", "")).lower())
    return types | ({_OPERANDS[kernel[1]]} if kernel else set())
