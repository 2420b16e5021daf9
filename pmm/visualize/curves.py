"""How runs went: losses per stage, held-out accuracy and learning rate, from their metrics.jsonl. Loads no torch."""

from __future__ import annotations

import io
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from PIL import Image

from pmm.utils.errors import InvalidFile, InvalidValue
from pmm.utils.files import existing_file
from pmm.visualize.style import LINES, PLOT_FAINT, PLOT_INK, plot_style, shortened

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

METRICS = "metrics.jsonl"
MAX_RUNS = len(LINES)
DPI = 150
_STROKES: tuple[Literal["-", "--", ":", "-."], ...] = ("-", "--", ":", "-.")
_FEW = 25  # epochs up to which each is a dot


@dataclass(frozen=True, kw_only=True)
class LoggedRun:
    """The curves of a run: for each quantity its epochs and values."""

    name: str
    curves: Mapping[str, tuple[tuple[int, ...], tuple[float, ...]]]

    def stages(self, loss: str) -> list[str]:
        """The keys of `loss`, one per stage."""
        keys = [key for key in self.curves if re.fullmatch(rf"{loss}\d+", key)]
        return sorted(keys, key=lambda key: int(key.removeprefix(loss)))


def read_run(folder: Path) -> LoggedRun:
    """The run in `folder`. Raises InvalidFile if there is none, or its metrics cannot be read."""
    if not folder.is_dir():
        raise InvalidFile("no such run", path=folder, expected="its folder, such as runs/NAME")
    path = existing_file(folder / METRICS, "the metrics of a run of pmm train")
    points_of: dict[str, list[tuple[int, float]]] = {}
    lines = path.read_text(errors="replace").splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            epoch = record["epoch"]
            values = {key: float(value) for key, value in record.items() if key != "epoch"}
            if type(epoch) is not int:
                raise TypeError
        except (ValueError, TypeError, KeyError, AttributeError):
            if number == len(lines) > 1:  # a run that is writing, or was killed while it did
                break
            problem = f"line {number} is not the record of an epoch"
            raise InvalidFile(problem, path=path, expected="the metrics of a run of pmm train") from None
        for key, value in values.items():
            if math.isfinite(value):
                points_of.setdefault(key, []).append((epoch, value))
    if "loss" not in points_of:
        raise InvalidFile("it has no epoch yet", path=path, expected="the metrics of a run of pmm train")
    curves = {key: (tuple(x for x, _ in points), tuple(y for _, y in points)) for key, points in points_of.items()}
    return LoggedRun(name=folder.resolve().name, curves=curves)


def curves_picture(runs: Sequence[LoggedRun]) -> Image.Image:
    """Cross-entropy and triplet loss per stage, mAP and rank-1 on the held-out identities if any run has them, and the
    learning rate. An RGB picture.

    The stages of a single run differ in colour; several runs differ in colour, their stages in stroke. Raises
    InvalidValue for more runs than there are colours.
    """
    import matplotlib
    from matplotlib.figure import Figure

    if len(runs) > MAX_RUNS:
        raise InvalidValue("number of runs", len(runs), f"{MAX_RUNS} at most", hint="give fewer --runs")
    with matplotlib.rc_context(plot_style()):
        figure = Figure(figsize=(9, 6.4), layout="constrained")
        drawing = Panels(runs)
        panels = [("cross_entropy", "cross-entropy"), ("triplet", "triplet loss")]
        axes = list(figure.subplots(2, 2).flat)
        for place, (loss, words) in zip(axes, panels, strict=False):
            drawing.losses(place, loss, words)
        drawing.accuracy(axes[2])
        drawing.rate(axes[3])
        for place in axes:
            _whole_epochs(place)
        drawing.legend(figure)
        drawn = io.BytesIO()
        figure.savefig(drawn, format="png", dpi=DPI, facecolor="white")
    return Image.open(drawn).convert("RGB")


