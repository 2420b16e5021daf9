"""Faults are seen: indices out of range by the kernels' assertions, planted ones by the shim and the sanitizers."""

from __future__ import annotations

import os
import signal
import tempfile
from collections.abc import Callable

import pytest
import torch

from tests.ops.device_on_host.checks import KERNELS, SCHEDULES, problem


def last_words(call: Callable[[], None]) -> str:
    """What a copy of this process says on stderr while `call` ends it; fails if it survives."""
    with tempfile.TemporaryFile() as words:
        child = os.fork()
        if child == 0:
            os.dup2(words.fileno(), 2)
            signal.alarm(30)
            call()
            os._exit(0)
        status = os.waitpid(child, 0)[1]
        words.seek(0)
        said = words.read().decode()
    assert status != 0, "it went on as if nothing were wrong"
    return said


WRONG = [
    pytest.param(kernel, last, wrong, marks=() if (k + last + w) % 3 == 0 else pytest.mark.full)
    for k, kernel in enumerate(["select", "adjoint", "max_pool", "unpool", "mixed_cam"])
    for last in (False, True)
    for w, wrong in enumerate([-1, 3, 2**40])
]


@pytest.mark.parametrize(("kernel", "channels_last", "wrong"), WRONG)
def test_a_partner_out_of_range_stops_the_kernel(kernel, channels_last, wrong):
    x, replaced, partner = problem((3, 8, 2, 2), torch.float32, channels_last, True, "next")
    partner[1] = wrong
    pooled, cell, y = torch.zeros(3, 8), torch.zeros(3, 8, dtype=torch.int64), torch.empty_like(x)
    arguments = {
        "select": (x, replaced, partner, y),
        "adjoint": (x, replaced, partner, y),
        "max_pool": (x, replaced, partner, pooled, cell),
        "unpool": (pooled, cell, replaced, partner, y),
        "mixed_cam": (x, replaced, partner, pooled, torch.empty(3, 2, 2)),
    }[kernel]
    assert "partner must be in [0, n)" in last_words(lambda: getattr(KERNELS, kernel)(*arguments))


@pytest.mark.parametrize("wrong", [-1, 4])
def test_a_cell_out_of_range_stops_unpool(wrong):
    dx, replaced, partner = problem((3, 8, 2, 2), torch.float32, False, True, "next")
    cell = torch.full((3, 8), wrong)
    said = last_words(lambda: KERNELS.unpool(torch.zeros(3, 8), cell, replaced, partner, dx))
    assert "cell must be in [0, height * width)" in said


def test_the_shim_runs_a_sound_kernel_and_a_missing_barrier_depends_on_the_order():
    given, sound, faulty = torch.arange(64, dtype=torch.int32), set(), set()
    for seed in SCHEDULES:
        KERNELS.schedule(seed)
        for name, results in (("none", sound), ("missing barrier", faulty)):
            out = torch.empty_like(given)
            KERNELS.fault(name, given, out)
            results.add(tuple(out.tolist()))
    assert sound == {tuple(given.roll(1).tolist())}
    assert len(faulty) == len(SCHEDULES)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("read behind the input", "heap-buffer-overflow"),
        ("write behind shared memory", "heap-buffer-overflow"),
        ("signed overflow", "signed integer overflow"),
        ("misaligned vector", "misaligned address"),
        ("half at a barrier", "waits for threads that never come: thread 0 of block 0 at __syncthreads, "),
        ("half in a shuffle", "waits for threads that never come: thread 1 of block 0 at __shfl_xor_sync, "),
        ("two shuffles", "threads meet at two places"),
        ("too much shared memory", "too much shared memory: the kernel did not start: invalid configuration"),
    ],
)
def test_a_planted_fault_is_caught(name, words):
    given, out = torch.arange(1, 65, dtype=torch.int32), torch.empty(64, dtype=torch.int32)
    assert words in last_words(lambda: KERNELS.fault(name, given, out))
