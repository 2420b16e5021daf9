"""How the bench's reports write figures and the names of backends."""

from __future__ import annotations

import math
import re
from collections.abc import Callable

from pmm.bench.result_schema import Interval, Result

NONE = "-"
DISPLAY_NAMES = {
    "torch-compile": "torch.compile",
    "aoti": "AOTInductor",
    "ort-cpu": "ONNX Runtime",
    "ort-cuda": "ONNX Runtime",
    "tensorrt": "TensorRT",
    "tensorrt-rtx": "TensorRT-RTX",
    "openvino": "OpenVINO",
}


def display_name(result: Result) -> str:
    """A result's name in a sentence: "TensorRT fp16 on GPU (CUDA graph)"."""
    rest = result.name.removeprefix(result.backend).strip().removeprefix(result.precision).strip()
    backend = DISPLAY_NAMES.get(result.backend, result.backend)
    name = f"{backend} {result.precision} on {device_label(result.device)}"
    return one_line(f"{name} ({'CUDA graph' if rest == 'graph' else rest})" if rest else name)


def device_label(device: str) -> str:
    return {"cpu": "CPU", "cuda": "GPU"}.get(device, device)


def percent(fraction: float | None, digits: int = 1) -> str:
    return NONE if fraction is None else f"{100 * fraction:.{digits}f} %"


def points(fraction: float | None) -> str:
    """A difference in percentage points with its sign; one that rounds to zero has none."""
    if fraction is None:
        return NONE
    return "0.00" if abs(100 * fraction) < 0.005 else f"{100 * fraction:+.2f}"


def cosine(value: float | None) -> str:
    """Cut after six decimals: 0.9999999 must not read as 1."""
    return NONE if value is None else f"{math.floor(value * 1e6) / 1e6:.6f}"


def number(value: float | None) -> str:
    """Three significant digits, never in scientific notation."""
    if value is None:
        return NONE
    if 0 < abs(value) < 1000:
        return f"{value:.{max(0, 2 - math.floor(math.log10(abs(value))))}f}"
    return f"{value:,.0f}"


def small(value: float | None) -> str:
    """Two significant digits of a figure near zero: 0.00021 or 1.3e-07."""
    return NONE if value is None else f"{value:.2g}"


def threshold(value: float | None) -> str:
    """Four significant digits, for a configuration."""
    return NONE if value is None else f"{value:#.4g}"


def count(value: int | None) -> str:
    return NONE if value is None else f"{value:,}"


def size(value: int | None) -> str:
    """Bytes, as MB or GB."""
    if value is None:
        return NONE
    return f"{number(value / 1e9)} GB" if value >= 1e9 else f"{number(value / 1e6)} MB"


def seconds(value: float | None) -> str:
    return NONE if value is None else f"{number(value)} s"


def times(value: float | None) -> str:
    """A speedup: "1.83x"."""
    return NONE if value is None else f"{number(value)}x"


def between(interval: Interval | None, text: Callable[[float], str]) -> str:
    """An interval, "-0.09 to +0.05"; empty if there is none."""
    return "" if interval is None else f"{text(interval[0])} to {text(interval[1])}"


def one_in(share: float) -> str:
    """A small share as a ratio: 0.001 is "1 in 1,000"."""
    return f"1 in {1 / share:,.0f}" if 0 < share < 1 else percent(share)


def one_line(text: object) -> str:
    """`text` without line breaks and control characters, which a terminal would obey."""
    return " ".join("".join(c if c.isprintable() else " " for c in str(text)).split())


def escape(text: object) -> str:
    """As Markdown that shows `text` and nothing else: no markup, no table cell, no HTML."""
    return re.sub(r"([\\`*_\[\]<>|#&~])", r"\\\1", one_line(text))
