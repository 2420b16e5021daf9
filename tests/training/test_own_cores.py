"""Which threads of a training keep to which cores."""

import json
import os
import sys

import pytest

from pmm.training import own_cores
from pmm.training.flags import TrainOptions
from pmm.training.own_cores import BINDINGS, OwnCores
from tests.conftest import run_python

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="no affinity of threads")

SCRIPT = """
import json, os, sys
from pmm.training.flags import TrainOptions
from pmm.training.own_cores import OwnCores

def cores():
    return sorted(os.sched_getaffinity(0))

before, own = cores(), OwnCores(TrainOptions(device="cpu", threads=int(sys.argv[1])))
found = {"all": [before, cores()], "children": "OMP_PROC_BIND" in os.environ}
if "torch" in sys.modules:
    import torch
    with own:
        torch.ones(2000, 2000) @ torch.ones(2000, 2000)
        threads = [sorted(os.sched_getaffinity(int(thread))) for thread in os.listdir("/proc/self/task")]
        found |= {"own": cores(), "threads": threads}
    try:
        with own:
            raise ValueError
    except ValueError:
        pass
    found["all"].append(cores())
print(json.dumps(found))
"""


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="a single core")
def test_each_thread_computes_on_a_core_of_its_own_and_all_else_on_any():
    everything = sorted(os.sched_getaffinity(0))
    found = json.loads(run_python("-c", SCRIPT, str(len(everything)), OMP_NUM_THREADS="").stdout)
    assert found["all"] == [everything] * 3
    assert not found["children"]
    assert len(found["own"]) == 1
    assert [cores for cores in sorted(found["threads"]) if len(cores) == 1] == [[core] for core in everything]


@pytest.mark.parametrize(
    ("options", "given"),
    [
        ({"threads": 3}, {}),
        ({}, {"OMP_NUM_THREADS": "2"}),
        ({}, {"WORLD_SIZE": "2"}),
        ({"device": "cuda"}, {}),
        *(({}, {name: "false"}) for name in BINDINGS),
    ],
)
def test_threads_are_not_bound_where_that_could_harm(monkeypatch, options, given):
    for name in ("OMP_NUM_THREADS", "WORLD_SIZE", *BINDINGS):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(own_cores, "nvidia_gpus", tuple)
    monkeypatch.setattr(own_cores, "compute_threads", lambda: 4)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3})
    assert own_cores._one_each(TrainOptions())
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    assert not own_cores._one_each(TrainOptions(**options))


def test_a_gpu_that_auto_would_use_or_a_single_core(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(own_cores, "compute_threads", lambda: 1)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {5})
    assert not own_cores._one_each(TrainOptions(device="cpu"))
    monkeypatch.setattr(own_cores, "compute_threads", lambda: 2)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {4, 5})
    monkeypatch.setattr(own_cores, "nvidia_gpus", lambda: ("a GPU",))
    assert own_cores._one_each(TrainOptions(device="cpu"))
    assert not own_cores._one_each(TrainOptions())


def test_where_torch_is_loaded_already_nothing_is_bound(monkeypatch):
    import torch  # noqa: F401

    before = os.sched_getaffinity(0)
    monkeypatch.setattr(own_cores, "_one_each", lambda _: True)
    with OwnCores(TrainOptions()):
        assert os.sched_getaffinity(0) == before
