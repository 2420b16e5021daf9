"""All that a machine with an NVIDIA GPU can prove, step by step; the next time only what failed or changed.

make gpu, or PYTHONPATH=. python -m bench.lab.gpu [--only STEP ...] [--again STEP ...] [--device cuda:N]
Ends with one table of all figures, which is in bench/results too; what this machine cannot prove is in it, with why.

Where `make gpu` keeps what it makes, what its proofs rest on, and the files that it leaves in bench/results.

Loads the standard library only: what is missing to run the steps is theirs to say.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import sys
from collections.abc import Iterable, Sequence
from datetime import datetime, timezone
from pathlib import Path
from types import FrameType
from typing import Any

from bench.lab.gpu_figures import figures
from bench.lab.gpu_steps import gpu_steps
from pmm.utils import command_line
from pmm.utils.environment import describe_environment
from pmm.utils.errors import UserError
from pmm.utils.files import claimed, make_folder, write_file
from pmm.utils.hardware import Gpu, cuda_index, gpu_at, nvidia_gpus
from pmm.utils.task_runner import Outcome, Step, digest, last_lines, run_steps, standing, without_places

SCHEMA = "pmm-gpu-1"
ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "bench" / "results"
SOURCES = ("bench", "cpp_ext", "export", "pmm", "tests")
SUFFIXES = (".py", ".j2", ".h", ".cpp", ".cu")


def folder_of(gpu: Gpu) -> Path:
    """Where the logs, the stamps and what the steps make lie: runs/gpu/nvidia-h200."""
    return ROOT / "runs" / "gpu" / slug(gpu.name)


def slug(name: str) -> str:
    """A name for files: NVIDIA H200 -> nvidia-h200."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def dependencies() -> dict[str, Any]:
    """What every proof rests on: the sources (whatever the commit is called), the libraries, the driver."""
    facts = describe_environment()
    files = (path for part in SOURCES for path in sorted((ROOT / part).rglob("*")) if path.suffix in SUFFIXES)
    sources = digest(ROOT, [ROOT / "setup.py", *files])
    return {key: facts[key] for key in ("python", "versions", "driver")} | {"sources": sources}


def packages(steps: Iterable[Step]) -> str:
    """One line: what is missing on this machine, and what that costs."""
    costs: dict[str, list[str]] = {}
    for step in steps:
        for need in step.missing():
            costs.setdefault(need, []).append(step.name)
    said = [f"{need.replace('|', ' or ')} is missing: no {', '.join(names)}" for need, names in costs.items()]
    return "packages: " + ("; ".join(said) or "nothing is missing")


def write_result(outcome: Outcome, gpu: Gpu) -> Path | None:
    """What a step found, with all that is needed to do it again, as DATE-CARD-STEP.json; only of one that passed."""
    if outcome.status != "passed":
        return None
    step, now = outcome.step, datetime.now(timezone.utc)
    made = [path for path in step.makes if path.endswith((".json", ".jsonl"))]
    result = {
        "schema": SCHEMA,
        "created": now.isoformat(timespec="seconds"),
        "step": step.name,
        "status": outcome.status,
        "note": outcome.note,
        "seconds": outcome.seconds,
        "commands": step.lines(),
        "environment": describe_environment(),
        "said": last_lines(outcome.log, ROOT) if outcome.log else [],
        "files": {Path(path).name: read_values(ROOT / path) for path in made},
    }
    path = make_folder(RESULTS) / f"{now:%Y-%m-%d}-{slug(gpu.name)}-{step.name}.json"
    write_file(path, json.dumps(result, indent=1) + "\n")
    return path


def write_table(outcomes: Sequence[Outcome], gpu: Gpu) -> Path:
    """`table` of all figures, as DATE-CARD.md in bench/results."""
    path = make_folder(RESULTS) / f"{datetime.now(timezone.utc):%Y-%m-%d}-{slug(gpu.name)}.md"
    write_file(path, table(outcomes, gpu) + "\n")
    return path


