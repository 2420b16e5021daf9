"""What an epoch of training has done so far, and what is said of it: on the terminal and as plain values."""

from __future__ import annotations

import logging
import resource
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor
from tqdm import tqdm

MOST_WAITING = 1 / 3
"""Share of an epoch that may go in waiting for data before a run warns of it."""


T = TypeVar("T")


class Meter:
    """Sums over the steps of one epoch of one process: losses, images, and the time spent for data and for steps."""

    def __init__(self, device: torch.device, done: Mapping[str, Any] | None = None) -> None:
        """`done`: what `state` said when the epoch was interrupted."""
        self.device, done = device, done or {}
        self.steps, self.images = int(done.get("steps", 0)), int(done.get("images", 0))
        self.totals: dict[str, Tensor] = {name: value.to(device) for name, value in done.get("totals", {}).items()}
        self.data_seconds, self._earlier = float(done.get("data_seconds", 0.0)), float(done.get("seconds", 0.0))
        self.lr = 0.0
        self._begin = time.perf_counter()
        self._stepped: torch.cuda.Event | None = None

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
        """Since the epoch began, without what lies between an interruption and going on."""
        return self._earlier + time.perf_counter() - self._begin

    def batches(self, source: Iterable[T], label: str, total: int) -> Iterator[T]:
        """The batches of `source` under a progress bar, the wait for each counted."""
        with tqdm(initial=self.steps, total=total, desc=label, unit="batch", leave=False, disable=None) as bar:
            waiting = time.perf_counter()
            for batch in source:
                # a GPU that is still at the step before is not kept waiting: that costs nothing
                if self._stepped is None or self._stepped.query():
                    self.data_seconds += time.perf_counter() - waiting
                yield batch
                if not bar.disable:
                    bar.set_postfix_str(self._postfix(), refresh=False)
                bar.update()
                waiting = time.perf_counter()

    def step(self, losses: Mapping[str, Tensor], images: int, lr: float) -> None:
        """Count a step. Nothing waits for the device."""
        for name, value in losses.items():
            self.totals[name] = self.totals.get(name, 0) + value
        self.steps, self.images, self.lr = self.steps + 1, self.images + images, lr
        if self.device.type == "cuda":
            self._stepped = torch.cuda.Event()
            self._stepped.record(torch.cuda.current_stream(self.device))

    def record(self) -> dict[str, Any]:
        """Mean losses, learning rate, seconds (in all, waiting for data, in steps), images/s, peak memory in GB."""
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
    """Most bytes this process has held so far: torch's of a GPU, all of its own on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def mean_of_records(records: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """One record for the processes of a run: images/s add up, memory is the most, the rest is the mean."""
    whole = list(records)
    merged = {key: sum(record[key] for record in whole) / len(whole) for key in whole[0]}
    merged["images_per_s"] = sum(record["images_per_s"] for record in whole)
    merged["memory_gb"] = max(record["memory_gb"] for record in whole)
    return merged


def mean_of_states(states: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """One `Meter.state` for the processes of a run, from which each of them goes on: the means."""
    whole = list(states)
    totals = {name: sum(state["totals"][name] for state in whole) / len(whole) for name in whole[0]["totals"]}
    rest = {key: sum(state[key] for state in whole) / len(whole) for key in whole[0] if key != "totals"}
    return {**rest, "steps": whole[0]["steps"], "totals": totals}


def epoch_line(label: str, record: Mapping[str, Any], steps: int, seconds_left: float) -> str:
    """An epoch's record in one line."""
    stages = sum(name.startswith("triplet") for name in record)
    parts = [label, f"loss {record['loss']:.3f}"]
    if stages > 1:
        each = (record[f"triplet{stage}"] + record[f"cross_entropy{stage}"] for stage in range(1, stages + 1))
        parts[-1] += f" ({' + '.join(f'{value:.2f}' for value in each)})"
    parts += [f"lr {record['lr']:.1e}", f"{record['images_per_s']:.0f} images/s", f"{record['memory_gb']:.1f} GB"]
    if "val_mAP" in record:
        parts.append(f"val mAP {record['val_mAP']:.3f} rank-1 {record['val_rank1']:.3f}")
    parts += [f"{part} {1000 * record[f'{part}_seconds'] / steps:.0f} ms" for part in ("data", "step")]
    minutes, seconds = divmod(int(seconds_left), 60)
    hours, minutes = divmod(minutes, 60)
    parts.append(f"{hours}:{minutes:02d}:{seconds:02d} left" if hours else f"{minutes}:{seconds:02d} left")
    return "  ".join(parts)


def advice_on_data(record: Mapping[str, float], workers: int, cores: int) -> str:
    """What to do if more than a third of an epoch went in waiting for data, in one line; empty if not.

    `record` is `Meter.record`'s; `workers` load on a machine of `cores`.
    """
    waited = record["data_seconds"] / record["seconds"]
    if waited <= MOST_WAITING:
        return ""
    if workers < cores:
        return f"{waited:.0%} of the epoch was waiting for images: start runs with --workers {cores}, one for each core"
    return (
        f"{waited:.0%} of the epoch was waiting for images, though --workers {workers} keeps all {cores} cores busy: "
        "more cores or a faster disk would help"
    )


def warn(text: str) -> None:
    """Logger "pmm": a command puts it on stderr, as one line."""
    logging.getLogger("pmm").warning("%s", text)


class LossWatch:
    """Looks whether each loss is finite when the next step is about to begin, while a GPU still works at the rest of
    the one before: the losses are to be noted before backward.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._last: tuple[dict[str, Tensor], Any, int] | None = None
        self._host: Tensor | None = None
        self._there: torch.cuda.Event | None = None

    def note(self, losses: Mapping[str, Tensor], batch: Any, step: int) -> None:
        """Remember a step's losses, detached, and whatever tells of which images they are."""
        self._last = dict(losses), batch, step
        self._host = losses["loss"]
        if self.device.type == "cuda":
            self._host = torch.empty((), dtype=self._host.dtype, pin_memory=True)
            self._host.copy_(losses["loss"], non_blocking=True)
            self._there = torch.cuda.Event()
            self._there.record(torch.cuda.current_stream(self.device))

    def bad(self) -> tuple[dict[str, float], Any, int] | None:
        """The last step's losses, batch and number if its loss is NaN or Inf."""
        if self._last is None or self._host is None:
            return None
        if self._there is not None:
            self._there.synchronize()
        if bool(torch.isfinite(self._host)):
            return None
        losses, batch, step = self._last
        return {name: float(value) for name, value in losses.items()}, batch, step
