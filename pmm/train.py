"""Train a re-identification model on people on disk.

python -m pmm.train [--preset NAME] [--method NAME] [--dataset market1501 --root DIR] [--out DIR] [--resume] ...

Without arguments: preset paper where an NVIDIA GPU is at hand, else tiny, on synthetic people (drawn if not there).
"""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from pmm import cli
from pmm.config import SYNTHETIC, Config, fast_mode, preset
from pmm.data.samples import Split
from pmm.errors import UserError
from pmm.files import cannot_write, claimed, write_file
from pmm.kernels import describe_build
from pmm.machine import usable_cores
from pmm.models.registry import method_of, refuse_unread
from pmm.prepare import settled, training_data
from pmm.runs import RUNS, newest_run

if TYPE_CHECKING:
    import torch

PROG = "pmm.train"
SYNTHETIC_EPOCHS = 60


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where and from what a run starts; the rest of its command line is its `Config`."""

    out: Path | None = None
    """Folder of the run (default: a new one under runs/)."""
    resume: bool = False
    """Go on from OUT/last.pth (without --out: the newest run under runs/)."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to train."""


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
    command = parse(sys.argv[1:])
    out = command.out or new_run(command)
    try:
        train(command.config, out=out, device=command.device, resume=command.resume)
    except KeyboardInterrupt:
        saved = (out / "last.pth").exists()
        go_on = (
            f"go on with: python -m pmm.train --out {shlex.quote(str(out))} --resume"
            if saved
            else "no epoch was finished yet"
        )
        print(f"\n{PROG}: interrupted; {go_on}", file=sys.stderr)
        return cli.INTERRUPTED
    return 0


def parse(args: list[str]) -> Command:
    """The command line as a `Command`; defaults come from the preset, or from the run to resume.

    Raises UserError for an unknown preset or method, a flag that the method does not read, or a resumed run that is not
    there or has other values.
    """
    first = cli.parse_args(_Choices, args, prog=PROG, description="", partial=True)
    out = first.out
    if first.resume and not first.help:
        out = out or newest_run("last.pth").parent
        config = saved_config(out)
    else:
        config = preset(first.preset or _default_preset())
        most = 1 if fast_mode() else SYNTHETIC_EPOCHS if first.dataset == SYNTHETIC else config.recipe.epochs
        recipe = dataclasses.replace(config.recipe, epochs=min(most, config.recipe.epochs))
        config = dataclasses.replace(config, recipe=recipe)
    default = Command(out=out, config=config)
    command = cli.parse_args(Command, args, prog=PROG, description=__doc__ or "", default=default)
    refuse_unread(command.config, cli.given_flags(args))
    if command.resume:
        _refuse_changes(out or RUNS, config, command.config)
    return command


def train(config: Config, *, out: Path, device: str = "auto", resume: bool = False) -> Path:
    """Train as `config` says and write checkpoints, metrics and TensorBoard logs to `out`; returns out/best.pth.

    Raises UserError for data, weights or an output folder that cannot be used, and under PMM_REQUIRE_EXT=1 where the
    mix has no compiled kernels for the device.
    """
    _check_folder(out, resume)
    if method_of(config).mixes_cells:
        _check_kernels(device)
    if not resume:
        config = settled(config)
    config, split = training_data(config)
    with claimed(out):
        _check_folder(out, resume)  # again: drawing people takes a while
        return _train(config, split, out, device, resume)


def _check_folder(out: Path, resume: bool) -> None:
    has_run = (out / "last.pth").exists()
    if has_run and not resume:
        raise UserError(f"{out} holds a run; add --resume to go on with it, or choose another --out")
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


