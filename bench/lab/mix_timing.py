"""Times of the mix, and of mix + global max pool: ours, eager torch, compiled, the authors'; each verified first."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench.lab.mix_reference import PROVED, Case, Maps, make_case, pooled_case, prove, same_bits
from bench.lab.mix_report import COMPILED, COPY, KERNELS, OURS, heading, interval, timing
from bench.lab.mix_variants import BLOCK, MIX_VARIANTS, ON_EMPTY, K
from pmm.bench.latency import LatencyPlan, measure
from pmm.bench.statistics import Latency, median_ratio
from pmm.config import fast_mode
from pmm.ops import _extension
from pmm.utils.errors import BackendUnavailable

LEAST = {"mix": {"forward": 2, "backward": 2}, "mix+pool": {"forward": 1, "backward": 1}}
"""Maps that an operation must at least read or write, for its share of the copy's bandwidth (a copy: 2)."""


@dataclass(frozen=True)
class Competitor:
    """A competitor's steps by phase, or the reason why it has none: a `wrong` result, or none at all."""

    name: str
    steps: Mapping[str, Callable[[], object]]
    proof: str = ""
    reason: str = ""
    wrong: bool = False

    @property
    def status(self) -> str:
        """timed, wrong or unavailable."""
        return "timed" if self.steps else "wrong" if self.wrong else "unavailable"


def bench_mixing(
    *,
    batches: Sequence[int],
    dtypes: Sequence[str],
    layouts: Sequence[str],
    competitors: Sequence[str],
    device: torch.device,
    threads: int,
    plan: LatencyPlan,
    fast: bool = False,
) -> dict[str, Any]:
    """Measure every combination; names and report as in `bench.lab.mix_report`. A competitor with a wrong result is
    not timed, and `equal` is then false. `fast`: maps of 16 channels instead of 2,048, to see that it works.

    Raises BackendUnavailable without compiled kernels for `device`.
    """
    require_kernels(device)
    torch.set_num_threads(threads)
    maps = Maps(channels=16) if fast else Maps()
    settings = [
        _setting(batch, dtype, layout, maps, device, plan, competitors)
        for batch in batches for dtype in dtypes for layout in layouts
    ]  # fmt: skip
    return {
        **heading(name_of(device), threads, plan),
        "maps": asdict(maps),
        "mix": {"block": list(BLOCK), "k": K, "on_empty": ON_EMPTY},
        "equal": not any(row["status"] == "wrong" for s in settings for op in s["ops"].values() for row in op["rows"]),
        "settings": settings,
    }


def mixing_plan(samples: int = 0, budget: float = 0.0) -> LatencyPlan:
    """How long to measure each figure (0: the default; with PMM_FAST=1 hardly at all). `budget` in seconds."""
    if fast_mode():
        return LatencyPlan(warmup=0.0, samples=samples or 4, block=2, settle=0.0, budget=budget or 10.0)
    return LatencyPlan(warmup=0.2, samples=samples or 30, block=2, settle=0.02, budget=budget or 4.0)


def require_kernels(device: torch.device) -> Any:
    """The compiled kernels for `device`. Raises BackendUnavailable if there are none."""
    if reason := _extension.missing(device):
        raise BackendUnavailable(f"there is nothing to measure on {device.type}: {reason}")
    return _extension.kernels(device)


