"""A bench result in pictures: SVG plots for a light and for a dark page, as data URIs."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pmm.bench.wording import Result, batch_sizes, label, number, timing_at

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

# One colour and marker per result, the same in every plot; legible on white and on near-black.
_COLOURS = ("#7d8590", "#1f88d1", "#e07b00", "#17a077", "#cc5fa5", "#a98f00", "#7a6ff0", "#cf4a3c")
_MARKERS = "oDs^vPX*"
_LOG_FROM = 8  # a ratio of largest to smallest beyond which a linear axis hides the small ones
_DRAWN_SAMPLES = 150  # dots per strip; the boxes use all samples


@dataclass(frozen=True, kw_only=True)
class Plot:
    """A picture for a light and for a dark page, as data URIs, and what it shows in words."""

    title: str
    caption: str
    light: str
    dark: str


def plots(report: dict[str, Any]) -> list[Plot]:
    """What the figures look like; empty if no backend was timed."""
    ok = [r for r in report["results"] if r["status"] == "ok"]
    styles = {id(r): (_COLOURS[i % len(_COLOURS)], _MARKERS[i % len(_MARKERS)]) for i, r in enumerate(ok)}
    timed = [r for r in ok if any(b["p50_ms"] for b in r["batches"])]
    if not timed:
        return []
    drawing = _Drawing(timed, styles, batch_sizes({"results": timed}))
    panels, rows = len(drawing.batches), len(timed)
    single = 2.9 + 0.22 * math.ceil(rows / 2)  # one panel above a legend in two columns, inches
    bars, strips = panels * (0.4 * rows + 0.75) + 0.2, panels * (0.45 * rows + 0.75) + 0.2
    first = drawing.batches[0]
    kinds: list[tuple[str, str, Callable[[Figure], None], float]] = [
        ("Latency per batch", "Lower is better. Solid: median (p50); pale: p90 (nine samples of ten are faster).",
         drawing.latency, bars),
        ("Throughput", "Images per second by batch size. Higher is better.", drawing.throughput,
         single if panels > 1 else bars),
        ("How latency spreads", f"Every dot is one sample (at most {_DRAWN_SAMPLES} drawn); the box holds the middle "
         "half of all samples, its line is the median.", drawing.spread, strips),
    ]  # fmt: skip
    if sum(r["mAP"] is not None and timing_at(r, first) is not None for r in timed) > 1:
        caption = (
            f"Up and to the left is better: more accurate, faster. Median latency at batch {first}; the dashed line is "
            "the mAP of torch fp32. The mAP axis spans at least two points, so that noise does not look like loss."
        )
        kinds.insert(0, ("Accuracy against latency", caption, drawing.trade_off, single))
    return [
        Plot(title=title, caption=caption, light=_render(draw, high, "#24292f"), dark=_render(draw, high, "#d5dae1"))
        for title, caption, draw, high in kinds
    ]


@dataclass(frozen=True)
class _Drawing:
    """Draws the timed results; each method fills one empty figure."""

    results: list[Result]
    styles: dict[int, tuple[str, str]]
    batches: list[int]

    def trade_off(self, figure: Figure) -> None:
        axes, batch = figure.add_subplot(), self.batches[0]
        dots = [(timing_at(r, batch)["p50_ms"], 100 * r["mAP"], r) for r in self.results if r["mAP"] is not None
                and timing_at(r, batch)]  # fmt: skip
        for x, y, result in dots:
            colour, marker = self.styles[id(result)]
            axes.plot([x], [y], marker, color=colour, markersize=9, label=label(result, precision=True))
        base = next((y for _, y, r in dots if r["backend"] == "torch" and r["precision"] == "fp32"), None)
        if base is not None:
            axes.axhline(base, color="#8b929c", linestyle="--", linewidth=1, zorder=0)
        low, high = min(y for _, y, _ in dots), max(y for _, y, _ in dots)
        room = max(1.0, 0.2 * (high - low))
        axes.set_ylim(max(0, low - room), min(100, high + room) if high < 99 else 100.5)
        _latency_axis(axes, [x for x, _, _ in dots], span=1.6)
        axes.set(xlabel=f"median latency at batch {batch}, ms", ylabel="mAP, %")
        # a legend, not labels at the dots: equal mAP and near-equal latency is the usual case, and labels would collide
        figure.legend(loc="outside lower center", ncols=2)

    def latency(self, figure: Figure) -> None:
        for axes, batch in self._panels(figure):
            timings = [(i, r, timing_at(r, batch)) for i, r in enumerate(self.results) if timing_at(r, batch)]
            longest = max(t["p90_ms"] or t["p50_ms"] for _, _, t in timings)
            for i, result, timing in timings:
                colour, (p50, p90) = self.styles[id(result)][0], (timing["p50_ms"], timing["p90_ms"])
                if p90 is not None:
                    axes.barh(i, p90, 0.62, color=colour, alpha=0.35)
                axes.barh(i, p50, 0.62, color=colour)
                words = number(p50) if p90 is None else f"{number(p50)} / {number(p90)}"
                axes.text((p90 or p50) + 0.015 * longest, i, words, va="center", fontsize="small")
            axes.set_xlim(0, 1.3 * longest)
            self._name_rows(axes)
            axes.set_xlabel("ms")

    def throughput(self, figure: Figure) -> None:
        if len(self.batches) == 1:  # a line needs two ends
            [(axes, batch)] = self._panels(figure)
            for i, result in enumerate(self.results):
                rate = timing_at(result, batch)["images_per_s"] or 0
                axes.barh(i, rate, 0.62, color=self.styles[id(result)][0])
                axes.text(rate, i, f" {number(rate)}", va="center", fontsize="small")
            axes.margins(x=0.2)
            self._name_rows(axes)
            axes.set_xlabel("images/s")
            return
        axes, seen = figure.add_subplot(), []
        for result in self.results:
            colour, marker = self.styles[id(result)]
            line = sorted((b["batch"], b["images_per_s"]) for b in result["batches"] if b["images_per_s"])
            seen += [y for _, y in line]
            axes.plot([x for x, _ in line], [y for _, y in line], f"{marker}-", color=colour, markersize=7,
                      label=label(result, precision=True))  # fmt: skip
        axes.set_xscale("log", base=2)
        axes.set_xticks(self.batches, [str(batch) for batch in self.batches])
        axes.set_xticks([], minor=True)
        axes.set_xlim(self.batches[0] / 1.4, self.batches[-1] * 1.4)
        if seen and max(seen) > _LOG_FROM * min(seen):
            axes.set_yscale("log")
            _plain_log(axes.yaxis)
        else:
            axes.set_ylim(0, 1.1 * max(seen, default=1))
        axes.set(xlabel="batch size", ylabel="images/s")
        figure.legend(loc="outside lower center", ncols=2)

    def spread(self, figure: Figure) -> None:
        import numpy as np
        from matplotlib import rcParams

        generator = np.random.default_rng(0)  # the scatter across a strip means nothing, but must not change per run
        for axes, batch in self._panels(figure):
            everything: list[float] = []
            for i, result in enumerate(self.results):
                samples = np.sort(np.asarray((timing_at(result, batch) or {}).get("samples_ms") or [], float))
                if not samples.size:
                    continue
                everything += [samples[0], samples[-1]]
                colour = self.styles[id(result)][0]
                drawn = samples[np.linspace(0, samples.size - 1, min(samples.size, _DRAWN_SAMPLES)).round().astype(int)]
                across = i + generator.uniform(-0.3, 0.3, drawn.size)
                # as pixels: thousands of dots as vectors would make a page of megabytes
                axes.plot(drawn, across, ".", color=colour, markersize=3, alpha=0.55, rasterized=True)
                line = {"color": rcParams["text.color"]}
                axes.boxplot(samples, positions=[i], widths=0.7, orientation="horizontal", showfliers=False,
                             showcaps=False, manage_ticks=False, medianprops={**line, "linewidth": 2},
                             boxprops=line, whiskerprops=line)  # fmt: skip
            self._name_rows(axes)
            _latency_axis(axes, everything or [1.0], span=1.15)
            axes.set_xlabel("ms")

    def _panels(self, figure: Figure) -> list[tuple[Axes, int]]:
        axes = figure.subplots(len(self.batches), 1, squeeze=False)[:, 0]
        for one, batch in zip(axes, self.batches, strict=True):
            one.set_title(f"batch {batch}", loc="left", fontsize="medium")
        return list(zip(axes, self.batches, strict=True))

    def _name_rows(self, axes: Axes) -> None:
        axes.set_yticks(range(len(self.results)), [label(r, precision=True, lines=True) for r in self.results])
        axes.set_ylim(len(self.results) - 0.4, -0.6)  # first backend on top, as in the table
        axes.grid(visible=False, axis="y")
        axes.tick_params(axis="y", length=0)


def _latency_axis(axes: Axes, values: Sequence[float], span: float) -> None:
    """A log scale where latencies differ much; linear, with room around, else."""
    low, high = min(values), max(values)
    if high > _LOG_FROM * low > 0:
        axes.set_xscale("log")
        axes.set_xlim(low / span, high * span)
        _plain_log(axes.xaxis)
    else:
        room = max(0.05 * high, 0.15 * (high - low)) * span
        axes.set_xlim(max(0, low - room), high + room)


def _plain_log(axis: Axis) -> None:
    """Ticks at 1, 2, 5, 10, ... as plain numbers."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_locator(NullLocator())


