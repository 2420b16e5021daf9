"""A training run as a user starts it, with a worker on each core: images/s, and how busy the GPU is meanwhile."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from pmm.utils.errors import UserError
from pmm.utils.hardware import usable_cores

EPOCHS, FIRST = 12, 3
"""Epochs of the run, and the first one that counts: before, workers start and kernels are chosen."""
IDENTITIES, HELD_OUT = 800, 0.04
"""Of 800 identities 768 are left to train on: epochs of 24 steps, as many as Market-1501's."""
SAVE_MINUTES = 0.05
"""So that a run of less than a minute is saved several times while it is watched."""
MIN_BUSY = 0.90
WATCH_S = 0.05


def check_epochs(
    device: torch.device,
    folder: Path,
    preset: str,
    words: Sequence[str] = (),
    *,
    epochs: int = EPOCHS,
    held_out: float = HELD_OUT,
) -> dict[str, Any]:
    """Train on synthetic identities in `folder` with the flags `words`, with an evaluation on held-out identities after
    each epoch, and last.pth every SAVE_MINUTES. The median images/s and shares of the time are of the epochs from FIRST
    on, without the save at the end of the run.

    Raises UserError if the run fails, a GPU is busy for less than MIN_BUSY of that time (NVML's share of the time in
    which a kernel runs), or there was no evaluation or no save in it.
    """
    workers = usable_cores()
    flags = {"preset": preset, "device": device, "epochs": epochs, "workers": workers, "root": folder / "people",
             "out": folder / "run", "synthetic-ids": IDENTITIES, "val-identities": held_out, "val-every": 1,
             "save-minutes": SAVE_MINUTES}  # fmt: skip
    command = [sys.executable, "-m", "pmm.train", *words]
    for name, value in flags.items():
        command += [f"--{name}", str(value)]
    busy = (lambda: torch.cuda.utilization(device) / 100) if device.type == "cuda" else None
    log, samples, saved = folder / "run" / "metrics.jsonl", list[float](), set[int]()
    with subprocess.Popen(command) as process:
        while process.poll() is None:
            if FIRST - 1 <= _finished(log) < epochs:
                saved.add((folder / "run" / "last.pth").stat().st_mtime_ns)
                if busy:
                    samples.append(busy())
            time.sleep(WATCH_S)
    if process.returncode:
        raise UserError(f"pmm train ended with exit code {process.returncode}")
    records = [json.loads(line) for line in log.read_text().splitlines()]
    return epoch_figures(records, samples, workers, saves=max(len(saved) - 1, 0))  # one was there before


def epoch_figures(
    records: Sequence[dict[str, Any]], samples: Sequence[float], workers: int, *, saves: int
) -> dict[str, Any]:
    """What `check_epochs` returns, from the records of the epochs, the `samples` of the GPU's busy share, if any, and
    how often last.pth was written meanwhile. Raises UserError as `check_epochs`."""
    counted = records[FIRST - 1 :]
    waiting = sum(record["data_seconds"] for record in counted) / sum(record["seconds"] for record in counted)
    found = {
        "workers": workers,
        "epochs": len(records),
        "images/s": statistics.median(record["images_per_s"] for record in counted),
        "waiting for images": waiting,
        "evaluations": sum("val_mAP" in record for record in counted),
        "saves": saves,
    }
    if samples:
        if not found["evaluations"] or saves < 1:
            problem = f"the run was not evaluated and saved while the GPU was watched: {found}"
            raise UserError(problem, expected="both, for the share to include them")
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
