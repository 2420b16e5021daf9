"""Runners in processes that are forked from the one that opened them, as gunicorn --preload does it."""

import json

import pytest

from pmm.runtime import fork
from pmm.runtime.eager import torch_device
from pmm.runtime.open import open_runner
from pmm.utils.errors import UserError
from pmm.utils.hardware import Gpu
from tests.conftest import run_python
from tests.refusals import refuses


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["torch", "ort", "openvino"])
def test_a_child_opens_its_own_and_the_inherited_one_says_so(trained, exported, backend):
    if backend == "openvino":
        pytest.importorskip("openvino", reason="OpenVINO is not installed (pip install openvino)")
    done = run_python("tests/runtime/forking.py", backend, trained if backend == "torch" else exported, PYTHONPATH=".")
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    children = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(children) == 6
    assert [child["code"] for child in children] == [7] * 6, children
    for child in children:
        if "in a child's" in child["name"]:
            assert child["said"] is None
        elif "anew" in child["name"]:
            assert child["said"] is True, child
        else:
            assert len(child["said"]) == 3
            for line in child["said"]:
                assert "fork()" in line
                assert "open it in each process" in line
                assert "\n" not in line


def test_a_gpu_that_a_parent_has_used_is_refused(exported, monkeypatch):
    def gpus():
        return (Gpu("a GPU", "8.9"),)

    monkeypatch.setattr(fork, "nvidia_gpus", gpus)
    monkeypatch.setattr(fork, "_parent_used_gpus", True)
    for device in ("auto", "cuda"):
        with refuses(UserError, "forked", hint="--device cpu"):
            torch_device(device)
        with refuses(UserError, "forked", hint="--device cpu"):
            open_runner(exported, device=device)
    assert torch_device("cpu").type == "cpu"
    assert open_runner(exported, device="cpu").info.device == "cpu"
