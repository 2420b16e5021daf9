"""How runs went: losses, held-out accuracy and learning rate, from their metrics.jsonl. Loads no torch."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from PIL import Image

from pmm.artifacts.run_folder import CONFIG_FILE, METRICS_FILE
from pmm.config import Config
from pmm.models.registry import method_of, phases_of
from pmm.utils.errors import InvalidFile, InvalidValue, UserError
from pmm.utils.files import existing_file
from pmm.visualize.style import LINES, PLOT_FAINT, PLOT_INK, plot_style, shortened

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PER_HEAD = {"cross_entropy": "cross-entropy", "triplet": "triplet loss"}
"""Losses of each classifier -> their words."""
OF_SOME = {"overlap": "penalty of overlapping maps", "least_part": "share of the smallest part, of all cells"}
"""Figures of some methods -> their words."""
MAX_RUNS = len(LINES)
DPI = 150
_STROKES: tuple[Literal["-", "--", ":", "-."], ...] = ("-", "--", ":", "-.")
_ROMAN = {1: "I", 2: "II", 3: "III"}
_FEW = 25  # epochs up to which each is a dot


@dataclass(frozen=True, kw_only=True)
class LoggedRun:
    """The curves of a run: for each quantity its epochs and values."""

    name: str
    curves: Mapping[str, tuple[tuple[int, ...], tuple[float, ...]]]
    head: str = "stage"
    """What its classifiers are called."""
    phases: tuple[tuple[int, str], ...] = ()
    """Epochs before each phase but the first, and the phase's name."""

    def per_head(self, loss: str) -> list[str]:
        """The keys of `loss`, one per classifier."""
        keys = [key for key in self.curves if re.fullmatch(rf"{loss}\d+", key)]
        return sorted(keys, key=lambda key: int(key.removeprefix(loss)))


def read_run(folder: Path) -> LoggedRun:
    """The run in `folder`. Raises InvalidFile if there is none, or its metrics cannot be read."""
    if not folder.is_dir():
        raise InvalidFile("no such run", path=folder, expected="its folder, such as runs/NAME")
    path = existing_file(folder / METRICS_FILE, "the metrics of a run of pmm train")
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
    return LoggedRun(name=folder.resolve().name, curves=curves, **_described(folder / CONFIG_FILE))


def _described(path: Path) -> dict[str, Any]:
    """What a run's configuration tells of its curves; nothing if it cannot be read."""
    try:
        config = Config.from_dict(json.loads(path.read_text()))
        phases = tuple((phase.begin, phase.name) for phase in phases_of(config)[1:])
        return {"head": method_of(config).head, "phases": phases}
    except (OSError, ValueError, UserError):
        return {}


def curves_picture(runs: Sequence[LoggedRun]) -> Image.Image:
    """Losses per classifier and the figures of some methods, where any run has them; mAP and rank-1 on the held-out
    identities; the learning rate. An RGB picture.

    The classifiers of a single run differ in colour, and its phases have a line between them; several runs differ in
    colour, their classifiers in stroke. Raises InvalidValue for more runs than there are colours.
    """
    import matplotlib
    from matplotlib.figure import Figure

    if len(runs) > MAX_RUNS:
        raise InvalidValue("number of runs", len(runs), f"{MAX_RUNS} at most", hint="give fewer --runs")
    with matplotlib.rc_context(plot_style()):
        drawing = Panels(runs)
        panels = drawing.names()
        if len(panels) % 2:  # the first is as wide as two
            panels.insert(0, panels[0])
        rows: list[Any] = [panels[place : place + 2] for place in range(0, len(panels), 2)]
        figure = Figure(figsize=(9, 3.2 * len(rows)), layout="constrained")
        for name, axes in figure.subplot_mosaic(rows).items():
            drawing.draw(axes, name)
            drawing.phases(axes, named=name == panels[0])
            _whole_epochs(axes, drawing.last)
        drawing.legend(figure)
        drawn = io.BytesIO()
        figure.savefig(drawn, format="png", dpi=DPI, facecolor="white")
    return Image.open(drawn).convert("RGB")


