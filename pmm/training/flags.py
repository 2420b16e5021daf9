"""The flags of a training run: where it lies, and its whole configuration. Loads no torch."""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from pmm.artifacts.checkpoint import load
from pmm.artifacts.dataset_location import resolve_data_root, with_resolved_data_root
from pmm.artifacts.origin import RUNS, newest_run
from pmm.artifacts.run_folder import CONFIG_FILE, LAST
from pmm.config import SYNTHETIC, Config, fast_mode
from pmm.data.bad_images import BadImageOptions
from pmm.data.dataset_specs import dataset_spec
from pmm.models.registry import check_method_flags, phases_of
from pmm.presets import PRESETS, preset
from pmm.training.data_setup import check_synthetic, check_unchanged
from pmm.utils import command_line
from pmm.utils.arguments import Arg
from pmm.utils.errors import ConflictingOptions, InvalidFile, InvalidValue, UserError, reason_of
from pmm.utils.files import existing_file
from pmm.utils.hardware import check_threads, cuda_index

PROG = "pmm train"
SYNTHETIC_EPOCHS = 60
FAST_EPOCHS = 3  # after fewer, int8 moves the embeddings of a hardly trained network beyond the gates
SAVE_MINUTES = 10.0
CONFIG = "the configuration of a run, config.json in its folder"


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """What training needs besides a `Config` and a folder: whether it goes on, and on what it runs."""

    bad_images: Annotated[BadImageOptions, Arg(group="data")] = field(default_factory=BadImageOptions)
    resume: bool = False
    """Continue the run in --out from its last.pth (without --out: the newest run under runs/)."""
    extend: bool = False
    """With --resume and --epochs N: train on to N epochs, more than the run had, whether it is finished or not. From
    here on the learning rate is that of a run of N epochs; a backbone that was frozen in all epochs stays so."""
    device: Annotated[str, Arg(group="running")] = "auto"
    """Where to train: auto, cpu, cuda, or cuda:N for the GPU of that number (torchrun gives each process its own)."""
    save_minutes: Annotated[float, Arg(group="running")] = SAVE_MINUTES
    """Minutes between two saves of last.pth, from which --resume goes on; the run also saves it when it is stopped by
    Ctrl-C, and at its end. best.pth is saved whenever the model is the best so far; without held-out identities, when
    the run is stopped or ends."""
    threads: Annotated[int, Arg(group="running")] = 0
    """CPU threads of each process (default: torch's choice, at most the quota of CPU time)."""

    def __post_init__(self) -> None:
        check_threads(self.threads)
        cuda_index(self.device)
        if self.extend and not self.resume:
            raise ConflictingOptions("{extend} needs {resume}", "extend", "resume")
        if not self.save_minutes > 0:
            raise InvalidValue("save_minutes", self.save_minutes, "more than 0")


@dataclass(frozen=True, kw_only=True)
class RunFiles:
    """Where the run lies, and a file that its defaults come from."""

    out: Annotated[Path | None, Arg("DIR", short="-o")] = None
    """Folder of the run (default: a new one under runs/)."""
    config_file: Annotated[Path | None, Arg("FILE", flag="--config")] = None
    """Take the defaults of all other flags but --amp from this config.json of a run, instead of from a preset.
    --no-compile switches off what it has on, and so do --no-deterministic, --no-gather and --no-sync-bn."""


@dataclass(frozen=True, kw_only=True)
class TrainCommand:
    """`pmm train`"""

    config: Annotated[Config, Arg(group="options")] = field(default_factory=Config)
    files: Annotated[RunFiles, Arg(group="options")] = field(default_factory=RunFiles)
    options: Annotated[TrainOptions, Arg(group="options")] = field(default_factory=TrainOptions)


@dataclass(frozen=True, kw_only=True)
class _Choices:
    """What must be known before the defaults of the other flags are."""

    files: RunFiles = field(default_factory=RunFiles)
    options: TrainOptions = field(default_factory=TrainOptions)
    preset: str = ""
    method: str = ""
    dataset: str = ""
    backbone: str = ""
    epochs: int = 0
    help: Annotated[bool, Arg(short="-h")] = False

    def __post_init__(self) -> None:
        for name, given in (("preset", self.preset), ("resume", self.options.resume)):
            if self.files.config_file and given:
                problem = f"{{config_file}} and {{{name}}} both set the defaults"
                raise ConflictingOptions(problem, "config_file", name, hint="leave one of them out")
        if self.preset:
            preset(self.preset)


