"""All that a machine with an NVIDIA GPU can prove, step by step; the next time only what failed or changed.

make gpu, or PYTHONPATH=. python -m bench.lab.gpu [--only STEP ...] [--again STEP ...] [--device cuda:N]
Ends with one table of all figures, which is in bench/results too; what this machine cannot prove is in it, with why.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from types import FrameType

from bench.lab.gpu_steps import gpu_steps
from bench.lab.gpu_table import ROOT, dependencies, folder_of, packages, table, write_result, write_table
from pmm.utils import command_line
from pmm.utils.errors import UserError
from pmm.utils.files import claimed
from pmm.utils.hardware import cuda_index, gpu_at, nvidia_gpus
from pmm.utils.task_runner import Outcome, Step, last_lines, run_steps, standing

PROG = "make gpu"


def main(prog: str) -> None:
    """Entry point. Parses by the standard library: a machine without our packages shall be told so."""
    parser = argparse.ArgumentParser(prog=prog, description=__doc__)
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
