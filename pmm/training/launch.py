"""Train: from a configuration to a run on disk, in one process or in those that torchrun started.

Loads torch only when it trains.
"""

from __future__ import annotations

import contextlib
import os
import signal
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from pmm.artifacts.run_folder import BEST, LAST
from pmm.config import Config
from pmm.data.bad_images import refuse_at_sight
from pmm.models.registry import check_network, method_of
from pmm.training.data_setup import resolve_config, training_data
from pmm.training.flags import TrainOptions
from pmm.training.own_cores import OwnCores
from pmm.utils import command_line
from pmm.utils.errors import BackendUnavailable, CannotWrite, InvalidFile
from pmm.utils.extras import check_installed
from pmm.utils.files import claimed, sweep
from pmm.utils.hardware import nvidia_gpus

if TYPE_CHECKING:
    from pmm.artifacts.init_file import InitFile
    from pmm.data.samples import ReidDataset


def is_first() -> bool:
    """Whether this is the first, or only, process of the run."""
    return os.environ.get("RANK", "0") == "0" or os.environ.get("WORLD_SIZE", "1") == "1"


def train(config: Config, out: Path, options: TrainOptions) -> Path:
    """Train as `config` says and write checkpoints, metrics and TensorBoard logs to `out`; returns out/best.pth.

    Processes that torchrun started train one model. Ctrl-C and SIGTERM save the run and raise TrainingInterrupted; a
    second Ctrl-C ends the process at once.

    Raises UserError for data, weights or an output folder that cannot be used, and with PMM_REQUIRE_EXT=1 if the mix
    has no compiled kernels for the device.
    """
    check_installed("torch", "tensorboard")
    if is_first():
        _check_folder(out, options.resume)
    own_cores = OwnCores(options)
    from pmm.runtime.eager import torch_device
    from pmm.runtime.torch_runner import set_threads
    from pmm.training.distributed import init_distributed
    from pmm.training.precision import with_resolved_amp
    from pmm.training.step import set_deterministic
    from pmm.training.trainer import Trainer

    if method_of(config).uses_kernels:
        _check_kernels(options.device)
    with init_distributed(torch_device(options.device)) as (processes, device):
        if options.device == "auto" and device.type == "cpu":
            processes.run_on_all(_check_no_gpu)
        asked_amp, config = config.recipe.amp, with_resolved_amp(config, device, processes)
        out = Path(processes.broadcast(str(out)))
        resolved = processes.run_on_all(lambda: config if options.resume else resolve_config(config))
        init = processes.run_on_all(lambda: None if options.resume else _init_file(config))
        processes.run_on_all(lambda: check_network(resolved))  # before data are drawn
        config, split = processes.run_on_all(lambda: training_data(resolved))
        if not options.bad_images.skip_bad_images:
            processes.run_on_all(lambda: _check_images(split, config) if processes.main else None)
        with contextlib.ExitStack() as stack:
            stack.callback(set_threads(options.threads))
            stack.callback(set_deterministic(device, config.recipe.deterministic))
            processes.run_on_all(lambda: stack.enter_context(claimed(out)) if processes.main else None)
            # again: drawing synthetic crops takes a while
            processes.run_on_all(lambda: _check_folder(out, options.resume) if processes.main else None)
            deferred = command_line.deferred_signals(signal.SIGINT, signal.SIGTERM, leave=partial(_leave, out))
            pending_signal = stack.enter_context(deferred)
            trainer = processes.run_on_all(
                lambda: Trainer(
                    config, split, out, device, processes, options, own_cores, asked_amp=asked_amp, init=init
                )
            )
            return trainer.run(pending_signal)


def _check_folder(out: Path, resume: bool) -> None:
    has_run = (out / LAST).exists()
    if has_run and not resume:
        raise CannotWrite("it holds a run", path=out, hint="continue it with --resume, or choose another --out")
    if (out / BEST).exists() and not has_run:
        hint = "move best.pth away, or choose another --out"
        raise CannotWrite("it holds best.pth of a run without last.pth", path=out, hint=hint)
    if resume and not has_run:
        raise InvalidFile("it holds no last.pth to resume from", path=out, hint="start without --resume")


def _check_images(split: ReidDataset, config: Config) -> None:
    """Raises InvalidFile for images that cannot be read, as far as a first look tells."""
    refuse_at_sight([sample.path for sample in (*split.train, *split.query, *split.gallery)], Path(config.data.root))


def _leave(out: Path) -> None:
    """End this process: an exception that falls into a lock or a queue of a library might never end it. A file that is
    being written is as before."""
    sweep(out, (LAST, BEST))
    if is_first():
        os.write(2, f"\n{out}: interrupted, without saving; go on with --resume\n".encode())
    os._exit(command_line.INTERRUPTED)


def _init_file(config: Config) -> InitFile | None:
    """What the run starts from, read before data are drawn: a file that does not fit then costs nothing."""
    from pmm.artifacts.init_file import read_init_file

    model, fitting = config.model, method_of(config).starts_from
    if not model.init:
        return None
    file = read_init_file(model.init, model.backbone)
    if file.config is not None and fitting and (found := file.config.model.method) not in fitting:
        expected = f"one of {' or '.join(fitting)}, from which --method {model.method} starts, or a backbone's weights"
        raise InvalidFile(f"a checkpoint of --method {found}", path=Path(model.init), expected=expected)
    return file


def _check_kernels(device: str) -> None:
    """At once: the ops themselves would raise their error in the first step."""
    if os.environ.get("PMM_REQUIRE_EXT") != "1":
        return
    from pmm.ops._extension import kernels
    from pmm.runtime.eager import torch_device

    try:
        kernels(torch_device(device))
    except RuntimeError as error:
        raise BackendUnavailable(str(error)) from error


def _check_no_gpu() -> None:
    """Raises BackendUnavailable if there is a GPU that torch cannot use: the defaults are those for a GPU, and on a CPU
    they would take weeks."""
    from pmm.utils.cuda_versions import advice

    if gpus := nvidia_gpus():
        problem = f"torch cannot use this machine's GPU ({gpus[0].name})"
        hint = f"{advice('torch') or 'see pmm info for versions and driver'}; or use --device cpu"
        raise BackendUnavailable(problem, hint=hint)