def parse(args: Sequence[str], *, prog: str = PROG, description: str = "") -> TrainCommand:
    """The command line as a `TrainCommand`; defaults come from the preset, a file, or the run to resume.

    Raises UserError for an unknown preset or method, a flag that the method does not read, a file that is no
    configuration, or a resumed run that is not there or has other values.
    """
    first = command_line.parse_args(_Choices, args, prog=prog, description="", partial=True)
    if not first.help:
        command_line.check_args(TrainCommand, args, prog=prog)  # before a run is looked for
    files, flags = first.files, command_line.flags_in(args)
    if first.options.resume and not first.help:
        hint = "start without --resume, or name the folder of the run with --out"
        out = files.out or newest_run(LAST, hint=hint).parent
        files, saved = RunFiles(out=out), saved_config(out)
        config = _extended(with_resolved_data_root(saved, out / LAST), first)
    elif files.config_file and not first.help:
        config = _with_most_epochs(_defaults_in(files.config_file, first, flags), FAST_EPOCHS if fast_mode() else None)
    else:
        config = preset(first.preset or _default_preset(first.options.device), first.method)
        shorter = SYNTHETIC_EPOCHS if first.dataset in ("", SYNTHETIC) else None
        config = _with_most_epochs(config, FAST_EPOCHS if fast_mode() else shorter)
    default = TrainCommand(config=config, files=files)
    command = command_line.parse_args(TrainCommand, args, prog=prog, description=description, default=default)
    check_method_flags(command.config, flags)
    _refuse_unread(command.config, flags)
    if command.options.resume:
        check_unchanged(out, saved, command.config, extend=command.options.extend)
    elif command.config.model.init and not Path(command.config.model.init).exists():
        hint = "give another with --init FILE"
        raise InvalidFile("there is no such file to start from", path=command.config.model.init, hint=hint)
    check_synthetic(command.config.data, {flag.removeprefix("--").replace("-", "_") for flag in flags})
    return command


def saved_config(out: Path) -> Config:
    """The configuration of the run in `out`, from last.pth if config.json is gone. Raises InvalidFile if there is
    no run."""
    path, last = out / CONFIG_FILE, out / LAST
    if path.exists():
        return _read_config(path)
    saved = load(last) if last.exists() else {"optimizer": None}
    if saved["optimizer"] is None:  # or an imported checkpoint of that name
        problem = f"it holds no run to resume (neither {path.name} nor the {last.name} of one)"
        raise InvalidFile(problem, path=out, hint="start without --resume, or name another folder with --out")
    return _config_of(saved["config"], last)


def _read_config(path: Path) -> Config:
    """Raises InvalidFile."""
    try:
        content = json.loads(existing_file(path, CONFIG).read_text("utf-8"))
    except json.JSONDecodeError as error:
        problem = f"truncated, or not JSON (line {error.lineno}: {error.msg})"
        raise InvalidFile(problem, path=path, expected=CONFIG) from error
    except (OSError, ValueError) as error:
        raise InvalidFile(f"it cannot be read ({reason_of(error)})", path=path, expected=CONFIG) from error
    return _config_of(content, path)


def _config_of(content: Any, path: Path) -> Config:
    try:
        return Config.from_dict(content)
    except UserError as error:
        raise InvalidFile(f"it cannot be used ({error})", path=path, expected=CONFIG) from error


def epochs_note(command: TrainCommand, flags: set[str]) -> str:
    """Says that a new run on synthetic people has fewer epochs than its preset, unless `flags` say how many; else
    empty."""
    config = command.config
    has, whole = config.recipe.epochs, preset(config.preset, config.model.method).recipe.epochs
    chosen = "--epochs" in flags or command.files.config_file or command.options.resume or fast_mode()
    if chosen or has >= whole:
        return ""
    return f"{has} epochs on synthetic people (preset {config.preset} has {whole}); --epochs {whole} trains them all"


def new_run(command: TrainCommand) -> Path:
    """A folder of its own under runs/, named after the preset, the data and the time."""
    data = command.config.data.dataset.replace(":", "-").replace("/", "-")  # as folder:camera/identity
    return RUNS / f"{command.config.preset}-{data}-{time.strftime('%Y%m%d-%H%M%S')}"


