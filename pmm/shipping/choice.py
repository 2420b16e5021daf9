"""Which result of a bench goes into the folder that is handed over."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from typing import Literal

from pmm.bench.pages.format import one_line
from pmm.bench.pages.queries import completed, may_ship, reference_of, timing_at
from pmm.bench.result_schema import Result
from pmm.bench.schema import BenchReport
from pmm.runtime.open import BACKENDS
from pmm.utils.errors import BackendUnavailable, InvalidValue, UserError
from pmm.utils.extras import install_command
from pmm.utils.hardware import nvidia_gpus

Prefer = Literal["fastest", "smallest"]
TARGETS = {"cpu": ("ort-cpu", "openvino"), "gpu": ("tensorrt", "tensorrt-rtx", "ort-cuda")}
"""Backends that serve without torch, by where they run."""
ALL_SERVING = tuple(name for names in TARGETS.values() for name in names)


class NothingShips(UserError):
    """No result keeps the gates."""


def backends_of(target: str) -> list[str]:
    """The backends to measure for a `target`: cpu, gpu, or one of `ALL_SERVING`.

    Raises InvalidValue for another word, BackendUnavailable if none of them is installed, or there is no GPU to measure
    on.
    """
    if target not in (*TARGETS, *ALL_SERVING):
        raise InvalidValue("target", target, choices=(*TARGETS, *ALL_SERVING))
    names = TARGETS.get(target, (target,))
    if names[0] in TARGETS["gpu"] and not nvidia_gpus():
        problem = "there is no NVIDIA GPU here, and what ships is measured first"
        raise BackendUnavailable(problem, hint="run pmm ship on a machine of the target's kind")
    able = [name for name in names if find_spec(BACKENDS[name].library) is not None]
    if not able:
        library = BACKENDS[names[0]].library
        problem = f"nothing that serves on {target} is installed here: {', '.join(names)}"
        raise BackendUnavailable(problem, hint=install_command(library))
    return able


def chosen(report: BenchReport, backends: Sequence[str], prefer: Prefer) -> Result:
    """The result of one of `backends` that may ship and is the fastest at the smallest batch, or has the smallest file.

    The reference itself counts where it is a file that they run, as an adopted ONNX file is.

    Raises NothingShips, with what each of them fails by.
    """
    reference = reference_of(report)
    ran = [result for result in completed(report) if result.backend in backends and result.artifact]
    able = [result for result in ran if result is reference or may_ship(report, result)]
    if not able:
        raise NothingShips("no candidate may ship", expected="one that keeps all gates", hint=_why(report, backends))
    if prefer == "smallest":
        return min(able, key=lambda result: (result.artifact_bytes or 0, _ms(result)))
    return min(able, key=_ms)


def _ms(result: Result) -> float:
    first = min((timing.batch for timing in result.batches), default=0)
    timing = timing_at(result, first)
    return timing.p50_ms if timing else float("inf")


def _why(report: BenchReport, backends: Sequence[str]) -> str:
    """What each candidate fails by, and how near it is, in one line."""
    said = [
        f"{one_line(failure.result)} fails {failure.gate} ({one_line(failure.message)})"
        for failure in report.gates.failures
        if any(result.name == failure.result and result.backend in backends for result in report.results)
    ]
    others = [f"{one_line(r.name)} ranks differently" for r in completed(report)
              if r.backend in backends and not any(f.result == r.name for f in report.gates.failures)]  # fmt: skip
    measured = ", ".join(dict.fromkeys(one_line(result.backend) for result in completed(report)))
    return "; ".join([*said, *others]) or f"of {', '.join(backends)} none was measured, but {measured or 'nothing'}"
