"""Ink, colours and type that the pictures share."""

from __future__ import annotations

from typing import Any

Colour = tuple[int, int, int]

INK: Colour = (40, 44, 56)
FAINT: Colour = (105, 111, 123)
EMPTY: Colour = (235, 237, 241)
RULE: Colour = (205, 209, 216)

PLOT_INK, PLOT_FAINT = "#24292f", "#8b929c"
LINES = ("#1f88d1", "#e07b00", "#17a077", "#cc5fa5", "#7a6ff0", "#a98f00", "#cf4a3c", "#7d8590")
"""Of curves: apart for colour-blind eyes in this order, legible on white."""


def plot_style() -> dict[Any, Any]:
    """Settings of matplotlib (Any: its stubs list every one by name)."""
    return {
        "text.color": PLOT_INK, "axes.labelcolor": PLOT_INK, "xtick.labelcolor": PLOT_INK,
        "ytick.labelcolor": PLOT_INK, "xtick.color": PLOT_FAINT, "ytick.color": PLOT_FAINT,
        "axes.edgecolor": PLOT_FAINT, "grid.color": PLOT_FAINT, "grid.alpha": 0.25, "axes.grid": True,
        "axes.axisbelow": True, "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False,
        "legend.fontsize": 9.5, "font.size": 10.5, "axes.labelsize": 10,
        # a name with dollar signs is no formula
        "text.parse_math": False,
    }  # fmt: skip


def shortened(name: str) -> str:
    """A name that leaves room for the picture, 26 characters; cut in the middle, since names differ at their ends."""
    return name if len(name) <= 26 else f"{name[:13]}\u2026{name[-12:]}"
