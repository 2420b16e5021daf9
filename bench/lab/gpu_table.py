"""The folders of `make gpu`, the facts that its results depend on, and its files in bench/results.

Loads the standard library only: each task reports its missing packages itself.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from bench.lab.gpu_figures import figures
from pmm.utils.environment import describe_environment, slug
from pmm.utils.files import make_folder, write_file
from pmm.utils.hardware import Gpu
from pmm.utils.task_runner import Task, TaskOutcome, digest, last_lines, strip_paths

SCHEMA = "pmm-gpu-1"
ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "bench" / "results"
SOURCES = ("bench", "cpp_ext", "export", "pmm", "tests")
SUFFIXES = (".py", ".j2", ".h", ".cpp", ".cu")


def folder_of(gpu: Gpu) -> Path:
    """The folder of logs, stamps and outputs of the tasks: runs/gpu/nvidia-h200."""
    return ROOT / "runs" / "gpu" / slug(gpu.name)


def dependencies() -> dict[str, Any]:
    """The facts that every result depends on: the sources (not the commit's name), the libraries, the driver."""
    facts = describe_environment()
    files = (path for part in SOURCES for path in sorted((ROOT / part).rglob("*")) if path.suffix in SUFFIXES)
    sources = digest(ROOT, [ROOT / "setup.py", *files])
    return {key: facts[key] for key in ("python", "versions", "driver")} | {"sources": sources}


def packages(tasks: Iterable[Task]) -> str:
    """One line: the packages that are missing on this machine, and the tasks that cannot run without them."""
    blocked: dict[str, list[str]] = {}
    for task in tasks:
        for package in task.missing():
            blocked.setdefault(package, []).append(task.name)
    parts = [f"{package.replace('|', ' or ')} is missing: no {', '.join(names)}" for package, names in blocked.items()]
    return "packages: " + ("; ".join(parts) or "nothing is missing")


def write_result(outcome: TaskOutcome, gpu: Gpu) -> Path | None:
    """Write the result of a task that passed, with all that is needed to repeat it, as DATE-CARD-TASK.json."""
    if outcome.status != "passed":
        return None
    task, now = outcome.task, datetime.now(UTC)
    made = [path for path in task.outputs if path.endswith((".json", ".jsonl"))]
    result = {
        "schema": SCHEMA,
        "created": now.isoformat(timespec="seconds"),
        "step": task.name,
        "status": outcome.status,
        "note": outcome.note,
        "seconds": outcome.seconds,
        "commands": task.lines(),
        "environment": describe_environment(),
        "said": last_lines(outcome.log, ROOT) if outcome.log else [],
        "files": {Path(path).name: read_values(ROOT / path) for path in made},
    }
    path = make_folder(RESULTS) / f"{now:%Y-%m-%d}-{slug(gpu.name)}-{task.name}.json"
    write_file(path, json.dumps(result, indent=1) + "\n")
    return path


def write_table(outcomes: Sequence[TaskOutcome], gpu: Gpu) -> Path:
    """`table` of all figures, as DATE-CARD.md in bench/results."""
    path = make_folder(RESULTS) / f"{datetime.now(UTC):%Y-%m-%d}-{slug(gpu.name)}.md"
    write_file(path, table(outcomes, gpu) + "\n")
    return path


def table(outcomes: Sequence[TaskOutcome], gpu: Gpu) -> str:
    """One Markdown table, for a report: each task with its status, and a line per figure."""
    facts = describe_environment()
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    driver = facts["driver"] or "unknown"
    proved = sum(outcome.status == "passed" for outcome in outcomes)
    return "\n".join(
        [
            f"{gpu.name} (compute capability {gpu.compute_capability}), driver {driver}, {versions}",
            "",
            "| task | status | s | what | figures |",
            "|---|---|---:|---|---|",
            *(row for outcome in outcomes for row in _rows(outcome)),
            "",
            f"{proved} of {len(outcomes)} tasks proved; commit {facts['commit']}.",
        ]
    )


def _rows(outcome: TaskOutcome) -> list[str]:
    found = [("", strip_paths(outcome.note, ROOT))]
    if outcome.status == "passed":
        made = [path for path in outcome.task.outputs if path.endswith((".json", ".jsonl"))]
        found = [pair for path in made for pair in figures(read_values(ROOT / path))] or [("", "")]
    first = (outcome.task.name, outcome.status, f"{outcome.seconds:.0f}" if outcome.seconds else "")
    cells = [(*(("", "", "") if index else first), *pair) for index, pair in enumerate(found)]
    return ["| " + " | ".join(map(_cell, row)) + " |" for row in cells]


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())


def read_values(path: Path) -> Any:
    """The content of a JSON file, or the list of the lines' contents of a .jsonl file."""
    text = path.read_text()
    return [json.loads(line) for line in text.splitlines()] if path.suffix == ".jsonl" else json.loads(text)
