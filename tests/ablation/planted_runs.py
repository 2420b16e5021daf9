"""Stands in for pmm train and pmm evaluate: `python planted_runs.py PLAN.json train|evaluate ...` does what is planned.

PLAN.json: name of the run's folder -> {"mAP": ..., "truncated": what mAP is lower by another definition of AP, "fail":
"train"|"evaluate", "hang": true}; "" is for the others.
Writes the files that the real ones write, and a line per call to PLAN.calls.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any


class RunHere:
    """In place of the process that `start_group` starts: has ended at once, and lives in the process of the test."""

    pid = 0

    def __init__(self, command: Sequence[str], root: Path, env: Mapping[str, str], output: Any) -> None:
        self.code = 0
        try:
            with redirect_stdout(output):
                main(command[2:], env)
        except SystemExit as stop:
            print(stop.code, file=output)
            self.code = 1

    def poll(self) -> int:
        return self.code


def main(given: Sequence[str], env: Mapping[str, str]) -> None:
    plan, action, *words = given
    parser = argparse.ArgumentParser()
    parser.add_argument("checkpoint", nargs="?", type=Path)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--ap", default="standard")
    parser.add_argument("--resume", action="store_true")
    asked, rest = parser.parse_known_args(words)
    folder = asked.out or asked.json.parent
    planned = json.loads(Path(plan).read_text())
    todo = planned.get(folder.name, planned.get("", {}))
    with Path(plan).with_suffix(".calls").open("a") as calls:
        calls.write(json.dumps([folder.name, action, asked.resume, env["OMP_NUM_THREADS"], rest]) + "\n")
    if todo.get("fail") == action:
        sys.exit(f"planted.{action}: error: it was planned")
    if action == "evaluate":
        assert asked.checkpoint.read_text() == "trained"
        loss = 0.0 if asked.ap == "standard" else todo.get("truncated", 0.05)
        asked.json.write_text(json.dumps({"mAP": todo["mAP"] - loss, "rank1": todo.get("rank1", 0.5), "mINP": 0.1}))
        return
    assert asked.resume == (folder / "last.pth").exists(), "pmm train would refuse"
    (folder / "last.pth").touch()
    if todo.get("hang"):
        child = subprocess.Popen(["sleep", "60"])
        (folder / "pids").write_text(f"{os.getpid()} {child.pid}")
        time.sleep(60)
    epochs = [{"epoch": 1, "seconds": 2.0, "images_per_s": 100.0}, {"epoch": 2, "seconds": 1.0, "images_per_s": 400.0}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(epoch) + "\n" for epoch in epochs))
    (folder / "best.pth").write_text("trained")
    print("\nthe last line")


if __name__ == "__main__":
    main(sys.argv[1:], os.environ)
