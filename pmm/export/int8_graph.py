"""The graph of an export in int8, and what its manifest says of the quantisation. Loads no torch."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Collection
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from pmm.data.preprocessing import Crops
from pmm.export.fallback import convert_with_fallback
from pmm.export.half_conversion import to_half
from pmm.export.half_precision import fp16_between
from pmm.export.int8 import BATCH, PROBES, Quantizer
from pmm.export.int8_opencv import for_opencv
from pmm.export.options import ExportOptions
from pmm.export.parity_check import ParityCheck, ParityFailed
from pmm.export.reference import in_memory
from pmm.export.source import ExportSource
from pmm.utils.hardware import installed_version

if TYPE_CHECKING:
    import onnx


def quantize_graph(
    source: ExportSource, options: ExportOptions, calibration: Crops, parity_check: ParityCheck | None, name: str
) -> tuple[onnx.ModelProto, dict[str, Any]]:
    """The graph of `source` in int8, with as many layers in higher precision as `parity_check` needs, and
    `Manifest.quantization` of it.

    Args:
        calibration: crops [N, H, W, 3] that show the ranges of all tensors.
        name: of the file to write, for messages.

    Raises ParityFailed if no choice of layers passes.
    """
    contract, size = source.input(options), source.fed(options)
    feeds = _feeds(source, options, calibration)
    quantizer = Quantizer(source.graph(options), options.target, feeds, contract.name)

    def passes(candidate: onnx.ModelProto, allowance: float) -> None:
        if parity_check:
            finished = _finished(candidate, source, options)
            embed = in_memory(finished, contract, size, float_biases=options.int8_fallback == "fp16")
            check = dataclasses.replace(parity_check, allowance=allowance)
            check.check(embed, options.precision, name, "ONNX Runtime")

    try:
        probes = feeds[: max(1, PROBES // len(feeds[0]))]
        quantized, kept = convert_with_fallback(quantizer, passes, probes)
    except ParityFailed as error:
        error.hint = _hint(options) or error.hint
        raise
    facts = _facts(options, calibration, kept, quantizer.only_weights(kept))
    return _finished(quantized, source, options), facts


def is_quantized_so(quantization: dict[str, Any], options: ExportOptions) -> bool:
    """Whether a manifest's `quantization` is that of an export with `options`."""
    calibration = quantization.get("calibration", {})
    has = *(quantization.get(key) for key in ("target", "fallback")), calibration.get("of"), calibration.get("asked")
    return has == (options.target, options.int8_fallback, _calibrated_on(options), options.calibration_images)


def _feeds(source: ExportSource, options: ExportOptions, crops: Crops) -> list[npt.NDArray[Any]]:
    """Batches of `crops`, as the graph takes them."""
    contract, size = source.input(options), source.fed(options)
    batch = contract.batch or BATCH
    if contract.batch:  # filled up with the same crops: the extremes stay what they are
        crops = np.resize(crops, (-(-len(crops) // batch) * batch, *crops.shape[1:]))
    return [contract.feed(crops[k : k + batch], size) for k in range(0, len(crops), batch)]


def _finished(graph: onnx.ModelProto, source: ExportSource, options: ExportOptions) -> onnx.ModelProto:
    """The quantised `graph` as its target reads it, with its other layers in the precision that `options` gives
    them."""
    if options.target == "opencv":
        return for_opencv(graph)
    if options.int8_fallback == "fp32":
        return graph
    return to_half(graph, "fp16") if source.method == "adopted" else fp16_between(graph)


def _facts(
    options: ExportOptions, calibration: Crops, kept: Collection[str], only_weights: Collection[str]
) -> dict[str, Any]:
    return {
        "target": options.target,
        "fallback": options.int8_fallback,
        "calibration": {
            "of": _calibrated_on(options),
            "asked": options.calibration_images,
            "images": len(calibration),
            "pixels_sha256": hashlib.sha256(calibration.tobytes()).hexdigest(),
            "method": "minmax",
        },
        f"kept_in_{options.int8_fallback}": kept,
        "only_weights_in_8_bits": only_weights,
    }


def _calibrated_on(options: ExportOptions) -> str:
    """No path: two exports of one checkpoint are byte-equal, wherever the crops are."""
    return "a folder that was given" if options.calibration_root else "the training set of the checkpoint"


def _hint(options: ExportOptions) -> str:
    """What may be to blame for embeddings of int8 with fp16 that moved, which ONNX Runtime judges."""
    import onnxruntime

    version = onnxruntime.__version__
    if options.int8_fallback != "fp16" or tuple(map(int, version.split(".")[:2])) >= (1, 30):
        return ""
    package = "onnxruntime-gpu" if installed_version("onnxruntime-gpu") else "onnxruntime"
    return (
        f"ONNX Runtime before 1.30 computes int8 with fp16 wrongly on CPUs, and this is {version}: "
        f'pip install "{package}>=1.30"'
    )
