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

from pmm.utils.errors import UserError

T = TypeVar("T")

STARTED_BY = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
"""What torchrun says to each process through its environment."""


PEER_ENDED = "another process of this run has ended; its own message says why"
LOST_PEER = ("onnection closed", "onnection reset", "onnection refused", "roken pipe", "gloo", "NCCL")
"""Words of what torch raises when another process has left."""


@dataclass(frozen=True, kw_only=True)
class Processes:
    """This process among those of the run. All of them have to make the same calls in the same order."""

    rank: int = 0
    world: int = 1

    @property
    def main(self) -> bool:
        """This one writes the files and speaks to the user."""
        return self.rank == 0

    def agree(self, word: int) -> int:
        """The largest of the words that the processes bring."""
        if self.world == 1:
            return word
        words = torch.tensor([word])
        with _peers():
            dist.all_reduce(words, dist.ReduceOp.MAX)
        return int(words)

    def gathered(self, value: Any) -> list[Any]:
        """The plain values of all processes by rank, in the first process; an empty list in the others."""
        if self.world == 1:
            return [value]
        values: list[Any] = [None] * self.world if self.main else []
        with _peers():
            dist.gather_object(value, values if self.main else None)
        return values

    def told(self, value: Any) -> Any:
        """The first process's plain value, in all."""
        if self.world == 1:
            return value
        values = [value]
        with _peers():
            dist.broadcast_object_list(values)
        return values[0]

    def together(self, action: Callable[[], T]) -> T:
        """What `action` returns here, if it went well in all processes.

        If not, the first process raises the first UserError, and the others exit without a word.
        """
        value, error = None, None
        try:
            value = action()
        except UserError as raised:
            if self.world == 1:
                raise
            error = str(raised)
        if self.agree(int(error is not None)):
            errors = self.gathered(error)
            if not self.main:
                raise SystemExit(1)
            rank, first = next((rank, text) for rank, text in enumerate(errors) if text is not None)
            raise UserError(f"process {rank}: {first}" if rank else first)
        return cast(T, value)

    def align(self, model: nn.Module) -> None:
        """Give all processes the buffers of the first: batch-norm's differ after a step, and its own are saved."""
        if self.world > 1:
            with _peers():
                for buffer in model.buffers():
                    dist.broadcast(buffer, 0)

    def rows(self, mine: Tensor) -> Tensor:
        """The rows [N, F] of all processes one below the other [world * N, F]; differentiable.

        The gradient of each process's rows is the sum of what all processes found for them.
        """
        return mine if self.world == 1 else _Rows.apply(mine, self)


@contextlib.contextmanager
def _peers() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        if any(word in str(error) for word in LOST_PEER):
            raise UserError(PEER_ENDED) from error
        raise


SINGLE = Processes()


class _Rows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, mine: Tensor, processes: Processes) -> Tensor:
        ctx.mine = slice(processes.rank * len(mine), (processes.rank + 1) * len(mine))
        rows = mine.new_empty(processes.world * len(mine), *mine.shape[1:])
        dist.all_gather_into_tensor(rows, mine.contiguous())
        return rows

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        gradient = gradient.contiguous().clone()
        dist.all_reduce(gradient)
        return gradient[ctx.mine], None


@contextlib.contextmanager
def init_distributed(device: torch.device) -> Iterator[tuple[Processes, torch.device]]:
    """This process among those of the run, and its own device of `device`'s type; all but the first print nothing.

    Raises UserError if a process has no GPU of its own, or several are to share the one that `device` names.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        if device.index is not None:
            torch.cuda.set_device(device)  # page-locked memory, and what else asks for no GPU by name, is of this one
        yield SINGLE, device
        return
    if device.index is not None:
        raise UserError(
            f"--device {device} names one GPU for several processes; use --device cuda, which gives each its own, and "
            "CUDA_VISIBLE_DEVICES to say which"
        )
    if absent := [name for name in STARTED_BY if name not in os.environ]:
        raise UserError(f"WORLD_SIZE is set without {', '.join(absent)}; start several processes with torchrun")
    own = device
    if own.type == "cuda":
        local, gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if local >= gpus:
            raise UserError(f"process {local} here has no GPU, there are {gpus}; use --nproc-per-node {gpus}")
        own = torch.device("cuda", local)
        torch.cuda.set_device(own)
    dist.init_process_group("cpu:gloo,cuda:nccl" if own.type == "cuda" else "gloo")
    processes = Processes(rank=dist.get_rank(), world=dist.get_world_size())
    with contextlib.ExitStack() as stack:
        if not processes.main:
            stack.enter_context(contextlib.redirect_stdout(stack.enter_context(open(os.devnull, "w"))))
        yield processes, own
    dist.destroy_process_group()  # not after an error: others may be gone, and ending together would wait for them
