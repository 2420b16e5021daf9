"""Train a re-identification model on people on disk.

python -m pmm.train [--preset NAME] [--method NAME] [--dataset market1501 --root DIR] [--out DIR] [--resume] ...

Without arguments: preset paper where an NVIDIA GPU is at hand, else tiny, on synthetic people (drawn if not there).
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shlex
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from pmm.artifacts.runs import RUNS, newest_run, refuse_changes, with_located_data
from pmm.config import SYNTHETIC, Config, fast_mode, preset
from pmm.data.samples import Split
from pmm.models.registry import method_of, refuse_unread
from pmm.training.data_setup import refuse_other_people, settled, training_data
from pmm.utils import command_line
from pmm.utils.errors import Stopped, UserError
from pmm.utils.files import claimed
from pmm.utils.hardware import cuda_index

if TYPE_CHECKING:
    import torch

    from pmm.training.distributed import Processes

PROG = "pmm train"
SYNTHETIC_EPOCHS = 60
FAST_EPOCHS = 3  # after fewer, int8 moves the embeddings of a hardly trained network beyond the gates
SAVE_MINUTES = 10.0
FIRST = os.environ.get("RANK", "0") == "0" or os.environ.get("WORLD_SIZE", "1") == "1"
"""Not one of the other processes that torchrun has started."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where and from what a run starts; the rest of its command line is its `Config`."""

    out: Path | None = None
    """Folder of the run (default: a new one under runs/)."""
    resume: bool = False
    """Go on from OUT/last.pth (without --out: the newest run under runs/)."""
    device: str = "auto"
    """Where to train: auto, cpu, cuda, or cuda:N for the GPU of that number (with torchrun: each process its own)."""
    save_minutes: float = SAVE_MINUTES
    """Minutes after which last.pth is written within an epoch too; it is at the end of each."""
    skip_bad_images: bool = False
    """Leave out images that cannot be read, and count them, instead of stopping at the first."""
    threads: int = 0
    """CPU threads of each process (0: torch's default, a quota of CPU time at most)."""

    def __post_init__(self) -> None:
        command_line.threads(self.threads)
        if not self.save_minutes > 0:
            raise UserError(f"--save-minutes is {self.save_minutes}; it must be more than 0")


@dataclass(frozen=True, kw_only=True)
class Command(Place):
    """The whole command line."""

    config: Config = field(default_factory=Config)


@dataclass(frozen=True, kw_only=True)
class _Choices(Place):
    """What must be known before the defaults of the other flags are."""

    preset: str = ""
    dataset: str = SYNTHETIC
    help: Annotated[bool, tyro.conf.arg(aliases=["-h"])] = False


def main() -> int:
    """Parse, then train."""
    try:
        command = parse(sys.argv[1:])
    except UserError:
        if not FIRST and os.environ.get("LOCAL_RANK", "0") != "0":  # the first one on this machine says the same
            return 1
        raise
    out = command.out or new_run(command)
    go_on = f"go on with: {_again(command, out)} --resume"
    try:
        train(
            command.config,
            out=out,
            device=command.device,
            resume=command.resume,
            save_minutes=command.save_minutes,
            skip_bad_images=command.skip_bad_images,
            threads=command.threads,
        )
    except Stopped as stop:
        name = "Ctrl-C" if stop.number == signal.SIGINT else signal.Signals(stop.number).name
        if FIRST:
            print(f"\n{PROG}: stopped by {name}; {stop.where}: saved; {go_on}", file=sys.stderr)
        return 128 + stop.number
    except KeyboardInterrupt:
        if not (out / "last.pth").exists():
            go_on = "nothing was trained yet"
        print(f"\n{PROG}: interrupted; {go_on}", file=sys.stderr)
        return command_line.INTERRUPTED
    return 0


def _again(command: Command, out: Path) -> str:
    """The command line that this one was, as far as going on needs it: the configuration is with the run."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    here = int(os.environ.get("LOCAL_WORLD_SIZE", world))
    start = "python" if world == 1 else f"torchrun --nproc-per-node {here}"
    if world > here:
        start = f"(on each machine, as before) torchrun --nnodes {-(-world // here)} ... --nproc-per-node {here}"
    flags = ["--out", str(out)]
    if command.device != "auto":
        flags += ["--device", command.device]
    if command.save_minutes != SAVE_MINUTES:
        flags += ["--save-minutes", f"{command.save_minutes:g}"]
    if command.skip_bad_images:
        flags += ["--skip-bad-images"]
    if command.threads:
        flags += ["--threads", str(command.threads)]
    return f"{start} -m pmm.train {shlex.join(flags)}"


def parse(args: list[str]) -> Command:
    """The command line as a `Command`; defaults come from the preset, or from the run to resume.

    Raises UserError for an unknown preset or method, a flag that the method does not read, or a resumed run that is not
    there or has other values.
    """
    first = command_line.parse_args(_Choices, args, prog=PROG, description="", partial=True)
    out = first.out
    if first.resume and not first.help:
        out = out or newest_run("last.pth").parent
        saved = saved_config(out)
        config = with_located_data(saved, out / "last.pth")
    else:
        config = preset(first.preset or _default_preset(first.device))
        most = FAST_EPOCHS if fast_mode() else SYNTHETIC_EPOCHS if first.dataset == SYNTHETIC else config.recipe.epochs
        recipe = dataclasses.replace(config.recipe, epochs=min(most, config.recipe.epochs))
        config = dataclasses.replace(config, recipe=recipe)
    default = Command(out=out, config=config)
    command = command_line.parse_args(Command, args, prog=PROG, description=__doc__ or "", default=default)
    cuda_index(command.device)
    given = command_line.given_flags(args)
    refuse_unread(command.config, given)
    _refuse_unscheduled(command.config, given)
    if command.resume:
        refuse_changes(out or RUNS, saved, command.config)
    refuse_other_people(command.config.data, {flag.removeprefix("--").replace("-", "_") for flag in given})
    return command


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
    if FIRST:
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


def saved_config(out: Path) -> Config:
    """The configuration of the run in `out`. Raises UserError if there is none."""
    path = out / "config.json"
    try:
        return Config.from_dict(json.loads(path.read_text()))
    except FileNotFoundError:
        raise UserError(f"{out} holds no run to resume ({path.name} is missing); start without --resume") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not readable ({error})") from error


def new_run(command: Command) -> Path:
    """A folder of its own under runs/, named after the preset, the data and the time."""
    return RUNS / f"{command.config.preset}-{command.config.data.dataset}-{time.strftime('%Y%m%d-%H%M%S')}"


def _default_preset(device: str) -> str:
    from pmm.utils.hardware import nvidia_gpus

    return "paper" if device != "cpu" and nvidia_gpus() else "tiny"


def _refuse_unscheduled(config: Config, flags: set[str]) -> None:
    if config.recipe.schedule == "paper" and (idle := sorted({"--warmup", "--flat"} & flags)):
        raise UserError(
            f"{' and '.join(idle)} would change nothing: the steps of --schedule paper are fixed; leave it out, or add "
            "--schedule flat-cosine"
        )


if __name__ == "__main__":
    command_line.run(main, prog=PROG)
