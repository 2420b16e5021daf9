"""A bench result in pictures: SVG plots for a light and for a dark page, as data URIs."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pmm.bench.pages.format import number, one_line
from pmm.bench.pages.queries import SAME_RANKING, batch_sizes, completed, reference_of, shipping, timing_at
from pmm.bench.pages.styles import GROUND, legend_entries, styles_of
from pmm.bench.result_schema import Interval, Result, Timing
from pmm.bench.schema import BenchReport
from pmm.visualize.style import PLOT_FAINT, PLOT_INK, plot_style, shortened

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

_INK_ON_DARK = "#d5dae1"
_GROUND_ON_DARK = "#14171b"
_LOG_FROM = 8  # a ratio of largest to smallest beyond which a linear axis hides the small ones
_WIDE = 2.5  # such a ratio beyond which a box is but a line
_GATE_SHOWN = 0.05
_DRAWN_SAMPLES = 150  # dots per strip; the boxes use all samples


@dataclass(frozen=True, kw_only=True)
class Plot:
    """A picture for a light and for a dark page, as data URIs, with title and caption."""

    title: str
    caption: str
    light: str
    dark: str


@dataclass(frozen=True, kw_only=True)
class Plots:
    """The plots that can be drawn: some need two timed results, or two batch sizes."""

    trade_off: Plot | None
    spread: tuple[Plot, ...]
    sweep: tuple[Plot, ...]


def plots(report: BenchReport) -> Plots:
    """All plots of a report."""
    drawing = _Drawing(report)
    spread = [
        _plot(f"Batch {batch}: distribution of call times", _SPREAD, drawing.spread(batch), drawing.strips(batch))
        for batch in drawing.batches
    ]
    trade_off, sweep = None, []
    if len(drawing.dots()) > 1:
        trade_off = _plot("Accuracy against latency", drawing.trade_off_caption(), drawing.trade_off, drawing.single)
    if len(drawing.batches) > 1:
        rate = "Images per second by batch size, with calls that need not wait for each other. Higher is better."
        sweep.append(_plot("Throughput by batch size", rate, drawing.throughput, drawing.single))
        cost = "Median time of a call by batch size. Lower is better."
        sweep.append(_plot("Latency by batch size", cost, drawing.latency, drawing.single))
    return Plots(trade_off=trade_off, spread=tuple(spread), sweep=tuple(sweep))


_SPREAD = (
    f"The fastest is on top. Every dot is one call (at most {_DRAWN_SAMPLES} are drawn), the box is the middle half of "
    "all calls, and the thick line is the median, with its ms on the right. The wider, the less predictable. A second "
    "panel, if there is one, shows the same calls in % of the backend's median."
)


class _Drawing:
    """Draws the results that were timed; each method fills one empty figure."""

    def __init__(self, report: BenchReport) -> None:
        self.report = report
        self.batches = batch_sizes(report)
        self.results = [r for r in completed(report) if r.batches]
        self.styles = styles_of(self.results)

    @property
    def single(self) -> float:
        """Height of one panel above its legend, inches."""
        return 3.1 + 0.21 * self._legend_rows()

    def strips(self, batch: int) -> float:
        return 0.95 + 0.29 * sum(timing_at(r, batch) is not None for r in self.results)

    def dots(self) -> list[tuple[Result, float, Interval | None, float]]:
        """Result, median latency at the smallest batch with its interval, mAP in %."""
        dots = []
        for result in self.results:
            timing = timing_at(result, self.batches[0])
            if timing is not None and result.mAP is not None:
                dots.append((result, timing.p50_ms, timing.p50_interval_ms, 100 * result.mAP))
        return dots

    def trade_off_caption(self) -> str:
        gate = "" if self._gate() is None else " A backend below the dotted line, the gate, may not ship."
        return (
            f"Higher is more accurate, further left is faster (median time of a call at batch {self.batches[0]}). "
            f"Bars are 95 % confidence intervals, for mAP of its difference from {self.report.reference}. The shaded "
            f"band is the reference's mAP, 0.1 points up and down.{gate}"
            f"{' The ring marks the backend of the verdict.' * bool(shipping(self.report))}"
        )

    def trade_off(self, figure: Figure) -> None:
        axes, dots, reference = figure.add_subplot(), self.dots(), reference_of(self.report)
        base = None if reference is None or reference.mAP is None else 100 * reference.mAP
        reach: list[float] = []
        for result, x, across, y in dots:
            style, up = self.styles[result.name], (y, y)
            if base is not None and result.map_delta_interval and result is not reference:
                low, high = result.map_delta_interval
                up = (min(y, base + 100 * low), max(y, base + 100 * high))
            wide = (x, x) if across is None else (min(x, across[0]), max(x, across[1]))
            reach += up
            axes.plot(wide, [y, y], color=style.colour, alpha=0.55, linewidth=1.3)
            axes.plot([x, x], up, color=style.colour, alpha=0.55, linewidth=1.3)
            axes.plot([x], [y], **style.dot(8))
        best = shipping(self.report)[:1]
        for result, x, _, y in (dot for dot in dots if dot[0] in best):
            axes.plot(
                [x], [y], "o", markersize=16, markerfacecolor="none", markeredgecolor=PLOT_INK, markeredgewidth=1.2
            )
            left = x <= sorted(x for _, x, _, _ in dots)[len(dots) // 2]
            axes.annotate(short(result.name), (x, y), (5 if left else -5, -10), textcoords="offset points",
                          ha="left" if left else "right", va="top", fontsize=9.5)  # fmt: skip
        if base is not None:
            axes.axhspan(
                base - 100 * SAME_RANKING, base + 100 * SAME_RANKING, color=PLOT_FAINT, alpha=0.25, linewidth=0
            )
            if (drop := self._gate()) is not None:
                axes.axhline(base - 100 * drop, color=PLOT_FAINT, linestyle=":", linewidth=1.4, zorder=0)
                reach.append(base - 100 * drop)
        low, high = min(reach), max(reach)
        # two points at least: noise must not look like loss
        room = max(0.15, 0.08 * (high - low), (2 - (high - low)) / 2)
        axes.set_ylim(max(0, low - room), min(100.5, high + room))
        _latency_axis(axes, [x for _, x, _, _ in dots], span=1.35)
        axes.set(xlabel=f"median time of a call at batch {self.batches[0]}, ms", ylabel="mAP, %")
        self._legend(figure)

    def _gate(self) -> float | None:
        """The bound of mAP, unless it is so low that the axis would show little else."""
        drop = self.report.gates.max_map_drop
        return drop if drop is not None and drop <= _GATE_SHOWN else None

    def spread(self, batch: int) -> Callable[[Figure], None]:
        def draw(figure: Figure) -> None:
            import numpy as np

            timed = [(r, t) for r in self.results if (t := timing_at(r, batch)) is not None]
            timed.sort(key=lambda pair: pair[1].p50_ms)
            samples = [np.sort(np.asarray(t.samples_ms or [t.p50_ms], float)) for _, t in timed]
            ends = [float(end) for taken in samples for end in (taken[0], taken[-1])]
            wide = max(ends) > _WIDE * min(ends) > 0
            panels = figure.subplots(1, 2 if wide else 1, squeeze=False, sharey=True)[0]
            self._strips(panels[0], samples, timed)
            _latency_axis(panels[0], ends, span=1.12, narrow=wide)
            panels[0].set_xlabel("ms")
            if wide:  # over such a range a box is a line: the spread gets its own axis
                shares = [100 * taken / t.p50_ms for taken, (_, t) in zip(samples, timed, strict=True)]
                low = min(float(np.quantile(share, 0.01)) for share in shares)
                high = max(float(np.quantile(share, 0.98)) for share in shares)
                self._strips(panels[1], [np.clip(share, low, high) for share in shares], timed)
                panels[1].set_xlim(low - 0.05 * (high - low), high + 0.05 * (high - low))
                panels[1].set_xlabel("% of the median")
            panels[0].set_yticks(range(len(timed)), [short(r.name) + " !" * bool(t.flags) for r, t in timed])
            beside = panels[-1].secondary_yaxis("right")
            beside.set_yticks(range(len(timed)), [number(t.p50_ms) for _, t in timed])
            for axis in (*panels, beside):
                axis.tick_params(axis="y", length=0)
                axis.grid(visible=False, axis="y")
            beside.spines[:].set_visible(False)
            panels[0].set_ylim(len(timed) - 0.4, -0.6)

        return draw

    def _strips(self, axes: Axes, samples: Sequence[Any], timed: Sequence[tuple[Result, Timing]]) -> None:
        """A row of dots and a box per result; `samples` sorted."""
        import numpy as np
        from matplotlib import rcParams

        generator = np.random.default_rng(0)  # the scatter across a strip means nothing, but must not change per run
        line = {"color": rcParams["text.color"], "linewidth": 0.9}
        for row, (taken, (result, _)) in enumerate(zip(samples, timed, strict=True)):
            drawn = np.linspace(0, taken.size - 1, min(taken.size, _DRAWN_SAMPLES)).round().astype(int)
            across = row + generator.uniform(-0.28, 0.28, drawn.size)
            colour = self.styles[result.name].colour
            # as pixels: thousands of dots as vectors would make a page of megabytes
            axes.plot(taken[drawn], across, ".", color=colour, markersize=3.2, alpha=0.6, rasterized=True)
            axes.boxplot(taken, positions=[row], widths=0.62, orientation="horizontal", showfliers=False,
                         showcaps=False, manage_ticks=False, medianprops={**line, "linewidth": 2.2},
                         boxprops=line, whiskerprops=line)  # fmt: skip

    def throughput(self, figure: Figure) -> None:
        lines = [(r, [(t.batch, t.images_per_s) for t in r.batches if t.images_per_s > 0]) for r in self.results]
        self._lines(figure, lines, "images/s")

    def latency(self, figure: Figure) -> None:
        lines = [(r, [(t.batch, t.p50_ms) for t in r.batches if t.p50_ms > 0]) for r in self.results]
        self._lines(figure, lines, "median time of a call, ms")

    def _lines(self, figure: Figure, lines: Sequence[tuple[Result, list[tuple[int, float]]]], what: str) -> None:
        axes = figure.add_subplot()
        for result, line in lines:
            style = self.styles[result.name]
            axes.plot(
                [x for x, _ in sorted(line)], [y for _, y in sorted(line)], "-", color=style.colour, linewidth=1.2
            )
            axes.plot([x for x, _ in line], [y for _, y in line], **style.dot(6.5))
        axes.set_xscale("log", base=2)
        axes.set_xticks(self.batches, [str(batch) for batch in self.batches])
        axes.set_xticks([], minor=True)
        axes.set_xlim(self.batches[0] / 1.3, self.batches[-1] * 1.3)
        seen = [y for _, line in lines for _, y in line]
        if seen and max(seen) > _LOG_FROM * min(seen):
            axes.set_yscale("log")
            _plain_log(axes.yaxis)
        else:
            axes.set_ylim(0, 1.1 * max(seen, default=1))
        axes.set(xlabel="batch size (images per call)", ylabel=what)
        self._legend(figure)

    def _legend(self, figure: Figure) -> None:
        """Below, since equal mAP and near-equal latency is the usual case and names at the dots would collide."""
        from matplotlib.lines import Line2D

        handles, rows = [], self._legend_rows()
        for group in legend_entries(self.results, self.styles):
            for text, look in group:
                line = {"color": look, "linewidth": 5} if isinstance(look, str) else look.dot(7)
                handles.append(Line2D([], [], label=short(text), **line))
            # every kind begins a column
            handles += [Line2D([], [], linestyle="none", label=" ") for _ in range(-len(group) % rows)]
        figure.legend(handles=handles, loc="outside lower center", ncols=len(handles) // rows, columnspacing=1.4,
                      handlelength=1.2, handletextpad=0.6)  # fmt: skip

    def _legend_rows(self) -> int:
        return max(math.ceil(len(group) / 2) for group in legend_entries(self.results, self.styles))


def short(name: str) -> str:
    """A name that leaves room for the plot."""
    return shortened(one_line(name))


def _latency_axis(axes: Axes, values: Sequence[float], span: float, narrow: bool = False) -> None:
    """A log scale where latencies differ much; linear, with room around, else. Few ticks if `narrow`."""
    low, high = min(values), max(values)
    if high > _LOG_FROM * low > 0:
        axes.set_xscale("log")
        axes.set_xlim(low / span, high * span)
        _plain_log(axes.xaxis, few=narrow)
    else:
        room = max(0.05 * high, 0.15 * (high - low)) * span
        axes.set_xlim(max(0, low - room), high + room)


def _plain_log(axis: Axis, few: bool = False) -> None:
    """Ticks at 1, 2, 5, 10, ..., or fewer, as plain numbers."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    low, high = sorted(axis.get_view_interval())
    decades = math.log10(high / low) * (2.5 if few else 1)
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if decades < 2 else (1, 3) if decades < 3.5 else (1,)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    axis.set_minor_locator(NullLocator())


def _plot(title: str, caption: str, draw: Callable[[Figure], None], height_in: float) -> Plot:
    """Drawn once; on a dark page only its ink is another."""
    drawn = _svg(draw, height_in)
    dark = drawn.replace(PLOT_INK.encode(), _INK_ON_DARK.encode()).replace(GROUND.encode(), _GROUND_ON_DARK.encode())
    return Plot(title=title, caption=caption, light=data_uri(drawn, "svg+xml"), dark=data_uri(dark, "svg+xml"))


def _svg(draw: Callable[[Figure], None], height_in: float) -> bytes:
    """One figure on a transparent ground."""
    import matplotlib
    from matplotlib.figure import Figure

    # outlines, so that the text needs no font of the reader's machine
    style = {**plot_style(), "svg.fonttype": "path", "svg.hashsalt": "pmm"}
    with matplotlib.rc_context(style):
        # narrow on purpose: on a phone the picture is shrunk little, so its text stays readable
        figure = Figure(figsize=(5.4, height_in), layout="constrained")
        draw(figure)
        drawn = io.BytesIO()
        figure.savefig(drawn, format="svg", dpi=200, transparent=True, metadata={"Date": None, "Creator": None})
    return drawn.getvalue()


def data_uri(content: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
