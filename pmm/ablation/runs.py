"""Runs of an ablation, a training and its evaluation each, in processes: finished ones are kept, started ones go on."""

from __future__ import annotations

import json
import math
import os
import shlex
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pmm.artifacts.run_folder import LAST, METRICS_FILE
from pmm.utils import command_line
from pmm.utils.facts import flattened
from pmm.utils.files import make_folder, write_file
from pmm.utils.task_runner import end_group, environment, last_lines, start_group

STAMP, EVALUATION, LOG, PID = "stamp.json", "evaluation.json", "log.txt", "pid"
STANDARD = "standard"
"""Definition of average precision in all tables."""
POLL_S = 0.1
SAVE_S = 120.0
"""Time for a training to save what it has, before it is killed."""

State = Literal["finished", "started", "new"]


@dataclass(frozen=True, kw_only=True)
class AblationRun:
    """One training and the evaluation of its best checkpoint."""

    row: str
    """Name of its row."""
    seed: int
    folder: Path
    train: tuple[str, ...]
    """Command line that trains from scratch into `folder`; --resume behind it makes it go on."""
    evaluate: tuple[str, ...]
    """Command line that writes the figures of `folder`/best.pth to `folder`/evaluation.json."""
    facts: Mapping[str, Any]
    """All that the figures depend on, as plain values."""
    by_other_ap: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Other definition of average precision -> command line that writes the figures by it to `evaluation_file`."""

    @property
    def name(self) -> str:
        return f"{self.row}, seed {self.seed}"

    @property
    def commands(self) -> list[tuple[str, ...]]:
        """Its command lines, in turn."""
        return [self.train, self.evaluate, *self.by_other_ap.values()]

    def lines(self) -> list[str]:
        """Its command lines, as one would type them."""
        return [shlex.join(command) for command in self.commands]


@dataclass(frozen=True, kw_only=True)
class Figures:
    """Figures of a finished run: fractions of the evaluation, totals of the training over all epochs."""

    mAP: float  # noqa: N815
    rank1: float
    mINP: float  # noqa: N815
    epochs: int
    train_s: float
    """Seconds in epochs, without start-up, validation and checkpoints."""
    images_per_s: float
    """Images in training divided by `train_s`."""
    other_mAP: Mapping[str, float] = field(default_factory=dict)  # noqa: N815
    """Definition of average precision, other than the standard one -> mAP by it."""


@dataclass(frozen=True, kw_only=True)
class RunOutcome:
    """A run that ended: its figures, or why it has none."""

    run: AblationRun
    figures: Figures | None
    note: str = ""
    """Why there are no figures, one line."""


def state(run: AblationRun) -> State:
    """How far the run is. Files in its folder count only beside its stamp; see `changes`."""
    if not (run.folder / STAMP).exists():
        return "new"
    return "finished" if figures(run) else "started"


def changes(run: AblationRun) -> list[str]:
    """Facts that differ from those of the run in the folder; empty if none does, or there is no run."""
    if not run.folder.exists() or not any(path.name != ".lock" for path in run.folder.iterdir()):
        return []
    try:
        before = flattened(json.loads((run.folder / STAMP).read_text()))
    except (OSError, ValueError, AttributeError):
        return ["no settings are stored beside it"]
    now = flattened(_plain(run.facts))
    return [
        f"{key} was {before.get(key)}, is {now.get(key)}"
        for key in {**before, **now}
        if before.get(key) != now.get(key)
    ]


def evaluation_file(ap: str) -> str:
    """Name of the file in a run's folder that has its figures by a definition of average precision."""
    return EVALUATION if ap == STANDARD else f"{Path(EVALUATION).stem}-{ap}.json"


def forget(run: AblationRun) -> None:
    """Remove the folder of a run, to start it anew."""
    shutil.rmtree(run.folder, ignore_errors=True)


def figures(run: AblationRun) -> Figures | None:
    """None if the run is not finished."""
    try:
        evaluation, *others = (
            json.loads((run.folder / evaluation_file(ap)).read_text()) for ap in (STANDARD, *run.by_other_ap)
        )
        epochs = [json.loads(line) for line in (run.folder / METRICS_FILE).read_text().splitlines()]
        seconds = math.fsum(epoch["seconds"] for epoch in epochs)
        images = math.fsum(epoch["images_per_s"] * epoch["seconds"] for epoch in epochs)
        result = Figures(
            **{name: float(evaluation[name]) for name in ("mAP", "rank1", "mINP")},
            epochs=len(epochs),
            train_s=seconds,
            images_per_s=images / seconds,
            other_mAP={ap: float(other["mAP"]) for ap, other in zip(run.by_other_ap, others, strict=True)},
        )
    except (OSError, ValueError, KeyError, TypeError, ArithmeticError):
        return None
    values = vars(result) | {"other_mAP": 0.0, **result.other_mAP}
    return result if all(map(math.isfinite, values.values())) else None


