"""An ablation as a picture: per row the paired difference of every seed, their mean and its interval."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pmm.ablation.report import COMPARED, Report, describe_data
from pmm.bench.pages.format import points
from pmm.bench.pages.plots import short
from pmm.bench.pages.styles import GROUND, NEUTRAL
from pmm.visualize.style import plot_style

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = {"higher": "#17a077", "lower": "#cf4a3c"}
"""By the reading of a difference; NEUTRAL for all others."""
MARKERS = {"higher": "^", "lower": "v"}
MIN_POINTS = 1.0
"""The least range of an axis to either side of 0: noise must not look like a difference."""


def plot(report: Report) -> bytes | None:
    """A PNG with a panel per metric; None if no rows can be compared."""
    import matplotlib
    from matplotlib.figure import Figure

    rows = [row for row in report["rows"] if _of(row, next(iter(COMPARED)))["per_seed"]]
    if not rows:
        return None
    with matplotlib.rc_context(plot_style()):
        figure = Figure(figsize=(10, 1.6 + 0.45 * len(rows)), layout="constrained")
        panels = figure.subplots(1, len(COMPARED), sharey=True)
        for axes, (metric, name) in zip(panels, COMPARED.items(), strict=True):
            _panel(axes, [_of(row, metric) for row in rows])
            axes.set_xlabel(f"{name} minus {short(report['against'])}'s, points")
        panels[0].set_yticks(range(len(rows)), [short(row["name"]) for row in rows])
        panels[0].set_ylim(len(rows) - 0.5, -0.5)
        figure.suptitle(_title(report), fontsize=10.5, x=0.01, ha="left")
        drawn = io.BytesIO()
        figure.savefig(drawn, format="png", dpi=160, facecolor=GROUND, metadata={"Software": None})
    return drawn.getvalue()


def _of(row: Mapping[str, Any], metric: str) -> Mapping[str, Any]:
    return row["metrics"][metric]["difference"] or {"per_seed": []}


def _panel(axes: Axes, differences: Sequence[Mapping[str, Any]]) -> None:
    """A line per row: the mark is the mean, the bar its interval, and the dots below are the seeds."""
    shown = [-MIN_POINTS, MIN_POINTS]
    for y, difference in enumerate(differences):
        colour = COLOURS.get(difference["reading"], NEUTRAL)
        seeds = [100 * value for value in difference["per_seed"]]
        ends = [100 * end for end in difference["interval"] or ()]
        shown += seeds + ends
        axes.plot(ends, [y] * len(ends), color=colour, linewidth=4.5, alpha=0.45, solid_capstyle="butt")
        axes.plot(seeds, [y + 0.24] * len(seeds), "o", markersize=4.5, markerfacecolor="none", markeredgecolor=colour)
        axes.plot([100 * difference["mean"]], [y], MARKERS.get(difference["reading"], "D"), markersize=8, color=colour,
                  markeredgecolor=GROUND, markeredgewidth=0.7)  # fmt: skip
        axes.annotate(points(difference["mean"]), (100 * difference["mean"], y), (0, 6), textcoords="offset points",
                      ha="center", va="bottom", fontsize=8.5)  # fmt: skip
    axes.axvline(0, color=NEUTRAL, linewidth=1.2, zorder=0)
    room = 0.08 * (max(shown) - min(shown))
    axes.set_xlim(min(shown) - room, max(shown) + room)
    axes.grid(visible=False, axis="y")
    axes.tick_params(axis="y", length=0)


def _title(report: Report) -> str:
    count = len(report["seeds"])
    bar = "bar: its 95 % interval; grey: no significant difference" if count > 1 else "no interval from one seed"
    dots = f"dots: {count} seeds" if count > 1 else "dot: one seed"
    return f"{describe_data(report)}\nMark: mean of the paired differences; {bar}; {dots}"
