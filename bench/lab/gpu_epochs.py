"""A training run as a user starts it, with a worker on each core: images/s, and how busy the GPU is meanwhile."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from pmm.utils.errors import UserError
from pmm.utils.hardware import usable_cores

EPOCHS, FIRST = 12, 3
"""Epochs of the run, and the first one that counts: before, workers start and kernels are chosen."""
IDENTITIES = 768
"""For epochs of 24 steps, as many as Market-1501's."""
MIN_BUSY = 0.90
WATCH_S = 0.05

Busy = Callable[[], float]


def check_epochs(
    device: torch.device, folder: Path, preset: str, words: Sequence[str] = (), *, epochs: int = EPOCHS
) -> dict[str, Any]:
    """Train on synthetic identities in `folder` with the flags `words`. The median images/s and shares of the time are
    of the epochs from FIRST on.

    Raises UserError if the run fails, or a GPU is busy for less than MIN_BUSY of that time, validation and saving
    included: NVML's share of the time in which a kernel runs.
    """
    workers = usable_cores()
    flags = {"preset": preset, "device": device, "epochs": epochs, "workers": workers, "root": folder / "people",
             "out": folder / "run"}  # fmt: skip
    command = [sys.executable, "-m", "pmm.train", *words]
    for name, value in flags.items():
        command += [f"--{name}", str(value)]
    busy = (lambda: torch.cuda.utilization(device) / 100) if device.type == "cuda" else None
    log, samples = folder / "run" / "metrics.jsonl", list[float]()
    with subprocess.Popen(command) as process:
        while process.poll() is None:
            if busy and FIRST - 1 <= _finished(log) < epochs:
                samples.append(busy())
            time.sleep(WATCH_S)
    if process.returncode:
        raise UserError(f"pmm train ended with exit code {process.returncode}")
    return epoch_figures([json.loads(line) for line in log.read_text().splitlines()], samples, workers)


def epoch_figures(records: Sequence[dict[str, Any]], samples: Sequence[float], workers: int) -> dict[str, Any]:
    """What `check_epochs` returns, from the records of the epochs and the `samples` of the GPU's busy share, if any.
    Raises UserError for a GPU that is not busy enough."""
    counted = records[FIRST - 1 :]
    waiting = sum(record["data_seconds"] for record in counted) / sum(record["seconds"] for record in counted)
    found = {
        "workers": workers,
        "epochs": len(records),
        "images/s": statistics.median(record["images_per_s"] for record in counted),
        "waiting for images": waiting,
    }
    if samples:
        found["GPU busy"] = share = statistics.mean(samples)
        if share < MIN_BUSY:
            raise UserError(
                f"the GPU was busy for {share:.0%} of an epoch: {found}", expected=f"{MIN_BUSY:.0%} or more"
            )
    return found


def _finished(log: Path) -> int:
    """Epochs."""
    try:
        return log.read_text().count("\n")
    except OSError:
        return 0