def _train(config: Config, split: Split, out: Path, device_name: str, resume: bool) -> Path:
    import torch
    from torch.utils.tensorboard import SummaryWriter

    from pmm import checkpoint
    from pmm.data.crops import preprocessing_of
    from pmm.data.loader import train_batches
    from pmm.engine import Validation, advice_on_data, collapsed, learning_rate, seed_everything, train_one_epoch
    from pmm.models.backbone import load_weights
    from pmm.models.registry import build_model
    from pmm.runtime.eager import torch_device

    device = torch_device(device_name)
    seed_everything(config.seed, device)
    recipe = config.recipe
    batches, sampler = train_batches(split.train, config)
    model = build_model(config)
    if not resume:
        load_weights(model.backbone, config.model)  # type: ignore[arg-type]
    model = model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.Adam(model.parameters(), lr=1.0, weight_decay=recipe.weight_decay)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: learning_rate(recipe, min(step, recipe.epochs * len(sampler) - 1), len(sampler))
    )
    start, best, warned = 0, -1.0, False
    if resume:
        state = checkpoint.load(out / "last.pth")
        _refuse_changes(out, Config.from_dict(state["config"]), config)
        start, best = state["epoch"], state["best"]
        if start >= recipe.epochs:
            print(f"{out}: the run is finished ({start} epochs); nothing to do")
            return out / "best.pth"
        checkpoint.restore_training(state, model, optimizer, scheduler)
    write_file(out / "config.json", json.dumps(config.to_dict(), indent=2) + "\n")
    _say_start(config, split, out, device, model, start)
    validation = Validation(split, preprocessing_of(config)) if split.query else None
    log = _truncated_log(out / "metrics.jsonl", start)

    with SummaryWriter(str(out / "tensorboard"), purge_step=start + 1) as board, log, cli.deferred_interrupt() as pause:
        begin = time.perf_counter()
        for epoch in range(start + 1, recipe.epochs + 1):
            sampler.epoch = epoch
            label = f"epoch {epoch}/{recipe.epochs}"
            record: dict[str, Any] = {"epoch": epoch}
            record |= train_one_epoch(model, batches, optimizer, scheduler, config, device, label, pause)
            is_best = validation is None
            if validation is not None and (epoch % recipe.val_every == 0 or epoch == recipe.epochs):
                result = validation.evaluate(model, device)
                record |= {"val_mAP": result.mAP, "val_rank1": result.rank1}
                is_best = result.mAP > best
                best = max(best, result.mAP)
            state = checkpoint.snapshot(model, optimizer, scheduler, config, epoch, best)
            if is_best:  # for evaluation and export: without what only a resumed run needs
                checkpoint.save(out / "best.pth", {**state, "optimizer": None, "scheduler": None, "rng": None})
            log.write(json.dumps(record) + "\n")
            log.flush()
            checkpoint.save(
                out / "last.pth", state
            )  # last: a run killed before this repeats the epoch, and loses nothing
            for name, value in record.items():
                board.add_scalar(name, value, epoch)
            left = (time.perf_counter() - begin) / (epoch - start) * (recipe.epochs - epoch)
            print(_line(label, record, len(sampler), left), flush=True)
            advice = advice_on_data(record, config.data.workers, usable_cores())
            if advice and epoch > start + 1 and not warned:  # in the first the workers start
                print(f"{PROG}: warning: {advice}", file=sys.stderr)
                warned = True
            if epoch > recipe.epochs * recipe.warmup and collapsed(record, config.model.num_classes):
                print(
                    f"{PROG}: warning: the features have collapsed to one point (triplet ln 2, cross-entropy ln K): "
                    "start again with a longer --warmup or a lower --lr",
                    file=sys.stderr,
                )
    print(f"{out}: finished {recipe.epochs} epochs; best.pth and last.pth are ready")
    return out / "best.pth"


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


def _default_preset() -> str:
    from pmm.machine import nvidia_gpus

    return "paper" if nvidia_gpus() else "tiny"


def _refuse_changes(out: Path, saved: Config, asked: Config) -> None:
    changed = "; ".join(saved.differences(asked))
    if changed:
        raise UserError(f"{out} was started with other values ({changed}); resume with the values and the data it had")


def _truncated_log(path: Path, epochs: int) -> Any:
    """metrics.jsonl, opened for appending, without what was written after the checkpoint being resumed."""
    lines = path.read_text().splitlines(keepends=True)[:epochs] if path.exists() and epochs else []
    write_file(path, "".join(lines))
    try:
        return path.open("a")
    except OSError as error:
        raise cannot_write(path, error) from error


def _say_start(config: Config, split: Split, out: Path, device: Any, model: torch.nn.Module, start: int) -> None:
    parameters = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    print(
        f"{PROG}: {config.model.method} on {config.model.backbone} ({parameters:.2f} M parameters), {device}, "
        f"seed {config.seed}"
    )
    if method_of(config).mixes_cells:
        print(f"kernels of the mix: {describe_kernels(device)}")
    held_out = len({sample.pid for sample in split.query})
    trained = f"{len(split.train)} crops of {config.model.num_classes} identities"
    print(f"data: {config.data.root}: {trained}, {held_out} more held out to choose best.pth")
    for note in split.notes:
        print(f"note: {note}")
    print(
        f"run: {out} ({'from epoch ' + str(start + 1) if start else 'from scratch'}, {config.recipe.epochs} epochs)",
        flush=True,
    )


def describe_kernels(device: torch.device) -> str:
    """What the mix runs on `device` and, where that is plain torch, why."""
    from pmm.ops._extension import missing

    reason = missing(device.type)
    return describe_build() if reason is None else f"plain torch on {device.type}: {reason}"


def _line(label: str, record: dict[str, Any], steps: int, seconds_left: float) -> str:
    parts = [label, f"loss {record['loss']:.3f}", f"lr {record['lr']:.1e}", f"{record['images_per_s']:.0f} images/s"]
    if "val_mAP" in record:
        parts.append(f"val mAP {record['val_mAP']:.3f} rank-1 {record['val_rank1']:.3f}")
    parts += [f"{part} {1000 * record[f'{part}_seconds'] / steps:.0f} ms" for part in ("data", "step")]
    parts.append(f"{int(seconds_left) // 60}:{int(seconds_left) % 60:02d} left")
    return "  ".join(parts)


if __name__ == "__main__":
    cli.run(main, prog=PROG)