def table(outcomes: Sequence[Outcome], gpu: Gpu) -> str:
    """One Markdown table, to be pasted into a report: each step, what became of it, and a line per figure of it."""
    facts = describe_environment()
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    driver = facts["driver"] or "unknown"
    proved = sum(outcome.status == "passed" for outcome in outcomes)
    return "\n".join(
        [
            f"{gpu.name} (compute capability {gpu.compute_capability}), driver {driver}, {versions}",
            "",
            "| step | status | s | what | figures |",
            "|---|---|---:|---|---|",
            *(row for outcome in outcomes for row in _rows(outcome)),
            "",
            f"{proved} of {len(outcomes)} steps proved; commit {facts['commit']}.",
        ]
    )


def _rows(outcome: Outcome) -> list[str]:
    found = [("", without_places(outcome.note, ROOT))]
    if outcome.status == "passed":
        made = [path for path in outcome.step.makes if path.endswith((".json", ".jsonl"))]
        found = [pair for path in made for pair in figures(read_values(ROOT / path))] or [("", "")]
    first = (outcome.step.name, outcome.status, f"{outcome.seconds:.0f}" if outcome.seconds else "")
    cells = [(*(("", "", "") if index else first), *pair) for index, pair in enumerate(found)]
    return ["| " + " | ".join(map(_cell, row)) + " |" for row in cells]


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())


def read_values(path: Path) -> Any:
    """What a JSON file holds, or a list of what the lines of a .jsonl file do."""
    text = path.read_text()
    return [json.loads(line) for line in text.splitlines()] if path.suffix == ".jsonl" else json.loads(text)


PROG = "make gpu"


def main() -> None:
    """Entry point. Parses by the standard library: a machine without our packages shall be told so."""
    parser = argparse.ArgumentParser(prog=PROG, description=__doc__)
    parser.add_argument("--only", nargs="+", default=[], metavar="STEP", help="leave out all other steps")
    parser.add_argument("--again", nargs="+", default=[], metavar="STEP", help="run these even if they passed before")
    parser.add_argument("--device", default="cuda", metavar="cuda:N", help="another GPU than the first")
    parser.add_argument("--check", action="store_true", help="only say whether there is a GPU")
    command = parser.parse_args()
    if not nvidia_gpus():
        raise UserError("the CUDA driver sees no NVIDIA GPU here")
    if command.check:
        return
    index = cuda_index(command.device)
    if index is None:
        raise UserError(f"--device is {command.device}; expected cuda or cuda:N")
    gpu = gpu_at(index)
    steps, folder = gpu_steps(gpu, index or None), folder_of(gpu)
    names = [step.name for step in steps]
    if unknown := {*command.only, *command.again} - set(names):
        raise UserError(f"unknown step {', '.join(sorted(unknown))}; known: {', '.join(names)}")
    depends, chosen = dependencies(), [step for step in steps if step.name in (command.only or names)]

    def started(step: Step) -> None:
        print(f"{step.name}: at most {step.limit_s} s", flush=True)

    def finished(outcome: Outcome) -> None:
        result = write_result(outcome, gpu)
        where = f", {os.path.relpath(result)}" if result else ""
        print(f"{outcome.step.name}: {outcome.status} in {outcome.seconds:.0f} s{where}", flush=True)

    print(f"{gpu.name}: logs in {os.path.relpath(folder)}\n{packages(chosen)}", flush=True)
    signal.signal(signal.SIGTERM, _end)  # so that the step under way ends too
    outcomes: list[Outcome] = []
    with claimed(folder):
        try:
            for outcome in run_steps(
                chosen,
                folder,
                root=ROOT,
                depends=depends,
                again=command.again,
                started=started,
                finished=finished,
            ):
                outcomes.append(outcome)
        finally:  # interrupted, too: all that is proved so far
            ran = {outcome.step.name: outcome for outcome in outcomes}
            all_of_them = [ran.get(step.name) or standing(step, folder, ROOT, depends) for step in steps]
            print(f"\n{table(all_of_them, gpu)}\n\ntable: {os.path.relpath(write_table(all_of_them, gpu))}", flush=True)
    for outcome in outcomes:
        if outcome.log and not outcome.fine:
            print("\n".join(["", f"{os.path.relpath(outcome.log)}:", *last_lines(outcome.log, ROOT)]), flush=True)
    if missed := [f"{o.step.name} ({o.status}, {o.note})" for o in outcomes if not o.fine]:
        raise UserError(f"not proved: {'; '.join(missed)}")


def _end(number: int, frame: FrameType | None) -> None:
    sys.exit(128 + number)


if __name__ == "__main__":
    command_line.run(main, prog=PROG)
