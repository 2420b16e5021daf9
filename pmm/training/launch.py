"""Train: from a configuration to a run on disk, in one process or in those that torchrun has started.

Loads torch only when it trains.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from pmm.config import Config
from pmm.data.samples import Split
from pmm.models.registry import method_of
from pmm.training.data_setup import settled, training_data
from pmm.training.flags import SAVE_MINUTES
from pmm.utils import command_line
from pmm.utils.errors import UserError
from pmm.utils.files import claimed

if TYPE_CHECKING:
    import torch

    from pmm.training.distributed import Processes


def is_first() -> bool:
    """Not one of the other processes that torchrun has started."""
    return os.environ.get("RANK", "0") == "0" or os.environ.get("WORLD_SIZE", "1") == "1"


def train(
    config: Config,
    *,
    out: Path,
    device: str = "auto",
    resume: bool = False,
    save_minutes: float = SAVE_MINUTES,
    skip_bad_images: bool = False,
    threads: int = 0,
) -> Path:
    """Train as `config` says and write checkpoints, metrics and TensorBoard logs to `out`; returns out/best.pth.

    The processes that torchrun started train together. Ctrl-C and SIGTERM save the run and raise Stopped. Raises
    UserError for data, weights or an output folder that cannot be used, and under PMM_REQUIRE_EXT=1 where the mix has
    no compiled kernels for the device.
    """
    if is_first():
        _check_folder(out, resume)
    from pmm.runtime.eager import torch_device
    from pmm.runtime.torch_runner import set_threads
    from pmm.training.distributed import joined
    from pmm.training.progress import warn
    from pmm.utils.cuda_versions import advice
    from pmm.utils.hardware import nvidia_gpus

    if method_of(config).mixes_cells:
        _check_kernels(device)
    with joined(torch_device(device)) as (processes, own):
        if device == "auto" and own.type == "cpu" and processes.main and nvidia_gpus():
            why = advice("torch") or "; see pmm info"
            warn(f"torch cannot use the NVIDIA GPU that is here, so this trains on the CPU{why}")
        out = Path(processes.told(str(out)))
        given = processes.together(lambda: config if resume else settled(config))
        config, split = processes.together(lambda: training_data(given))
        with contextlib.ExitStack() as stack:
            stack.callback(set_threads(threads))
            processes.together(lambda: stack.enter_context(claimed(out)) if processes.main else None)
            # again: drawing people takes a while
            processes.together(lambda: _check_folder(out, resume) if processes.main else None)
            signalled = stack.enter_context(command_line.held_signals(signal.SIGINT, signal.SIGTERM))
            return _run(config, split, out, own, processes, resume, signalled, save_minutes, skip_bad_images)


def _run(
    config: Config,
    split: Split,
    out: Path,
    device: torch.device,
    processes: Processes,
    resume: bool,
    signalled: Callable[[], int],
    save_minutes: float,
    skip_bad_images: bool,
) -> Path:
    from pmm.training.trainer import Trainer

    trainer = processes.together(
        lambda: Trainer(
            config, split, out, device, processes, save_minutes=save_minutes, skip_bad_images=skip_bad_images
        )
    )
    trainer.resume() if resume else trainer.start()
    if trainer.finished >= config.recipe.epochs:
        print(f"{out}: the run is finished ({trainer.finished} epochs); nothing to do")
        return out / "best.pth"
    trainer.say_start()
    return trainer.run(signalled)


def _check_folder(out: Path, resume: bool) -> None:
    has_run = (out / "last.pth").exists()
    if has_run and not resume:
        raise UserError(f"{out} holds a run; add --resume to go on with it, or choose another --out")
    if (out / "best.pth").exists() and not has_run:
        raise UserError(f"{out} holds best.pth of a run whose last.pth is gone; move it away, or choose another --out")
    if resume and not has_run:
        raise UserError(f"{out} holds no last.pth to resume from; start without --resume")


def _check_kernels(device: str) -> None:
    """Before hours of work: the ops themselves would refuse PMM_REQUIRE_EXT=1 in the middle of it."""
    if os.environ.get("PMM_REQUIRE_EXT") != "1":
        return
    from pmm.ops._extension import kernels
    from pmm.runtime.eager import torch_device

    try:
        kernels(torch_device(device))
    except RuntimeError as error:
        raise UserError(str(error)) from error