def resume_command(command: TrainCommand, out: Path) -> str:
    """What `command` was, to go on with (add --resume): without the configuration, which is with the run."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    here = int(os.environ.get("LOCAL_WORLD_SIZE", world))
    start = "python" if world == 1 else f"torchrun --nproc-per-node {here}"
    if world > here:
        start = f"(on each machine, as before) torchrun --nnodes {-(-world // here)} ... --nproc-per-node {here}"
    flags, options = ["--out", str(out)], command.options
    if options.device != "auto":
        flags += ["--device", options.device]
    if options.save_minutes != SAVE_MINUTES:
        flags += ["--save-minutes", f"{options.save_minutes:g}"]
    if options.bad_images.skip_bad_images:
        flags += ["--skip-bad-images"]
    if options.threads:
        flags += ["--threads", str(options.threads)]
    return f"{start} -m pmm.train {shlex.join(flags)}"


def _defaults_in(path: Path, first: _Choices, flags: set[str]) -> Config:
    """The configuration in `path` as defaults of a new run, as far as `flags` leave it what it was.

    The precision is "auto": the file holds what that meant on the machine of its run.
    """
    config = _read_config(path)
    if config.preset not in PRESETS:
        problem = f"it cannot be used ({InvalidValue('config.preset', config.preset, choices=PRESETS)})"
        raise InvalidFile(problem, path=path, expected=CONFIG)
    data, model = config.data, dataclasses.replace(config.model, num_classes=0)  # which the data say
    root = resolve_data_root(data.root, path)
    if data.dataset == SYNTHETIC and not Path(root).exists():
        root = ""  # drawn again, where this machine has them
    other_data = bool(first.dataset) and dataset_spec(first.dataset) != dataset_spec(data.dataset)
    if other_data:
        root = ""
    if other_data or "--init" in flags or first.backbone not in ("", model.backbone):
        model = dataclasses.replace(model, weights="auto")  # what that meant for other data, or another backbone
    if "--weights" in flags:
        model = dataclasses.replace(model, init="")
    recipe = dataclasses.replace(config.recipe, amp="auto")
    return dataclasses.replace(config, data=dataclasses.replace(data, root=root), model=model, recipe=recipe)


def _with_most_epochs(config: Config, most: int | None) -> Config:
    recipe = config.recipe
    if most is None or recipe.epochs <= most:
        return config
    frozen = most if recipe.freeze_backbone == recipe.epochs else min(recipe.freeze_backbone, most - 1)
    return dataclasses.replace(config, recipe=dataclasses.replace(recipe, epochs=most, freeze_backbone=frozen))


def _extended(config: Config, first: _Choices) -> Config:
    """The configuration of a run as defaults of its continuation: a backbone that was frozen in all epochs stays so.

    Raises InvalidValue for fewer epochs than it has, ConflictingOptions for more where it has phases.
    """
    recipe = config.recipe
    if first.options.extend and len(phases_of(config)) > 1:
        problem = f"a run of --method {config.model.method} cannot be extended: its phases are shares of its epochs"
        raise ConflictingOptions(problem, "--extend", "--method", hint="start another run, with more --epochs")
    if 0 < first.epochs < recipe.epochs:
        hint = "leave it out to go on as before"
        raise InvalidValue("--epochs", first.epochs, f"at least the {recipe.epochs} epochs of the run", hint=hint)
    if first.options.extend and first.epochs and recipe.freeze_backbone == recipe.epochs:
        recipe = dataclasses.replace(recipe, epochs=first.epochs, freeze_backbone=first.epochs)
    return dataclasses.replace(config, recipe=recipe)


def _default_preset(device: str) -> str:
    from pmm.utils.hardware import nvidia_gpus

    return "paper" if device != "cpu" and nvidia_gpus() else "tiny"


def _refuse_unread(config: Config, flags: set[str]) -> None:
    """Raises ConflictingOptions for a flag that another value of the recipe leaves unread."""
    for flag, (key, readers) in _READ_BY.items():
        value = getattr(config.recipe, key)
        if flag in flags and value not in readers:
            problem = f"{flag} would change nothing with --{key} {value}"
            hint = f"leave it out, or add --{key} {' or '.join(readers)}"
            raise ConflictingOptions(problem, flag, f"--{key}", hint=hint)


_READ_BY = {
    "--warmup": ("schedule", ("flat-cosine", "milestones")),
    "--flat": ("schedule", ("flat-cosine",)),
    "--milestones": ("schedule", ("milestones",)),
    "--images-per-id": ("sampler", ("pk",)),
}
"""Flag -> the key of the recipe on which it depends whether the flag is read, and the values with which it is."""
