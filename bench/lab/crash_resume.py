"""Kill a training run at random moments, resume it each time, and compare its result with that of an undisturbed run.

python -m bench.lab.crash_resume [--crashes 20] [--ids 40] [--epochs 30] [--seed 0] [--out FOLDER]

The weights of both have to agree to the bit, and every checkpoint on disk has to load after each kill.
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
from typing import Annotated, Any, NamedTuple

from pmm.config import DataConfig
from pmm.data.synthetic.dataset import draw_dataset
from pmm.utils import command_line
from pmm.utils.arguments import Arg
from pmm.utils.environment import report_header
from pmm.utils.errors import CannotWrite, UserError
from pmm.utils.files import make_folder, write_file

SCHEMA = "pmm-crash-resume-1"
# a checkpoint before each step unless one is being written: a kill comes soon after one, or within one
SAVE_MINUTES = "1e-9"
NAMES = ("last.pth", "best.pth")


class Crash(NamedTuple):
    """When to kill which processes."""

    after_s: float
    """Seconds after the first step, at least."""
    writing: bool
    """Wait until a checkpoint is being written."""
    alone: bool
    """Kill the training process alone, and leave its loader processes to notice that."""


def crash_and_resume(
    out: Path, *, crashes: int, ids: int, epochs: int, workers: int, seed: int, on_progress: Callable[[str], None]
) -> dict[str, Any]:
    """Train preset tiny on `ids` synthetic identities undisturbed, then again with `crashes` SIGKILLs: half of them
    while a checkpoint is being written beside the training, half of them of the training process alone. After each,
    every checkpoint must load.

    Returns a report (`SCHEMA`): the state after each kill, the checkpoints that could not be read, and whether the
    killed runs ended with the bits of the undisturbed one. Raises UserError if a run fails without being killed.
    """
    import torch

    data = ("--preset", "tiny", "--device", "cpu", "--root", str(out / "people"), "--synthetic-ids", str(ids))
    recipe = (*data, "--epochs", str(epochs), "--workers", str(workers), "--save-minutes", SAVE_MINUTES)
    begin = time.monotonic()
    draw_dataset(out / "people", ids=ids, seed=DataConfig().synthetic_seed)
    seconds = _train(out / "undisturbed", recipe)
    assert seconds is not None
    on_progress(f"undisturbed: {seconds:.1f} s of training")
    expected = _weights(out / "undisturbed")
    rng, records, unreadable, equal, runs = random.Random(seed), list[dict[str, Any]](), list[str](), True, 0
    while len(records) < crashes:
        run = out / f"killed-{runs}"
        runs += 1
        while True:
            resumed = ("--resume",) if (run / "last.pth").exists() else ()
            crash = Crash(
                after_s=rng.uniform(0, 2 * seconds / crashes),  # on average, all crashes fit into one run
                writing=len(records) % 2 == 1,
                alone=len(records) % 4 < 2,
            )
            if _train(run, (*recipe, *resumed), crash if len(records) < crashes else None) is not None:
                break
            records.append({"run": run.name, "after_s": round(crash.after_s, 3), "alone": crash.alone})
            records[-1] |= _state(run, unreadable)
            on_progress(f"crash {len(records)}: {records[-1]}")
        equal = equal and all(
            torch.equal(value, found[key])
            for name, found in _weights(run).items()
            for key, value in expected[name].items()
        )
        on_progress(f"{run.name}: finished, {'the same bits' if equal else 'OTHER BITS'}")
    return {
        **report_header(SCHEMA),
        "training": {"preset": "tiny", "ids": ids, "epochs": epochs, "workers": workers, "seconds": seconds},
        "seconds": round(time.monotonic() - begin, 1),
        "runs": runs,
        "crashes": records,
        "unreadable": unreadable,
        "equal": equal,
    }


def summary(report: Mapping[str, Any]) -> str:
    """The report in one line."""
    records = report["crashes"]
    writing, within = sum(record["writing"] for record in records), sum(record["step"] > 0 for record in records)
    bits = "the same bits as" if report["equal"] else "OTHER BITS than"
    return (
        f"{len(records)} crashes in {report['runs']} runs, {writing} while a file was being written, {within} resumed "
        f"in the middle of an epoch: {len(report['unreadable'])} checkpoints unreadable, and {bits} the undisturbed run"
    )


def _train(out: Path, args: tuple[str, ...], crash: Crash | None = None) -> float | None:
    """Train into `out`: seconds from the first step to the end, None if it was killed.

    Raises UserError with its last line if it fails without being killed.
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
        if ready and crash and time.monotonic() > ready + crash.after_s and (not crash.writing or _half_written(out)):
            with contextlib.suppress(ProcessLookupError):
                (os.kill if crash.alone else os.killpg)(pid, signal.SIGKILL)
            process.join()
    if process.exitcode == -signal.SIGKILL:
        return None
    if process.exitcode:
        raise UserError(f"a training run failed without being killed: {log.read_text().strip().splitlines()[-1]}")
    return time.monotonic() - ready


def _run(args: list[str], log: Path) -> None:
    """`python -m pmm.train ARGS`, in a new session."""
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
    """The epoch and step at which a killed run goes on; checkpoints that do not load are added to `unreadable`."""
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

    crashes: Annotated[int, Arg(least=1)] = 20
    """Times that the run is killed (SIGKILL)."""
    ids: Annotated[int, Arg(least=1)] = 40
    """Synthetic identities to train on, with preset tiny."""
    epochs: Annotated[int, Arg(least=1)] = 30
    """Epochs of the run."""
    workers: int = 1
    """Processes that load images."""
    seed: int = 0
    """Seed of the moments."""
    out: Path = Path("runs/crash_resume")
    """Empty folder for the runs and crash_resume.json."""


def main(prog: str) -> int:
    """Entry point; 1 if a run ended with other bits, or a checkpoint could not be read."""
    command = command_line.parse(CrashResumeCommand, prog=prog, description=__doc__ or "")
    if any(command.out.glob("*")):
        raise CannotWrite("the folder is not empty", path=command.out, hint="choose another one with --out")
    make_folder(command.out)

    report = crash_and_resume(
        command.out,
        crashes=command.crashes,
        ids=command.ids,
        epochs=command.epochs,
        workers=command.workers,
        seed=command.seed,
        on_progress=lambda line: print(line, flush=True),
    )
    write_file(command.out / "crash_resume.json", json.dumps(report, indent=1) + "\n")
    print(f"{summary(report)}\nreport: {command.out / 'crash_resume.json'}")
    return int(not report["equal"] or bool(report["unreadable"]))


if __name__ == "__main__":
    command_line.run(main, prog=PROG)
