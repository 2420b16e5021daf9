"""Time what a save costs the training thread, against a copy of the state in memory; the files are compared first.

python -m bench.lab.saving [--preset paper] [--rounds 15] [--out FILE.json]

The file is written by another thread meanwhile: the longest time for which that thread does not let a loop in Python go
on is measured too.
"""

from __future__ import annotations

import dataclasses
import json
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from torch import Tensor

from bench.lab.mix_report import interval
from pmm.artifacts import checkpoint
from pmm.bench.latency import LatencyPlan, measure
from pmm.bench.statistics import median_ratio
from pmm.config import Config, fast_mode
from pmm.models.registry import build_model
from pmm.presets import preset
from pmm.training.saver import BEST, LAST, Saver
from pmm.training.snapshot import snapshot
from pmm.training.state import TrainState, make_train_state
from pmm.utils import command_line
from pmm.utils.arguments import Arg
from pmm.utils.environment import report_header
from pmm.utils.files import make_folder, output_file, write_file

SCHEMA = "pmm-saving-bench-1"
CPU = torch.device("cpu")
CLASSES = 751  # of Market-1501's training part
LIMIT = 1.5
"""How many times a copy of the state to memory in use a save may cost the training thread."""
COPY, CLONE, ON_DISK = "copy to memory in use", "copy to new memory", "last.pth, until it is on the disk"


def bench_saving(config: Config, folder: Path, plan: LatencyPlan) -> dict[str, Any]:
    """Save the state of a run of `config` on the CPU into `folder`; see `SCHEMA`.

    Times are in milliseconds of the training thread per save. `equal` is false if a file differs from the state that
    was saved, which changes while it is written; nothing is then timed.
    """
    state = _train_state(config)
    current = snapshot(state, 1, -1.0)
    with closing(Saver(folder, 1.0, CPU)) as saver:
        equal = _equal_files(state, saver)
        memory = _clone(current)
        steps: dict[str, Callable[[], object]] = {
            COPY: lambda: _copy(current, memory),
            CLONE: lambda: _clone(current),
            LAST: lambda: saver.save_last(snapshot(state, 1, -1.0)),
            BEST: lambda: saver.save_best(snapshot(state, 1, -1.0)),
            ON_DISK: lambda: saver.save_now(snapshot(state, 1, -1.0)),
        }

        def stopwatch(step: Callable[[], object]) -> float:
            begin = time.perf_counter()
            result = step()
            elapsed = 1000 * (time.perf_counter() - begin)
            del result
            saver.wait()
            return elapsed

        times = measure(steps, plan, stopwatch=stopwatch) if equal else {}
        pauses = [_longest_pause(saver, snapshot(state, 1, -1.0)) for _ in range(3)] if equal else []
    return {
        **report_header(SCHEMA),
        "plan": dataclasses.asdict(plan),
        "preset": config.preset,
        "limit": LIMIT,
        "threads": torch.get_num_threads(),
        "bytes": {name: (folder / name).stat().st_size for name in (LAST, BEST)},
        "equal": equal,
        "rows": [
            {
                "name": name,
                "ms": found.p50,
                "samples_ms": [round(value, 3) for value in found.samples_ms],
                "over": {base: interval(median_ratio(found, times[base], block=plan.block)) for base in (COPY, CLONE)},
            }
            for name, found in times.items()
        ],
        "longest_pause_ms": pauses,
    }


def markdown(report: Mapping[str, Any]) -> str:
    """The report as a table; ratios with 95 % intervals (from 6 rounds on)."""
    lines = [f"| preset {report['preset']} | ms | over {COPY} | over {CLONE} |", "|---|---:|---:|---:|"]
    for row in report["rows"]:
        cells = [
            f"{over['ratio']:.2f}" + (" ({:.2f}-{:.2f})".format(*over["interval"]) if over["interval"] else "")
            for over in row["over"].values()
        ]
        lines.append(f"| {row['name']} | {row['ms']:.1f} | {' | '.join(cells)} |")
    pauses = ", ".join(f"{value:.0f}" for value in report["longest_pause_ms"])
    return "\n".join([*lines, f"longest pauses of a loop in Python during a write: {pauses} ms"])