def run_all(
    runs: Sequence[AblationRun],
    *,
    root: Path,
    slots: Sequence[Mapping[str, str]] = ({},),
    finished: Callable[[RunOutcome, int, float], None] = lambda outcome, left, seconds: None,
) -> list[RunOutcome]:
    """Run those of `runs` that are not finished, in their order; a failure does not stop the others.

    One run at a time is in each of `slots`, with the environment variables that are there. `finished` is called with
    each outcome, how many runs are left and for about how many seconds. Processes import our packages from `root`. An
    interrupt ends them all; their checkpoints remain, and the next call goes on from them.
    """
    outcomes = {id(run): RunOutcome(run=run, figures=figures(run)) for run in runs if state(run) == "finished"}
    waiting, free = [run for run in runs if id(run) not in outcomes], [*slots]
    active: list[_Job] = []
    took: list[float] = []
    try:
        with command_line.deferred_interrupt() as pause:
            while waiting or active:
                pause()
                while waiting and free:
                    active.append(_Job(waiting.pop(0), root, free.pop(0)))
                time.sleep(POLL_S)
                for job in active[:]:
                    if (outcome := job.advance()) is None:
                        continue
                    active.remove(job)
                    free.append(job.slot)
                    outcomes[id(job.run)] = outcome
                    took.append(job.seconds)
                    left = len(waiting) + len(active)
                    seconds = _seconds_left(took, [other.seconds for other in active], waiting, len(slots))
                    finished(outcome, left, seconds)
    finally:
        for job in active:
            job.end()
    return [outcomes[id(run)] for run in runs]


class _Job:
    """A run in progress: its command lines one after another, with their output in one log."""

    def __init__(self, run: AblationRun, root: Path, slot: Mapping[str, str]) -> None:
        self.run, self.slot, self._root, self._env = run, slot, root, environment(root, slot)
        self._begin = time.monotonic()
        _end_orphan(run.folder)
        resumed = state(run) == "started" and (run.folder / LAST).exists()
        make_folder(run.folder)
        for ap in (STANDARD, *run.by_other_ap):
            (run.folder / evaluation_file(ap)).unlink(missing_ok=True)
        if not (run.folder / STAMP).exists():
            write_file(run.folder / STAMP, json.dumps(_plain(run.facts), indent=1) + "\n")
        self._log = run.folder / LOG
        train, *evaluations = run.commands
        self._waiting = [(*train, *["--resume"] * resumed), *evaluations]
        self._next("a" if resumed else "w")

    @property
    def seconds(self) -> float:
        """Since its start."""
        return time.monotonic() - self._begin

    def advance(self) -> RunOutcome | None:
        """The outcome of the run; None while it goes on."""
        if (code := self._process.poll()) is None:
            return None
        end_group(self._process)
        if code:
            return RunOutcome(run=self.run, figures=None, note=self._why(code))
        if self._waiting:
            self._next("a")
            return None
        result = figures(self.run)
        return RunOutcome(run=self.run, figures=result, note="" if result else "it ended without an error or figures")

    def end(self) -> None:
        """End its processes."""
        end_group(self._process)

    def _next(self, mode: str) -> None:
        command = self._waiting.pop(0)
        with self._log.open(mode) as output:
            print(f"$ {shlex.join(command)}", file=output, flush=True)
            self._process: subprocess.Popen[bytes] = start_group(command, Path.cwd(), self._env, output)
        write_file(self.run.folder / PID, f"{self._process.pid}\n")

    def _why(self, code: int) -> str:
        output = [line for line in last_lines(self._log, self._root) if not line.startswith("$ ")]
        how = f"ended by signal {-code}" if code < 0 else f"exit code {code}"
        return f"{how}{': ' if output else ''}{output[-1] if output else ''}; its log is {os.path.relpath(self._log)}"


def _end_orphan(folder: Path) -> None:
    """End the process of this run that a killed call left behind; it holds the folder. A training saves first."""
    try:
        pid = int((folder / PID).read_text())
        if os.fsencode(folder) not in Path(f"/proc/{pid}/cmdline").read_bytes():
            return  # it has ended, and the number is another's by now
        os.killpg(pid, signal.SIGTERM)
        deadline = time.monotonic() + SAVE_S
        while Path(f"/proc/{pid}/cmdline").read_bytes():  # empty for one that has ended and was not waited for
            if time.monotonic() > deadline:
                os.killpg(pid, signal.SIGKILL)
            time.sleep(POLL_S)
    except (OSError, ValueError):  # it is gone
        return


def _seconds_left(took: Sequence[float], active: Sequence[float], waiting: Sequence[AblationRun], slots: int) -> float:
    """Estimate by the mean time of the runs that ended."""
    mean = sum(took) / len(took)
    return (sum(max(0.0, mean - seconds) for seconds in active) + mean * len(waiting)) / slots


def _plain(facts: Mapping[str, Any]) -> Any:
    """As they come back from a file: tuples are lists."""
    return json.loads(json.dumps(facts))
