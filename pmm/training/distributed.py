"""The processes that train one model together, as `torchrun` starts them; alone, a process is the first of one."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pmm.utils.errors import BackendUnavailable, InvalidValue, UserError

T = TypeVar("T")

TORCHRUN_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
"""Of the environment of each process that torchrun starts."""
PEER_ENDED = "another process of this run has ended; see its message for the reason"
PEER_LEFT = ("onnection closed by", "onnection was likely closed", "onnection reset by peer", "roken pipe")
"""Words of gloo, NCCL and torch's store that mean that the other side has ended."""
HINTS = {
    "shared memory|/dev/shm": "in a container give --shm-size 1g or more, or --ipc=host",
    "address already in use|EADDRINUSE": "choose another --master-port of torchrun",
    "onnection refused|timed out|No route to host|Unable to find|Failed to bind|failed to connect": "check that the "
    "machines reach each other; NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME name the network interface between them",
}
"""Words of a failed communication (a regular expression) -> what to do."""
_CPP_STACK = "Exception raised from"


@dataclass(frozen=True, kw_only=True)
class Processes:
    """This process among those of the run. All of them have to make the same calls in the same order."""

    rank: int = 0
    world: int = 1

    @property
    def main(self) -> bool:
        """Whether this is the first process, which writes the files and speaks to the user."""
        return self.rank == 0

    def all_reduce_max(self, number: int) -> int:
        """The largest `number` of all processes."""
        if self.world == 1:
            return number
        numbers = torch.tensor([number])
        with _peers():
            dist.all_reduce(numbers, dist.ReduceOp.MAX)
        return int(numbers)

    def gather(self, value: Any) -> list[Any]:
        """The values (picklable) of all processes by rank, in the first process; an empty list in the others."""
        if self.world == 1:
            return [value]
        values: list[Any] = [None] * self.world if self.main else []
        with _peers():
            dist.gather_object(value, values if self.main else None)
        return values

    def broadcast(self, value: Any) -> Any:
        """The first process's value (picklable), in all processes."""
        if self.world == 1:
            return value
        values = [value]
        with _peers():
            dist.broadcast_object_list(values)
        return values[0]

    def run_on_all(self, action: Callable[[], T]) -> T:
        """What `action` returns in this process, if it succeeds in all processes.

        Otherwise the first process raises the first UserError, whose text names the process that it comes from, and
        the other processes exit silently.
        """
        value, error = None, None
        try:
            value = action()
        except UserError as raised:
            if self.world == 1:
                raise
            error = raised
        if self.all_reduce_max(int(error is not None)):
            errors = self.gather(error)
            if not self.main:
                raise SystemExit(1)
            rank, first = next((rank, error) for rank, error in enumerate(errors) if error is not None)
            if rank:
                first.problem += f" (in process {rank})"
            raise first
        return cast(T, value)

    def broadcast_buffers(self, model: nn.Module) -> None:
        """Copy the buffers of the first process, whose model is saved, to all: batch-norms differ after a step."""
        if self.world > 1:
            with _peers():
                for buffer in model.buffers():
                    dist.broadcast(buffer, 0)

    def gather_rows(self, rows: Tensor) -> Tensor:
        """The rows [N, F] of each process to those of all [world * N, F], in all processes; differentiable.

        The gradient of a process's rows is the sum of the gradients that all processes have for them.
        """
        return rows if self.world == 1 else _GatherRows.apply(rows, self)


@contextlib.contextmanager
def _peers() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        report_failed_communication(error)
        raise


def report_failed_communication(error: RuntimeError) -> None:
    """Raise UserError in the first process of the run that reports a failure of their communication, with the words of
    gloo, NCCL or torch; SystemExit in the others, which meet the same failure, or the end of that process.

    Returns if `error` is about something else.
    """
    text = str(error).partition(_CPP_STACK)[0]
    if not isinstance(error, dist.DistError) and "gloo" not in text:
        return
    if not _first_to_report():
        raise SystemExit(1) from error
    if any(words in text for words in PEER_LEFT):
        raise UserError(PEER_ENDED) from error
    hint = next((hint for words, hint in HINTS.items() if re.search(words, text)), "")
    problem = f"the processes of this run cannot communicate ({' '.join(text.split())})"
    raise BackendUnavailable(problem, hint=hint) from error


def _first_to_report() -> bool:
    """True, too, where the processes share no memory yet, or no more."""
    with contextlib.suppress(Exception):  # of any kind: what is reported counts
        return int(dist.distributed_c10d._get_default_store().add("pmm: reports of failures", 1)) == 1
    return True


SINGLE = Processes()


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, processes: Processes) -> Tensor:
        ctx.share = slice(processes.rank * len(rows), (processes.rank + 1) * len(rows))
        gathered = rows.new_empty(processes.world * len(rows), *rows.shape[1:])
        dist.all_gather_into_tensor(gathered, rows.contiguous())
        return gathered

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        gradient = gradient.contiguous().clone()
        dist.all_reduce(gradient)
        return gradient[ctx.share], None


def _own_gpu(local: int, gpus: int) -> torch.device:
    """Of the process of number `local` on a machine that shows it so many. Raises BackendUnavailable."""
    if local >= gpus > 1:
        problem = f"process {local} of this machine has no GPU, because the machine has {gpus}"
        raise BackendUnavailable(problem, hint=f"use --nproc-per-node {gpus}")
    return torch.device("cuda", local if gpus > 1 else 0)


def _check_own_gpus(processes: Processes, gpu: str) -> None:
    """Raises BackendUnavailable in the first process if two processes have the same GPU, by its UUID."""
    gpus = processes.gather(gpu)

    def check() -> None:
        for rank, other in enumerate(gpus):
            if (first := gpus.index(other)) < rank:
                problem = f"processes {first} and {rank} have the same GPU"
                hint = "start one process per GPU (--nproc-per-node), and show each at least its own"
                raise BackendUnavailable(problem, hint=hint)

    processes.run_on_all(check)


@contextlib.contextmanager
def init_distributed(device: torch.device) -> Iterator[tuple[Processes, torch.device]]:
    """This process among those of the run, and its device of `device`'s type; all but the first print nothing.

    A process that sees one GPU takes it: schedulers such as SLURM show each process its own. Raises UserError if a
    process has no GPU of its own, several are to share the one that `device` names, or they cannot communicate.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        if device.index is not None:
            torch.cuda.set_device(device)  # page-locked memory, and all else that names no GPU, then use this one
        yield SINGLE, device
        return
    if device.index is not None:
        raise InvalidValue(
            "--device",
            str(device),
            "cuda with several processes, which then get a GPU each",
            hint="choose the GPUs with CUDA_VISIBLE_DEVICES",
        )
    if missing := [name for name in TORCHRUN_VARIABLES if name not in os.environ]:
        raise UserError(f"WORLD_SIZE is set without {', '.join(missing)}", hint="start several processes with torchrun")
    if device.type == "cuda":
        device = _own_gpu(int(os.environ["LOCAL_RANK"]), torch.cuda.device_count())
        torch.cuda.set_device(device)
    with _peers():
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    processes = Processes(rank=dist.get_rank(), world=dist.get_world_size())
    if device.type == "cuda":
        _check_own_gpus(processes, str(torch.cuda.get_device_properties(device).uuid))
    with contextlib.ExitStack() as stack:
        if not processes.main:
            stack.enter_context(contextlib.redirect_stdout(stack.enter_context(open(os.devnull, "w"))))
        yield processes, device
    dist.destroy_process_group()  # not after an error: others may be gone, and ending together would wait for them
