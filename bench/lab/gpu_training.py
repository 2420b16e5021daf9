"""Checks of training on a GPU: throughput with a profile, a resume that is equal to the bit, and NCCL."""

from __future__ import annotations

import dataclasses
import itertools
import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import nn

from bench.lab.training_step import random_crops, step_config
from pmm.models.registry import build_model
from pmm.presets import preset
from pmm.training.state import TrainState, make_train_state
from pmm.training.step import set_deterministic, train_step
from pmm.utils.errors import UserError

PROFILED = 20
"""Steps that the profiler watches."""
SHOWN = 6
"""Kernels in the summary."""
EPOCHS = 4
"""Of the runs that are compared."""
WAIT_S = 240.0
"""Most seconds for the first epoch of the run that is interrupted."""


def throughput(device: torch.device, amp: Literal["off", "bf16", "fp16"], *, steps: int, fast: bool) -> dict[str, Any]:
    """Images/s over `steps` steps of preset paper on crops in place, the share of the time in which the GPU works, and
    the kernels that take most of it. `fast`: a small trunk and batch, to see that it works."""
    state, crops = _train_state(device, amp, fast)
    step = partial(train_step, state, crops)
    for index in range(min(steps, 10)):  # not counted: the first choose their kernels
        step(step=index)
    _wait(device)
    begin = time.perf_counter()
    for index in range(steps):
        losses = step(step=index)
    _wait(device)
    seconds = time.perf_counter() - begin
    batch = state.config.recipe.batch_size
    images = batch * steps
    found = {"batch": batch, "steps": steps, "images/s": images / seconds,
             "ms per step": 1000 * seconds / steps, "loss": float(losses["loss"])}  # fmt: skip
    if device.type != "cuda":
        return found
    return found | {"TF32 in convolutions": torch.backends.cudnn.allow_tf32} | _profiled(step)


def busy_time(spans: Iterable[tuple[float, float]]) -> tuple[float, float]:
    """The time that `spans` (begin, end) cover, overlaps once, and the time from the first begin to the last end."""
    ordered = sorted(spans)
    covered, reached = 0.0, ordered[0][0]
    for begin, end in ordered:
        covered += max(0.0, end - max(begin, reached))
        reached = max(reached, end)
    return covered, reached - ordered[0][0]


def check_resume(device: str, folder: Path, preset_name: str, words: Sequence[str] = ()) -> dict[str, Any]:
    """Train twice, once with an interruption and --resume, and compare the weights to the bit.

    Raises UserError for a run that fails, or that could not be interrupted in time.
    """
    run = (sys.executable, "-m", "pmm.train", "--preset", preset_name, "--device", device, "--epochs", str(EPOCHS))
    people = ("--root", str(folder / "people"), "--synthetic-ids", "24", "--deterministic", *words)
    whole, halted = folder / "whole", folder / "halted"
    _train((*run, *people, "--out", str(whole)))
    with subprocess.Popen((*run, *people, "--out", str(halted))) as process:
        begin, log = time.monotonic(), halted / "metrics.jsonl"
        while process.poll() is None and not _lines(log) and time.monotonic() - begin < WAIT_S:
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        code = process.wait()
    done = _lines(log)
    if code != 128 + signal.SIGTERM or not 0 < done < EPOCHS:
        raise UserError(f"the run was not interrupted within its {EPOCHS} epochs (exit code {code}, {done} done)")
    _train((sys.executable, "-m", "pmm.train", "--resume", "--device", device, "--out", str(halted)))
    states = [torch.load(path / "last.pth", map_location="cpu", weights_only=True)["model"] for path in (whole, halted)]
    pairs = list(zip(*(state.values() for state in states), strict=True))
    furthest = max(float((a.double() - b.double()).abs().max()) for a, b in pairs)
    same = all(torch.equal(a, b) for a, b in pairs)
    return {"epochs before": done, "epochs": EPOCHS, "same bits": same, "largest difference": furthest}


def check_distributed(device: torch.device, *, fast: bool) -> dict[str, Any]:
    """Compare three steps with DistributedDataParallel, in a group of one process, with three without, to the bit."""
    backend = "nccl" if device.type == "cuda" else "gloo"
    alone, crops = _train_state(device, "off", fast)
    together, _ = _train_state(device, "off", fast)
    set_deterministic(device, True)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        total = torch.arange(8.0, device=device)
        dist.all_reduce(total)
        network = nn.parallel.DistributedDataParallel(
            together.model,
            device_ids=[device] if device.type == "cuda" else None,
            gradient_as_bucket_view=True,
            find_unused_parameters=device.type == "cpu",
        )
        together = dataclasses.replace(together, network=network)
        losses = [
            [float(train_step(state, crops, step=step)["loss"]) for step in range(3)] for state in (alone, together)
        ]
    finally:
        dist.destroy_process_group()
    pairs = zip(alone.model.state_dict().values(), together.model.state_dict().values(), strict=True)
    same = losses[0] == losses[1] and all(torch.equal(a, b) for a, b in pairs)
    version = ".".join(map(str, torch.cuda.nccl.version())) if device.type == "cuda" else ""
    return {"backend": f"{backend} {version}".strip(), "same bits": same, "all-reduce": total.tolist() == [*range(8)]}


def _train_state(device: torch.device, amp: Literal["off", "bf16", "fp16"], fast: bool) -> tuple[TrainState, Any]:
    batch = 8 if fast else preset("paper").recipe.batch_size
    config = step_config(batch, "resnet10" if fast else "resnet50", amp)
    set_deterministic(device, config.recipe.deterministic)
    torch.manual_seed(0)
    return make_train_state(build_model(config), config, device, 1), random_crops(config, device)


def _profiled(step: partial[Any]) -> dict[str, Any]:
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as watched:
        for index in range(PROFILED):
            step(step=index)
        torch.cuda.synchronize()
    # ranges that a program names are not work of the GPU
    work = [e for e in watched.events() or () if e.device_type.name == "CUDA" and not e.is_user_annotation]
    if not work:
        return {"GPU busy": "the profiler saw no kernel"}
    covered, whole = busy_time((e.time_range.start, e.time_range.end) for e in work)
    taken: dict[str, float] = {}
    for event in work:
        taken[event.name] = taken.get(event.name, 0.0) + event.time_range.elapsed_us()
    most = itertools.islice(sorted(taken.items(), key=lambda item: -item[1]), SHOWN)
    kernels = [{"kernel": name, "ms per step": us / 1000 / PROFILED, "share": us / whole} for name, us in most]
    return {"GPU busy": covered / whole, "kernels": kernels}


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _train(command: Sequence[str]) -> None:
    if code := subprocess.run(command).returncode:
        raise UserError(f"pmm train ended with exit code {code}")


def _lines(log: Path) -> int:
    """Finished epochs."""
    try:
        return sum(1 for line in log.read_text().splitlines() if json.loads(line))
    except (OSError, ValueError):
        return 0
