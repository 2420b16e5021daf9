"""Train: from a configuration to a run on disk, in one process or in those that torchrun has started.

Loads torch only when it trains.
"""

from __future__ import annotations

import contextlib
import os
import signal
from pathlib import Path

from pmm.config import Config
from pmm.models.registry import method_of
from pmm.training.data_setup import resolve_config, training_data
from pmm.training.flags import TrainOptions
from pmm.utils import command_line
from pmm.utils.errors import UserError
from pmm.utils.files import claimed


def is_first() -> bool:
    """Not one of the other processes that torchrun has started."""
    return os.environ.get("RANK", "0") == "0" or os.environ.get("WORLD_SIZE", "1") == "1"


def train(config: Config, out: Path, options: TrainOptions) -> Path:
    """Train as `config` says and write checkpoints, metrics and TensorBoard logs to `out`; returns out/best.pth.

    The processes that torchrun started train together. Ctrl-C and SIGTERM save the run and raise TrainingInterrupted.
    Raises UserError for data, weights or an output folder that cannot be used, and under PMM_REQUIRE_EXT=1 where the
    mix has no compiled kernels for the device.
    """
    if is_first():
        _check_folder(out, options.resume)
    from pmm.runtime.eager import torch_device
    from pmm.runtime.torch_runner import set_threads
    from pmm.training.distributed import init_distributed
    from pmm.training.trainer import Trainer

    if method_of(config).mixes_cells:
        _check_kernels(options.device)
    with init_distributed(torch_device(options.device)) as (processes, device):
        if options.device == "auto" and device.type == "cpu" and processes.main:
            _warn_of_unused_gpu()
        out = Path(processes.told(str(out)))
        given = processes.together(lambda: config if options.resume else resolve_config(config))
        config, split = processes.together(lambda: training_data(given))
        with contextlib.ExitStack() as stack:
            stack.callback(set_threads(options.threads))
            processes.together(lambda: stack.enter_context(claimed(out)) if processes.main else None)
            # again: drawing people takes a while
            processes.together(lambda: _check_folder(out, options.resume) if processes.main else None)
            signalled = stack.enter_context(command_line.held_signals(signal.SIGINT, signal.SIGTERM))
            trainer = processes.together(lambda: Trainer(config, split, out, device, processes, options))
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


def _warn_of_unused_gpu() -> None:
    from pmm.training.progress import warn
    from pmm.utils.cuda_versions import advice
    from pmm.utils.hardware import nvidia_gpus

    if nvidia_gpus():
        why = advice("torch") or "; see pmm info"
        warn(f"torch cannot use the NVIDIA GPU that is here, so this trains on the CPU{why}")
