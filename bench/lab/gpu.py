"""Test and measure all that needs an NVIDIA GPU, task by task; the next time only the tasks that failed or changed.

make gpu, or PYTHONPATH=. python -m bench.lab.gpu [--only TASK ...] [--again TASK ...] [--device cuda:N]
Ends with one table of all figures, which is in bench/results too; tasks that this machine cannot run have the reason.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from types import FrameType

from bench.lab.gpu_table import ROOT, dependencies, folder_of, packages, table, write_result, write_table
from bench.lab.gpu_tasks import gpu_tasks
from pmm.utils import command_line
from pmm.utils.errors import BackendUnavailable, InvalidValue, UserError
from pmm.utils.files import claimed
from pmm.utils.hardware import cuda_index, gpu_at, nvidia_gpus
from pmm.utils.task_runner import Task, TaskOutcome, earlier_outcome, last_lines, run_tasks

PROG = "make gpu"


def main(prog: str) -> None:
    """Entry point. Parses with the standard library, to report missing packages on a machine that has none."""
    parser = argparse.ArgumentParser(prog=prog, description=__doc__)
    parser.add_argument("--only", nargs="+", default=[], metavar="TASK", help="leave out all other tasks")
    parser.add_argument("--again", nargs="+", default=[], metavar="TASK", help="run these even if they passed before")
    parser.add_argument("--device", default="cuda", metavar="cuda:N", help="another GPU than the first")
    parser.add_argument("--check", action="store_true", help="only say whether there is a GPU")
    command = parser.parse_args()
    if not nvidia_gpus():
        raise BackendUnavailable("no NVIDIA GPU is visible", hint="check the driver and CUDA_VISIBLE_DEVICES")
    if command.check:
        return
    index = cuda_index(command.device)
    if index is None:
        raise InvalidValue("--device", command.device, "cuda or cuda:N")
    gpu = gpu_at(index)
    tasks, folder = gpu_tasks(gpu, index or None), folder_of(gpu)
    names = [task.name for task in tasks]
    if unknown := {*command.only, *command.again} - set(names):
        flag = "--only" if unknown & set(command.only) else "--again"
        raise InvalidValue(flag, ", ".join(sorted(unknown)), choices=names)
    depends, chosen = dependencies(), [task for task in tasks if task.name in (command.only or names)]

    def started(task: Task) -> None:
        print(f"{task.name}: at most {task.limit_s} s", flush=True)

    def finished(outcome: TaskOutcome) -> None:
        result = write_result(outcome, gpu)
        where = f", {os.path.relpath(result)}" if result else ""
        print(f"{outcome.task.name}: {outcome.status} in {outcome.seconds:.0f} s{where}", flush=True)

    print(f"{gpu.name}: logs in {os.path.relpath(folder)}\n{packages(chosen)}", flush=True)
    signal.signal(signal.SIGTERM, _end)  # so that the running task ends too
    outcomes: list[TaskOutcome] = []
    with claimed(folder):
        try:
            for outcome in run_tasks(
                chosen,
                folder,
                root=ROOT,
                depends=depends,
                again=command.again,
                started=started,
                finished=finished,
            ):
                outcomes.append(outcome)
        finally:  # after an interrupt too: the table of all results so far
            by_name = {outcome.task.name: outcome for outcome in outcomes}
            every = [by_name.get(task.name) or earlier_outcome(task, folder, ROOT, depends) for task in tasks]
            print(f"\n{table(every, gpu)}\n\ntable: {os.path.relpath(write_table(every, gpu))}", flush=True)
    for outcome in outcomes:
        if outcome.log and not outcome.ok:
            print("\n".join(["", f"{os.path.relpath(outcome.log)}:", *last_lines(outcome.log, ROOT)]), flush=True)
    if missed := [f"{o.task.name} ({o.status}, {o.note})" for o in outcomes if not o.ok]:
        raise UserError(f"not proved: {'; '.join(missed)}")


def _end(number: int, frame: FrameType | None) -> None:
    sys.exit(128 + number)


if __name__ == "__main__":
    command_line.run(main, prog=PROG)
