"""What `--amp` means on a device, alone and among several processes."""

import dataclasses
import re

import pytest
import torch

import pmm.training.precision
from pmm.presets import preset
from pmm.training.distributed import Processes
from pmm.training.precision import HALF, bf16_speedup, describe_precision, reason_for, with_resolved_amp
from pmm.utils.errors import BackendUnavailable
from tests.refusals import refuses

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
TURING, AMPERE, PASCAL = (7, 5), (8, 0), (6, 1)


def config(amp):
    base = preset("tiny")
    return dataclasses.replace(base, recipe=dataclasses.replace(base.recipe, amp=amp))


@pytest.fixture
def on(monkeypatch):
    """Call it with whether the CPU computes in bf16 (and how fast), or with a GPU's compute capability: the device."""

    def pretend(what, speedup=1.9):
        monkeypatch.setattr(pmm.training.precision, "cpu_has_bf16", lambda: what is True)
        monkeypatch.setattr(pmm.training.precision, "bf16_speedup", lambda: speedup)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: what)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "GPU X")
        return CPU if isinstance(what, bool) else CUDA

    return pretend


@pytest.mark.parametrize(
    ("what", "amp"),
    [(True, "bf16"), (False, "off"), ((9, 0), "bf16"), (AMPERE, "bf16"), (TURING, "fp16"), ((7, 0), "fp16"),
     (PASCAL, "off")],
)  # fmt: skip
def test_auto_is_the_fastest_that_the_hardware_computes(on, what, amp):
    device = on(what)
    assert with_resolved_amp(config("auto"), device).recipe.amp == amp
    reason = reason_for(amp, device)
    assert ("GPU X" if device == CUDA else "this CPU") in reason
    named = {half for half in HALF if half in reason}
    assert amp in named or (amp == "off" and not named)


def test_a_cpu_that_computes_in_bf16_but_no_faster_trains_in_fp32(on):
    device = on(True, speedup=0.5)
    assert with_resolved_amp(config("auto"), device).recipe.amp == "off"
    assert {"bf16", "0.5", "fp32"} <= set(re.findall(r"[\w.]+", reason_for("off", device)))
    assert with_resolved_amp(config("bf16"), device).recipe.amp == "bf16"  # as asked for


def test_the_speed_of_bf16_is_that_of_its_fastest_product_on_one_thread(monkeypatch):
    """The clock is patched: products take the milliseconds below, the first of them, which also prepares, the most."""
    took = {torch.float32: [90, 40, 60, 50, 70, 80], torch.bfloat16: [900, 30, 10, 20, 60, 50]}
    running, threads, clock, ones = [], [], [0.0], torch.ones

    def matrix(*size, dtype):
        running.append(dtype)
        return ones(2, 2, dtype=dtype)

    def now():
        threads.append(torch.get_num_threads())
        if len(threads) % 2 == 0:  # after a product
            clock[0] += took[running[-1]].pop(0)
        return clock[0]

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    monkeypatch.setattr(torch, "ones", matrix)
    monkeypatch.setattr(pmm.training.precision.time, "thread_time", now)
    try:
        assert bf16_speedup.__wrapped__() == 4
        assert (set(threads), torch.get_num_threads()) == ({1}, 2)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("what", "amp"), [(True, "off"), (False, "off"), (TURING, "off"), (TURING, "fp16"), (PASCAL, "fp16")]
)
def test_what_is_asked_for_stays(on, what, amp):
    assert with_resolved_amp(config(amp), on(what)).recipe.amp == amp


@pytest.mark.parametrize(("what", "name"), [(False, "this CPU"), (TURING, "GPU X")])
def test_emulated_bf16_is_refused(on, what, name):
    with refuses(BackendUnavailable, "--amp bf16", name, hint="--amp auto"):
        with_resolved_amp(config("bf16"), on(what))


def test_fp16_on_a_cpu_is_refused(on):
    with refuses(BackendUnavailable, "--amp fp16", "CPU", hint="--amp auto"):
        with_resolved_amp(config("fp16"), on(True))


@pytest.mark.parametrize(
    ("others", "amp"),
    [([("bf16", "fp16")], "bf16"), ([("fp16",)], "fp16"), ([("bf16", "fp16"), ()], "off")],
)
def test_processes_agree_on_what_all_their_devices_compute(on, others, amp):
    class Several(Processes):
        def gather(self, value):
            return [value, *others]

        def broadcast(self, value):
            return value

        def all_reduce_max(self, number):
            return number

    found = with_resolved_amp(config("auto"), on(AMPERE), Several(world=1 + len(others)))
    assert found.recipe.amp == amp
    assert "GPU X" not in reason_for(amp, CUDA, world=2)  # which may not be the one that decided


def test_a_process_that_would_emulate_what_is_asked_for_stops_all(on):
    class Several(Processes):
        def gather(self, value):
            return [value, BackendUnavailable("emulated")]

        def all_reduce_max(self, number):
            return 1

    with refuses(BackendUnavailable, "emulated", "process 1"):
        with_resolved_amp(config("bf16"), on(AMPERE), Several(world=2))


def test_tf32_is_named_where_it_is_used(on):
    off, device = config("off"), on(AMPERE)
    assert "TF32" in describe_precision(off, device)  # torch's defaults: for convolutions
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        assert "matrix" in describe_precision(off, device)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = False
    assert "matrix" not in describe_precision(off, device)
    assert describe_precision(off, on(TURING)) == describe_precision(off, on(False)) == "fp32"
    assert describe_precision(config("bf16"), on(AMPERE)) == "bf16"