class Panels:
    """Each method fills one panel."""

    def __init__(self, runs: Sequence[LoggedRun]) -> None:
        self.runs = _distinct(runs)
        self.few = max(len(run.curves["loss"][0]) for run in runs) <= _FEW

    def losses(self, axes: Axes, loss: str, words: str) -> None:
        for number, run in enumerate(self.runs):
            for stage, key in enumerate(run.stages(loss)):
                alone = len(self.runs) == 1
                colour = LINES[(stage if alone else number) % len(LINES)]
                self._line(axes, run, key, colour, "-" if alone else _STROKES[stage % len(_STROKES)])
        axes.set_title(words, fontsize=10.5, loc="left")
        axes.set_ylim(bottom=0)

    def accuracy(self, axes: Axes) -> None:
        axes.set_title("held-out identities: mAP, and rank-1 (thin)", fontsize=10.5, loc="left")
        for number, run in enumerate(self.runs):
            if "val_mAP" not in run.curves:
                continue
            colour = self._of_run(number)
            self._line(axes, run, "val_mAP", colour, "-", percent=True)
            if "val_rank1" in run.curves:
                self._line(axes, run, "val_rank1", colour, "-", percent=True, width=0.8)
            epochs, values = run.curves["val_mAP"]
            best = max(range(len(values)), key=values.__getitem__)
            axes.plot([epochs[best]], [100 * values[best]], "o", color=colour, markersize=6.5, markeredgecolor="white")
            if len(self.runs) == 1:
                axes.annotate(f"best {values[best]:.1%}, epoch {epochs[best]}", (epochs[best], 100 * values[best]),
                              (0, -16), textcoords="offset points", ha="right", va="top", fontsize=9.5)  # fmt: skip
        if not axes.lines:
            axes.text(0.5, 0.5, "no identities were held out", color=PLOT_FAINT, ha="center", transform=axes.transAxes)
            axes.set_yticks([])
            axes.set_xticks([])
            return
        axes.set_ylim(0, 103)
        axes.set_ylabel("%")

    def rate(self, axes: Axes) -> None:
        for number, run in enumerate(self.runs):
            if "lr" in run.curves:
                self._line(axes, run, "lr", self._of_run(number), "-")
        axes.set_title("learning rate, at the end of the epoch", fontsize=10.5, loc="left")
        axes.set_ylim(bottom=0)
        axes.yaxis.set_major_formatter("{x:g}")  # matplotlib's power of ten would stand in the title's place

    def legend(self, figure: Figure) -> None:
        """Below all panels: the stages of one run, or the runs and what tells their stages apart."""
        from matplotlib.lines import Line2D

        most = max((len(run.stages("cross_entropy")) for run in self.runs), default=0)
        stages = [f"stage {'I' * (stage + 1) if stage < 3 else stage + 1}" for stage in range(most)]
        handles = []
        if len(self.runs) == 1:
            handles = [Line2D([], [], color=LINES[stage], label=text) for stage, text in enumerate(stages)]
        else:
            handles = [Line2D([], [], color=LINES[i], linewidth=4, label=run.name) for i, run in enumerate(self.runs)]
            handles += [
                Line2D([], [], color=PLOT_FAINT, linestyle=_STROKES[i % len(_STROKES)], label=text)
                for i, text in enumerate(stages)
            ]
        figure.legend(handles=handles, loc="outside lower center", ncols=min(6, len(handles)))
        if len(self.runs) == 1:
            figure.suptitle(self.runs[0].name, fontsize=11.5, x=0.02, ha="left")

    def _of_run(self, number: int) -> str:
        """Colour of what has no stages; with one run, none of its stages'."""
        return LINES[number] if len(self.runs) > 1 else PLOT_INK

    def _line(
        self,
        axes: Axes,
        run: LoggedRun,
        key: str,
        colour: str,
        stroke: str,
        *,
        percent: bool = False,
        width: float = 1.6,
    ) -> None:
        epochs, values = run.curves[key]
        shown = [100 * value for value in values] if percent else list(values)
        axes.plot(epochs, shown, stroke, color=colour, linewidth=width, marker="." if self.few else "")


def _whole_epochs(axes: Axes) -> None:
    from matplotlib.ticker import MaxNLocator

    if axes.lines:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
        axes.set_xlabel("epoch")


def _distinct(runs: Sequence[LoggedRun]) -> list[LoggedRun]:
    """With names that fit; runs of one name get a number."""
    names = [shortened(run.name) for run in runs]
    numbered = [
        name if names.count(name) == 1 else f"{name} ({names[: i + 1].count(name)})" for i, name in enumerate(names)
    ]
    return [LoggedRun(name=name, curves=run.curves) for name, run in zip(numbered, runs, strict=True)]