def over_limit(report: Mapping[str, Any]) -> list[str]:
    """A line for each file whose save costs more than the limit."""
    ratios = {row["name"]: row["over"][COPY]["ratio"] for row in report["rows"] if row["name"] in (LAST, BEST)}
    return [
        f"{name} takes {ratio:.2f} times a {COPY}, limit {report['limit']}"
        for name, ratio in ratios.items()
        if ratio > report["limit"]
    ]


def _train_state(config: Config) -> TrainState:
    model = dataclasses.replace(config.model, weights="none", num_classes=CLASSES)
    state = make_train_state(build_model(dataclasses.replace(config, model=model)), config, CPU, 1)
    _step(state)
    return state


def _step(state: TrainState) -> None:
    """Changes each weight and each moment."""
    for weight in state.model.parameters():
        weight.grad = torch.ones_like(weight)
    state.optimizer.step()
    state.optimizer.zero_grad()


def _equal_files(state: TrainState, saver: Saver) -> bool:
    """Whether the files hold the state of the call, though a step is taken while they are written; in new memory, and
    in that of an earlier call."""
    equal = True
    for epoch in (1, 2):
        expected = _clone(snapshot(state, epoch, -1.0))
        saver.save_last(snapshot(state, epoch, -1.0))
        saver.save_best(snapshot(state, epoch, -1.0))
        _step(state)
        saver.wait()
        last, best = (checkpoint.load(saver.out / name) for name in (LAST, BEST))
        equal = equal and _same(last, expected) and _same(best["model"], expected["model"])
    return equal


def _longest_pause(saver: Saver, content: dict[str, Any]) -> float:
    """ms between two turns of a loop while `content` is written."""
    saver.save_last(content)
    longest, last = 0.0, time.perf_counter()
    while saver.writing:
        now = time.perf_counter()
        longest, last = max(longest, now - last), now
    return 1000 * longest


def _clone(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, Mapping):
        return {key: _clone(each) for key, each in value.items()}
    return [_clone(each) for each in value] if isinstance(value, list | tuple) else value


def _copy(value: Any, memory: Any) -> None:
    if isinstance(value, Tensor):
        memory.copy_(value)
    elif isinstance(value, Mapping):
        for key, each in value.items():
            _copy(each, memory[key])
    elif isinstance(value, list | tuple):
        for each, copied in zip(value, memory, strict=True):
            _copy(each, copied)


def _same(value: Any, expected: Any) -> bool:
    if isinstance(expected, Tensor):
        return torch.equal(value, expected)
    if isinstance(expected, Mapping):
        return value.keys() == expected.keys() and all(_same(value[key], expected[key]) for key in expected)
    if isinstance(expected, list):
        return len(value) == len(expected) and all(map(_same, value, expected))
    return bool(value == expected)


PROG = "bench.lab.saving"


@dataclass(frozen=True, kw_only=True)
class SavingCommand:
    """`python -m bench.lab.saving ...`"""

    preset: str = "paper"
    """Preset whose state is saved."""
    rounds: Annotated[int, Arg(least=1)] = 15
    """Saves of each way that are timed."""
    out: Path = Path("runs/saving-bench/saving.json")
    """JSON file to write."""


def main(prog: str) -> int:
    """Entry point; 1 if a file differs from the state, or a save costs more than `LIMIT` (but for a quick try)."""
    command = command_line.parse(SavingCommand, prog=prog, description=__doc__ or "")
    config, out = preset(command.preset), output_file(command.out)
    samples = 2 if fast_mode() else command.rounds
    plan = LatencyPlan(warmup=0.0, warmup_runs=1, samples=samples, block=1, settle=0.0, lead=0, budget=600.0)
    with tempfile.TemporaryDirectory(dir=make_folder(out.parent)) as folder:  # on the disk that is meant
        report = bench_saving(config, Path(folder), plan)
    write_file(out, json.dumps(report, indent=1) + "\n")
    missed = over_limit(report)
    print("\n".join([markdown(report), *missed, f"report: {out}"]))
    return int(not report["equal"] or (bool(missed) and not fast_mode()))


if __name__ == "__main__":
    command_line.run(main, prog=PROG)