def _render(draw: Callable[[Figure], None], height_in: float, ink: str) -> str:
    """Draw one figure on a transparent ground with text in the colour `ink`: an SVG data URI."""
    import matplotlib
    from matplotlib.figure import Figure

    faint = "#8b929c"
    style: dict[Any, Any] = {  # Any: matplotlib's stubs list every setting by name
        "text.color": ink, "axes.labelcolor": ink, "xtick.labelcolor": ink, "ytick.labelcolor": ink,
        "xtick.color": faint, "ytick.color": faint, "axes.edgecolor": faint, "grid.color": faint, "grid.alpha": 0.25,
        "axes.grid": True, "axes.axisbelow": True, "axes.spines.top": False, "axes.spines.right": False,
        "legend.frameon": False, "legend.fontsize": "small", "font.size": 11,
        # a name with dollar signs is no formula; outlines, so that the text needs no font of the reader's machine
        "text.parse_math": False, "svg.fonttype": "path", "svg.hashsalt": "pmm",
    }  # fmt: skip
    with matplotlib.rc_context(style):
        # narrow on purpose: on a phone the picture is shrunk little, so its text stays readable
        figure = Figure(figsize=(5.2, height_in), layout="constrained")
        draw(figure)
        drawn = io.BytesIO()
        figure.savefig(drawn, format="svg", dpi=200, transparent=True, metadata={"Date": None, "Creator": None})
    return data_uri(drawn.getvalue(), "svg+xml")


def data_uri(content: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
