"""The processes that train one model together, as `torchrun` starts them; alone, a process is the first of one."""

from __future__ import annotations

import contextlib
import os
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
LOST_PEER = ("onnection closed", "onnection reset", "onnection refused", "roken pipe", "gloo", "NCCL")
"""Words of what torch raises when another process has left."""


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
        if any(word in str(error) for word in LOST_PEER):
            raise UserError(PEER_ENDED) from error
        raise


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


@contextlib.contextmanager
def init_distributed(device: torch.device) -> Iterator[tuple[Processes, torch.device]]:
    """This process among those of the run, and its device of `device`'s type; all but the first print nothing.

    Raises UserError if a process has no GPU of its own, or several are to share the one that `device` names.
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
        local, gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if local >= gpus:
            problem = f"process {local} of this machine has no GPU, because the machine has {gpus}"
            raise BackendUnavailable(problem, hint=f"use --nproc-per-node {gpus}")
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    processes = Processes(rank=dist.get_rank(), world=dist.get_world_size())
    with contextlib.ExitStack() as stack:
        if not processes.main:
            stack.enter_context(contextlib.redirect_stdout(stack.enter_context(open(os.devnull, "w"))))
        yield processes, device
    dist.destroy_process_group()  # not after an error: others may be gone, and ending together would wait for them
