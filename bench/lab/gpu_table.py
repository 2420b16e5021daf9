"""Where `make gpu` keeps what it makes, what its proofs rest on, and the files that it leaves in bench/results.

Loads the standard library only: what is missing to run the steps is theirs to say.
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
from pmm.utils.task_runner import Outcome, Step, digest, last_lines, without_places

SCHEMA = "pmm-gpu-1"
ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "bench" / "results"
SOURCES = ("bench", "cpp_ext", "export", "pmm", "tests")
SUFFIXES = (".py", ".j2", ".h", ".cpp", ".cu")


def folder_of(gpu: Gpu) -> Path:
    """Where the logs, the stamps and what the steps make lie: runs/gpu/nvidia-h200."""
    return ROOT / "runs" / "gpu" / slug(gpu.name)


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
    step, now = outcome.step, datetime.now(UTC)
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
    path = make_folder(RESULTS) / f"{datetime.now(UTC):%Y-%m-%d}-{slug(gpu.name)}.md"
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