def name_of(device: torch.device) -> str:
    """cpu, or the name of the GPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def stopwatch(device: torch.device) -> Callable[[Callable[[], object]], float] | None:
    """On CUDA: ms of a step between two events, from an idle GPU to its last kernel. None: the host clock is exact."""
    return partial(_by_events, device) if device.type == "cuda" else None


def _by_events(device: torch.device, step: Callable[[], object]) -> float:
    with torch.cuda.device(device):
        torch.cuda.synchronize()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        step()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)


def _setting(
    batch: int, dtype: str, layout: str, maps: Maps, device: torch.device, plan: LatencyPlan, names: Sequence[str]
) -> dict[str, Any]:
    begin = time.perf_counter()
    mix = make_case(batch, dtype, layout, maps, device)
    ops = {"mix": _measured(mix, "mix", names, plan)}
    ops["mix+pool"] = _measured(pooled_case(mix), "mix+pool", names, plan)
    for op, result in ops.items():
        for row in result["rows"]:
            if row["status"] != "timed":
                print(f"{op} {batch} {dtype} {layout}: {row['name']} {row['status']}: {row['reason']}", file=sys.stderr)
    print(f"{batch} {dtype} {layout}: {time.perf_counter() - begin:.0f} s", file=sys.stderr)
    megabytes = mix.x.numel() * mix.x.element_size() / 1e6
    return {"batch": batch, "dtype": dtype, "layout": layout, "map_mb": megabytes, "ops": ops}


def _measured(case: Case, op: str, names: Sequence[str], plan: LatencyPlan) -> dict[str, Any]:
    runs = [*(_competitor(name, op, case) for name in names), _raw_kernels(case, op), _copy(case)]
    steps = {(run.name, phase): step for run in runs for phase, step in run.steps.items()}
    times = measure({" ".join(key): step for key, step in steps.items()}, plan, stopwatch=stopwatch(case.x.device))
    found = {key: times[" ".join(key)] for key in steps}
    return {
        "rows": [_row(run, found) for run in runs],
        "ratios": _ratios(found, plan.block),
        "shares": _shares(found, op, plan.block),
    }


def _row(run: Competitor, found: Mapping[tuple[str, str], Latency]) -> dict[str, Any]:
    phases = {phase: timing(found[run.name, phase]) for phase in run.steps}
    return {"name": run.name, "status": run.status, "proof": run.proof, "reason": run.reason, **phases}


def _ratios(found: Mapping[tuple[str, str], Latency], block: int) -> list[dict[str, Any]]:
    """Each competitor's time over ours."""
    return [
        {"phase": phase, "of": name, "over": OURS, **interval(median_ratio(latency, found[OURS, phase], block=block))}
        for (name, phase), latency in found.items()
        if name not in (OURS, KERNELS, COPY) and (OURS, phase) in found
    ]


def _shares(found: Mapping[tuple[str, str], Latency], op: str, block: int) -> list[dict[str, Any]]:
    """Each step's share of the copy's bandwidth, by the least data it must move."""
    copy = found[COPY, "forward"]
    return [
        {"phase": phase, "name": name,
         **interval(median_ratio(copy, latency, block=block).times(LEAST[op][phase] / 2))}
        for (name, phase), latency in found.items()
        if name != COPY and phase in LEAST[op]
    ]  # fmt: skip


def _competitor(name: str, op: str, case: Case) -> Competitor:
    """The steps of `name`, if its result is right."""
    try:
        mixer = MIX_VARIANTS[op][name]()
        output = mixer(case.x, case.cam, case.partner)
        fault, proof = prove(name, output, case)
    except Exception as error:  # a compiler that is missing or fails, with any exception: the row has the reason
        if name != COMPILED:
            raise
        return Competitor(name, {}, reason=f"{type(error).__name__}: {error}".strip().splitlines()[0][:300])
    if fault:
        return Competitor(name, {}, reason=fault, wrong=True)

    def forward() -> Tensor:
        return mixer(case.x, case.cam, case.partner)

    def backward() -> object:
        return torch.autograd.grad(output, case.x, case.dy[1], retain_graph=True)

    def both() -> object:
        return torch.autograd.grad(forward(), case.x, case.dy[1])

    return Competitor(name, {"forward": forward, "backward": backward, "both": both}, proof)


def _raw_kernels(case: Case, op: str) -> Competitor:
    """The compiled kernels alone, on allocated memory."""
    kernels = require_kernels(case.x.device)
    x, dy = case.x.detach(), case.dy[1]
    replaced, output, dx = torch.empty_like(case.replaced), torch.empty_like(case.output), torch.empty_like(x)
    cell = torch.empty(x.shape[:2], dtype=torch.int64, device=x.device)

    def forward() -> None:
        kernels.rank_blocks(case.cam, *BLOCK, K, ON_EMPTY == "skip", replaced)
        if op == "mix":
            kernels.select(x, replaced, case.partner, output)
        else:
            kernels.max_pool(x, replaced, case.partner, output, cell)

    def backward() -> None:
        if op == "mix":
            kernels.adjoint(dy, replaced, case.partner, dx)
        else:
            kernels.unpool(dy, cell, replaced, case.partner, dx)

    forward()
    backward()
    if not (torch.equal(replaced, case.replaced) and same_bits(output, case.output) and torch.equal(dx, case.dx[1])):
        return Competitor(KERNELS, {}, reason="a kernel's result is not the definition's", wrong=True)
    return Competitor(KERNELS, {"forward": forward, "backward": backward}, PROVED)


def _copy(case: Case) -> Competitor:
    x, y = case.x.detach(), torch.empty_like(case.x)
    return Competitor(COPY, {"forward": lambda: y.detach().copy_(x)})
