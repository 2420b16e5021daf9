"""The progress of an epoch of training: sums over its steps, its line on the terminal, its record."""

from __future__ import annotations

import logging
import resource
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from typing import Any, TypeVar

import torch
from torch import Tensor
from tqdm import tqdm

MAX_WAITING_SHARE = 1 / 3
"""A run warns if a larger share of an epoch was spent waiting for data."""

T = TypeVar("T")


class Meter:
    """Sums over the steps of one epoch of one process: losses, images, and the time spent for data and for steps."""

    def __init__(self, device: torch.device, state: Mapping[str, Any] | None = None) -> None:
        """`state`: of the meter when the epoch was interrupted."""
        self.device, state = device, state or {}
        self.steps, self.images = int(state.get("steps", 0)), int(state.get("images", 0))
        self.totals: dict[str, Tensor] = {name: value.to(device) for name, value in state.get("totals", {}).items()}
        self.data_seconds = float(state.get("data_seconds", 0.0))
        self._earlier_seconds = float(state.get("seconds", 0.0))
        self.lr = 0.0
        self._begin = time.perf_counter()
        self._step_done: torch.cuda.Event | None = None

    def state(self) -> dict[str, Any]:
        """All of it as plain values and tensors on the CPU."""
        return {
            "steps": self.steps,
            "images": self.images,
            "totals": {name: value.cpu() for name, value in self.totals.items()},
            "seconds": self.seconds,
            "data_seconds": self.data_seconds,
        }

    @property
    def seconds(self) -> float:
        """Since the epoch began, without the time between an interruption and its resumption."""
        return self._earlier_seconds + time.perf_counter() - self._begin

    def batches(self, source: Iterable[T], label: str, total: int) -> Iterator[T]:
        """The next batches of `source` up to the `total` of an epoch, with a progress bar; counts the time spent
        waiting for each."""
        with tqdm(initial=self.steps, total=total, desc=label, unit="batch", leave=False, disable=None) as bar:
            waiting = time.perf_counter()
            for batch in islice(source, total - self.steps):
                # while the GPU still works on the last step, waiting costs nothing
                if self._step_done is None or self._step_done.query():
                    self.data_seconds += time.perf_counter() - waiting
                yield batch
                if not bar.disable:
                    bar.set_postfix_str(self._postfix(), refresh=False)
                bar.update()
                waiting = time.perf_counter()

    def step(self, losses: Mapping[str, Tensor], images: int, lr: float) -> None:
        """Add a step, without waiting for the device."""
        for name, value in losses.items():
            self.totals[name] = self.totals.get(name, 0) + value
        self.steps, self.images, self.lr = self.steps + 1, self.images + images, lr
        if self.device.type == "cuda":
            self._step_done = torch.cuda.Event()
            self._step_done.record(torch.cuda.current_stream(self.device))

    def record(self) -> dict[str, Any]:
        """Mean losses, learning rate, seconds (total, waiting for data, in steps), images/s, peak memory in GB."""
        means = {name: float(total) / self.steps for name, total in self.totals.items()}
        seconds = self.seconds
        return means | {
            "lr": self.lr,
            "seconds": seconds,
            "data_seconds": self.data_seconds,
            "step_seconds": seconds - self.data_seconds,
            "images_per_s": self.images / seconds,
            "memory_gb": peak_memory(self.device) / 1e9,
        }

    def _postfix(self) -> str:
        ms = {"data": self.data_seconds, "step": self.seconds - self.data_seconds}
        times = ", ".join(f"{part} {1000 * seconds / self.steps:.0f} ms" for part, seconds in ms.items())
        return f"{self.images / self.seconds:.0f} images/s, {times}, {peak_memory(self.device) / 1e9:.1f} GB"


def peak_memory(device: torch.device) -> int:
    """Largest number of bytes in use so far: by torch on a GPU, by the whole process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def mean_of_records(records: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """The records of all processes as one: the sum of images/s, the largest memory, the mean of all else."""
    whole = list(records)
    merged = {key: sum(record[key] for record in whole) / len(whole) for key in whole[0]}
    merged["images_per_s"] = sum(record["images_per_s"] for record in whole)
    merged["memory_gb"] = max(record["memory_gb"] for record in whole)
    return merged


def mean_of_states(states: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """The `Meter.state` of all processes as one, their mean, from which each of them resumes."""
    whole = list(states)
    totals = {name: sum(state["totals"][name] for state in whole) / len(whole) for name in whole[0]["totals"]}
    rest = {key: sum(state[key] for state in whole) / len(whole) for key in whole[0] if key != "totals"}
    return {**rest, "steps": whole[0]["steps"], "totals": totals}


def epoch_line(label: str, record: Mapping[str, Any], steps: int, seconds_left: float) -> str:
    """An epoch's record in one line."""
    count = sum(name.startswith("cross_entropy") for name in record)
    parts = [label, f"loss {record['loss']:.3f}"]
    if count > 1:
        each = [record[f"cross_entropy{number}"] + record.get(f"triplet{number}", 0) for number in range(1, count + 1)]
        terms = [f"{value:.2f}" for value in each]
        if (penalty := record["loss"] - sum(each)) > 0.005:
            terms.append(f"penalty {penalty:.2f}")
        parts[-1] += f" ({' + '.join(terms)})"
    parts += [f"lr {record['lr']:.1e}", f"{record['images_per_s']:.0f} images/s", f"{record['memory_gb']:.1f} GB"]
    if "val_mAP" in record:
        parts.append(f"val mAP {record['val_mAP']:.3f} rank-1 {record['val_rank1']:.3f}")
    if "test_mAP" in record:
        parts.append(f"test mAP {record['test_mAP']:.3f} rank-1 {record['test_rank1']:.3f}")
    parts += [f"{part} {1000 * record[f'{part}_seconds'] / steps:.0f} ms" for part in ("data", "step")]
    minutes, seconds = divmod(int(seconds_left), 60)
    hours, minutes = divmod(minutes, 60)
    parts.append(f"{hours}:{minutes:02d}:{seconds:02d} left" if hours else f"{minutes}:{seconds:02d} left")
    return "  ".join(parts)


def data_loading_hint(record: Mapping[str, float], workers: int, cores: int) -> str:
    """What to do if more than a third of an epoch was spent waiting for data, in one line; else empty.

    `record` as from `Meter.record`; `workers` processes load images on a machine of `cores`.
    """
    waited = record["data_seconds"] / record["seconds"]
    if waited <= MAX_WAITING_SHARE:
        return ""
    if workers < cores:
        return f"{waited:.0%} of the epoch was spent waiting for images; use --workers {cores}, one for each core"
    return (
        f"{waited:.0%} of the epoch was spent waiting for images although --workers {workers} keeps all {cores} cores "
        "busy; use more cores or a faster disk"
    )


def warn(text: str) -> None:
    """To logger "pmm", which a command prints on stderr as one line."""
    logging.getLogger("pmm").warning("%s", text)
