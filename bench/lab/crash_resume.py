"""Kill a training run at random moments, resume it each time, and compare its end with that of a run left in peace.

python -m bench.lab.crash_resume [--kills 20] [--ids 40] [--epochs 30] [--seed 0] [--out FOLDER]

Training runs that are killed at random moments and resumed, beside one that is left in peace.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import random
import signal
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from pmm.config import DataConfig
from pmm.data.synthetic.dataset import draw_dataset
from pmm.utils import command_line
from pmm.utils.environment import report_header
from pmm.utils.errors import UserError
from pmm.utils.files import make_folder, write_file

SCHEMA = "pmm-kills-1"
SAVE_MINUTES = "1e-9"  # a checkpoint after every step: many moments in which one is being written
NAMES = ("last.pth", "best.pth")


class _Kill(NamedTuple):
    """When and whom to kill."""

    after_s: float
    """Seconds after the first step, at least."""
    writing: bool
    """Not before a checkpoint is being written."""
    alone: bool
    """The training process without those that load its images, which are left to find that out."""


def kill_and_resume(
    out: Path, *, kills: int, ids: int, epochs: int, workers: int, seed: int, said: Callable[[str], None]
) -> dict[str, Any]:
    """Train preset tiny on `ids` synthetic identities once in peace, then, again and again, under SIGKILL until `kills`
    have hit, half of them while a checkpoint is being written, half of them the training process alone; after each,
    every checkpoint there is must load.

    Returns a report (`SCHEMA`): where each kill hit, which checkpoints could not be read, and whether the killed runs
    ended with the bits of the first. Raises UserError if a run fails by itself.
    """
    import torch

    data = ("--preset", "tiny", "--device", "cpu", "--root", str(out / "people"), "--synthetic-ids", str(ids))
    recipe = (*data, "--epochs", str(epochs), "--workers", str(workers), "--save-minutes", SAVE_MINUTES)
    begin = time.monotonic()
    draw_dataset(out / "people", ids=ids, seed=DataConfig().synthetic_seed)
    seconds = _train(out / "peace", recipe)
    assert seconds is not None
    said(f"in peace: {seconds:.1f} s of training")
    expected = _weights(out / "peace")
    rng, hits, unreadable, equal, runs = random.Random(seed), list[dict[str, Any]](), list[str](), True, 0
    while len(hits) < kills:
        run = out / f"killed-{runs}"
        runs += 1
        while True:
            resumed = ("--resume",) if (run / "last.pth").exists() else ()
            kill = _Kill(
                after_s=rng.uniform(0, 2 * seconds / kills),  # in the mean, one run has room for all
                writing=len(hits) % 2 == 1,
                alone=len(hits) % 4 < 2,
            )
            if _train(run, (*recipe, *resumed), kill if len(hits) < kills else None) is not None:
                break
            hits.append({"run": run.name, "after_s": round(kill.after_s, 3), "alone": kill.alone})
            hits[-1] |= _state(run, unreadable)
            said(f"kill {len(hits)}: {hits[-1]}")
        equal = equal and all(
            torch.equal(value, found[key])
            for name, found in _weights(run).items()
            for key, value in expected[name].items()
        )
        said(f"{run.name}: finished, {'the same bits' if equal else 'OTHER BITS'}")
    return {
        **report_header(SCHEMA),
        "training": {"preset": "tiny", "ids": ids, "epochs": epochs, "workers": workers, "seconds": seconds},
        "seconds": round(time.monotonic() - begin, 1),
        "runs": runs,
        "kills": hits,
        "unreadable": unreadable,
        "equal": equal,
    }


def summary(report: Mapping[str, Any]) -> str:
    """The report in one line."""
    hits = report["kills"]
    writing, within = sum(hit["writing"] for hit in hits), sum(hit["step"] > 0 for hit in hits)
    bits = "the bits of the run in peace" if report["equal"] else "OTHER BITS than the run in peace"
    return (
        f"{len(hits)} kills in {report['runs']} runs, {writing} while a file was being written, {within} followed by a "
        f"start in the middle of an epoch: {len(report['unreadable'])} checkpoints unreadable, all ended with {bits}"
    )


def _train(out: Path, args: tuple[str, ...], kill: _Kill | None = None) -> float | None:
    """Train into `out`: seconds from the first step to the end, None if it was killed.

    Raises UserError with its last line if it fails by itself.
    """
    log = out.with_suffix(".log")
    log.write_text("")
    # forked from a process that has loaded torch and trained nothing: a start of Python would take longer than the run
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["pmm.commands.train", "pmm.training.trainer"])
    process = context.Process(target=_run, args=([*args, "--out", str(out)], log))
    process.start()
    pid, ready = process.pid, 0.0
    assert pid is not None
    while process.is_alive():
        time.sleep(0.0005 if ready else 0.01)
        if not ready and "\nrun: " in log.read_text():
            ready = time.monotonic()
        if ready and kill and time.monotonic() > ready + kill.after_s and (not kill.writing or _half_written(out)):
            with contextlib.suppress(ProcessLookupError):
                (os.kill if kill.alone else os.killpg)(pid, signal.SIGKILL)
            process.join()
    if process.exitcode == -signal.SIGKILL:
        return None
    if process.exitcode:
        raise UserError(f"a training run failed by itself: {log.read_text().strip().splitlines()[-1]}")
    return time.monotonic() - ready


def _run(args: list[str], log: Path) -> None:
    """`python -m pmm.train ARGS`, in a session of its own."""
    from pmm import train
    from pmm.utils import command_line

    multiprocessing.set_start_method(None, force=True)  # the default again, for the processes that load images
    os.setsid()
    with log.open("a") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    os.environ["PMM_FAST"] = "0"
    sys.argv = [train.PROG, *args]
    command_line.run(train.main, prog=train.PROG)


def _half_written(run: Path) -> bool:
    return any(run.glob(".*.pth*"))


def _state(run: Path, unreadable: list[str]) -> dict[str, Any]:
    """Where a killed run can go on; checkpoints that do not load are added to `unreadable`."""
    from pmm.artifacts import checkpoint

    state: dict[str, Any] = {"epoch": 0, "step": 0, "writing": _half_written(run)}
    for name in NAMES:
        if not (run / name).exists():
            continue
        try:
            found = checkpoint.load(run / name)
        except UserError as error:
            unreadable.append(str(error))
        else:
            if name == "last.pth":
                state |= {"epoch": found["epoch"], "step": (found["progress"] or {}).get("steps", 0)}
    return state


def _weights(run: Path) -> dict[str, dict[str, Any]]:
    from pmm.artifacts import checkpoint

    return {name: checkpoint.load(run / name)["model"] for name in NAMES}


PROG = "bench.lab.crash_resume"


@dataclass(frozen=True, kw_only=True)
class CrashResumeCommand:
    """`python -m bench.lab.crash_resume ...`"""

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


def main(prog: str) -> int:
    """Entry point; 1 if a run ended with other bits, or a checkpoint could not be read."""
    command = command_line.parse(CrashResumeCommand, prog=prog, description=__doc__ or "")
    for flag in ("kills", "ids", "epochs"):
        command_line.numbers(str(getattr(command, flag)), flag=f"--{flag}")
    if any(command.out.glob("*")):
        raise UserError(f"{command.out} is not empty; give another --out")
    make_folder(command.out)

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
    command_line.run(main, prog=PROG)
