"""In which precision does an engine compute? Read from the parsed network, and from the built engine.

Loads no torch.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from math import prod
from typing import Any

from pmm.errors import UserError
from pmm.export.precision import Found, tally


def network_precision(trt: Any, network: Any) -> Found:
    """Multiply-accumulates per type of a parsed network; a strongly typed build keeps its types.

    A product whose two inputs come out of Dequantize layers is int8, else of the type it gives.
    """
    layers = [network.get_layer(index) for index in range(network.num_layers)]
    makers = {layer.get_output(0).name: layer for layer in layers if layer.num_outputs}
    return tally(_products(trt, layers, makers))


def _products(trt: Any, layers: list[Any], makers: dict[str, Any]) -> Iterator[tuple[str, int]]:
    names = {trt.float32: "fp32", trt.float16: "fp16", trt.bfloat16: "bf16"}
    for layer in layers:
        if layer.type not in (trt.LayerType.CONVOLUTION, trt.LayerType.MATRIX_MULTIPLY):
            continue
        data, output = layer.get_input(0), layer.get_output(0)
        weights = layer.get_input(1) if layer.num_inputs > 1 else None
        if layer.type == trt.LayerType.CONVOLUTION:
            # the binding hands out layers as their base class; its own documentation casts them in this way
            layer.__class__ = trt.IConvolutionLayer
            terms = abs(data.shape[1]) // layer.num_groups * prod(layer.kernel_size_nd)
        else:
            terms = abs(data.shape[-1])
        dequantised = [
            tensor is not None
            and tensor.name in makers
            and makers[tensor.name].type == trt.LayerType.DEQUANTIZE
            and makers[tensor.name].get_input(0).dtype == trt.int8
            for tensor in (data, weights)
        ]
        # a dynamic batch is -1: one image
        yield "int8" if all(dequantised) else names.get(output.dtype, "other"), abs(prod(output.shape)) * terms


def inspected_precisions(inspector_json: str) -> set[str]:
    """The types of the tensors inside a built engine, from the engine inspector's JSON (detailed verbosity)."""
    words = {"float": "fp32", "fp32": "fp32", "half": "fp16", "fp16": "fp16", "bfloat16": "bf16", "bf16": "bf16",
             "int8": "int8"}  # fmt: skip
    try:
        layers = json.loads(inspector_json)["Layers"]
        tensors = [tensor for layer in layers if isinstance(layer, dict)
                   for tensor in (*layer.get("Inputs", []), *layer.get("Outputs", []))]  # fmt: skip
        described = [str(tensor.get("Format/Datatype", tensor.get("Datatype", ""))) for tensor in tensors]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"the engine inspector's answer is not understood ({type(error).__name__})") from error
    return {words[word] for text in described for word in text.lower().replace(",", " ").split() if word in words}


def check_inspected(found: set[str], asked: str, name: str) -> None:
    """Raises UserError if the engine holds no tensor of the precision asked for, or a lower one in an fp32 engine."""
    lower = found & {"fp16", "bf16", "int8"} if asked == "fp32" else set()
    if asked not in found or lower:
        held = ", ".join(sorted(found)) or "no type that is known"
        raise UserError(f"{name}: asked for {asked}, but the engine inspector finds {held} in the engine")
