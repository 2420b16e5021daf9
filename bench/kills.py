"""Kill a training run at random moments, resume it each time, and compare its end with that of a run left in peace.

python bench/kills.py [--kills 20] [--ids 40] [--epochs 30] [--seed 0] [--out FOLDER]
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from pmm import cli
from pmm.errors import UserError
from pmm.files import make_folder, write_file

PROG = "bench/kills.py"


@dataclass(frozen=True, kw_only=True)
class Command:
    """`python bench/kills.py ...`"""

    kills: int = 20
    """Times that the run is killed (SIGKILL)."""
    ids: int = 40
    """Synthetic identities to train on, with preset tiny."""
    epochs: int = 30
    """Epochs of the run."""
    workers: int = 1
    """Processes that load images."""
    seed: int = 0
    """Seed of the moments."""
    out: Path = Path("runs/kills")
    """Folder of the runs and of kills.json; it must not hold any yet."""


def main() -> int:
    """Entry point; 1 if a run ended with other bits, or a checkpoint could not be read."""
    command = cli.parse(Command, prog=PROG, description=__doc__ or "")
    for flag in ("kills", "ids", "epochs"):
        cli.numbers(str(getattr(command, flag)), flag=f"--{flag}")
    if any(command.out.glob("*")):
        raise UserError(f"{command.out} is not empty; give another --out")
    make_folder(command.out)

    from pmm.bench.kills import kill_and_resume, summary

    report = kill_and_resume(
        command.out,
        kills=command.kills,
        ids=command.ids,
        epochs=command.epochs,
        workers=command.workers,
        seed=command.seed,
        said=lambda line: print(line, flush=True),
    )
    write_file(command.out / "kills.json", json.dumps(report, indent=1) + "\n")
    print(f"{summary(report)}\nreport: {command.out / 'kills.json'}")
    return int(not report["equal"] or bool(report["unreadable"]))


if __name__ == "__main__":
    cli.run(main, prog=PROG)