class Panels:
    """The panels of a picture of curves."""

    def __init__(self, runs: Sequence[LoggedRun]) -> None:
        self.runs = _distinct(runs)
        self.few = max(len(run.curves["loss"][0]) for run in runs) <= _FEW
        self.last = max(run.curves["loss"][0][-1] for run in runs)

    def names(self) -> list[str]:
        """The panels that have something to show, and always those of the accuracy and the rate."""
        losses = [loss for loss in PER_HEAD if any(run.per_head(loss) for run in self.runs)]
        figures = [key for key in OF_SOME if any(key in run.curves for run in self.runs)]
        return [*losses, *figures, "accuracy", "rate"]

    def draw(self, axes: Axes, name: str) -> None:
        """One of `names`."""
        if name in PER_HEAD:
            self.losses(axes, name)
        elif name in OF_SOME:
            self.figure(axes, name)
        else:
            {"accuracy": self.accuracy, "rate": self.rate}[name](axes)

    def losses(self, axes: Axes, loss: str) -> None:
        for number, run in enumerate(self.runs):
            for head, key in enumerate(run.per_head(loss)):
                alone = len(self.runs) == 1
                colour = LINES[(head if alone else number) % len(LINES)]
                self._line(axes, run, key, colour, "-" if alone else _STROKES[head % len(_STROKES)])
        axes.set_title(PER_HEAD[loss], fontsize=10.5, loc="left")
        axes.set_ylim(bottom=0)

    def figure(self, axes: Axes, key: str) -> None:
        for number, run in enumerate(self.runs):
            if key in run.curves:
                self._line(axes, run, key, self._of_run(number), "-")
        axes.set_title(OF_SOME[key], fontsize=10.5, loc="left")
        axes.set_ylim(bottom=0)

    def phases(self, axes: Axes, *, named: bool) -> None:
        """A line where each phase of a single run begins, with its name if asked for."""
        if len(self.runs) > 1:
            return
        for begin, name in self.runs[0].phases:
            axes.axvline(begin + 0.5, color=PLOT_FAINT, linewidth=1, linestyle=(0, (4, 3)))
            if named:  # at the bottom, where losses end up last
                axes.annotate(name, (begin + 0.5, 0), (4, 4), xycoords=("data", "axes fraction"),
                              textcoords="offset points", va="bottom", fontsize=9, color=PLOT_FAINT)  # fmt: skip

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
            last_phase = max((begin for begin, _ in run.phases), default=0)  # best.pth is of no other
            kept = [place for place, epoch in enumerate(epochs) if epoch > last_phase]
            if not kept:
                continue
            best = max(kept, key=values.__getitem__)
            axes.plot([epochs[best]], [100 * values[best]], "o", color=colour, markersize=6.5, markeredgecolor="white")
            if len(self.runs) == 1:
                axes.text(0.98, 0.04, f"best {values[best]:.1%}, epoch {epochs[best]}", transform=axes.transAxes,
                          ha="right", va="bottom", fontsize=9.5)  # fmt: skip
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
        """Below all panels: the classifiers of one run, or the runs and what tells their classifiers apart."""
        from matplotlib.lines import Line2D

        most = max(len(run.per_head("cross_entropy")) for run in self.runs)
        heads = {run.head for run in self.runs}
        head = heads.pop() if len(heads) == 1 else "classifier"
        numbers = _ROMAN if head == "stage" else {}
        stages = [f"{head} {numbers.get(number, number)}" for number in range(1, most + 1)]
        handles = []
        if len(self.runs) == 1:
            handles = [Line2D([], [], color=LINES[stage], label=text) for stage, text in enumerate(stages)]
        else:
            handles = [Line2D([], [], color=LINES[i], linewidth=4, label=run.name) for i, run in enumerate(self.runs)]
            handles += [
                Line2D([], [], color=PLOT_FAINT, linestyle=_STROKES[i % len(_STROKES)], label=text)
                for i, text in enumerate(stages)
            ]
        if len(handles) > 1:
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


def _whole_epochs(axes: Axes, last: int) -> None:
    from matplotlib.ticker import MaxNLocator

    if axes.lines:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
        axes.set_xlabel("epoch")
        axes.set_xlim(0, 1.03 * last + 0.5)


def _distinct(runs: Sequence[LoggedRun]) -> list[LoggedRun]:
    """With names that fit; runs of one name get a number."""
    names = [shortened(run.name) for run in runs]
    numbered = [
        name if names.count(name) == 1 else f"{name} ({names[: i + 1].count(name)})" for i, name in enumerate(names)
    ]
    return [dataclasses.replace(run, name=name) for name, run in zip(numbered, runs, strict=True)]
