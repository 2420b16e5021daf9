"""The style of a result in every plot: a colour for its backend, a marker for its precision."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pmm.bench.pages.format import device_label
from pmm.bench.result_schema import Result

# Legible on white and on near-black.
COLOURS = {
    "torch": "#7d8590",
    "torch-compile": "#cc5fa5",
    "aoti": "#a98f00",
    "ort-cpu": "#1f88d1",
    "ort-cuda": "#35b5c9",
    "tensorrt": "#17a077",
    "tensorrt-rtx": "#7a6ff0",
    "openvino": "#e07b00",
}
SPARE = ("#cf4a3c", "#9a6b4f", "#5b8c2a", "#b06ad4")
MARKERS = {"fp32": "o", "tf32": "D", "fp16": "s", "bf16": "^", "int8": "X"}
OTHER_PRECISION = "P"
NEUTRAL = "#8b929c"
GROUND = "#fffffe"
"""Colour of the page, as an edge between dots that overlap; replaced for a dark page."""


@dataclass(frozen=True)
class Style:
    colour: str
    marker: str
    fill: str = "full"
    """As matplotlib's fillstyle: it differs between results of one colour and marker."""

    def dot(self, size: float) -> dict[str, Any]:
        """Arguments of a plot without a line."""
        size *= {"X": 1.2, "^": 1.1, "D": 0.85}.get(self.marker, 1)  # so that all look equally large
        look = {"color": self.colour, "marker": self.marker, "markersize": size, "linestyle": "none"}
        if self.fill == "full":
            return {**look, "markeredgecolor": GROUND, "markeredgewidth": 0.7}
        return {**look, "fillstyle": self.fill, "markerfacecoloralt": GROUND, "markeredgewidth": 1.4}


FILLS = ("full", "none", "left", "top", "right", "bottom")


def styles_of(results: Sequence[Result]) -> dict[str, Style]:
    """Name of a result -> its style; no two alike up to six results of one backend, device and precision."""
    colours: dict[tuple[str, str], str] = {}
    styles: dict[str, Style] = {}
    spare = list(SPARE)
    for result in sorted(results, key=lambda r: r.name):
        key = (result.backend, result.device)
        if key not in colours:
            usual = COLOURS.get(result.backend)
            # a backend on both devices has two colours
            colours[key] = usual if usual and usual not in colours.values() else spare.pop(0) if spare else NEUTRAL
        marker = MARKERS.get(result.precision, OTHER_PRECISION)
        same = sum((s.colour, s.marker) == (colours[key], marker) for s in styles.values())
        styles[result.name] = Style(colours[key], marker, FILLS[same % len(FILLS)])
    return styles


Entry = tuple[str, Style | str]
"""An entry of a legend: text, and a style or a colour alone."""


def legend_entries(results: Sequence[Result], styles: dict[str, Style]) -> list[list[Entry]]:
    """Backends by colour; precisions by marker; results that differ in the filling only."""
    ordered = sorted(results, key=lambda r: r.name)
    colours = {(r.backend, r.device): styles[r.name].colour for r in ordered}
    names = [backend for backend, _ in colours]
    backends: list[Entry] = [
        (f"{backend} on {device_label(device)}" if names.count(backend) > 1 else backend, colour)
        for (backend, device), colour in colours.items()
    ]
    used = {r.precision: styles[r.name].marker for r in results}
    order = [*MARKERS, *sorted(set(used) - set(MARKERS))]
    precisions: list[Entry] = [(p, Style(NEUTRAL, used[p])) for p in order if p in used]
    twins = [r for r in ordered if styles[r.name].fill != "full"]
    if twins and all(r.cuda_graph and styles[r.name].fill == "none" for r in twins):
        return [backends, [*precisions, ("hollow: CUDA graph", Style(NEUTRAL, "o", "none"))]]
    return [backends, precisions, [(r.name, styles[r.name]) for r in twins]] if twins else [backends, precisions]
