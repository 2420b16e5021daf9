"""How many threads torch, ONNX Runtime and OpenVINO get: as asked for, or as many as a quota of CPU time allows."""

import pytest
import torch

from pmm.runtime import openvino, ort_session, torch_runner
from pmm.runtime.open import open_runner


@pytest.fixture(autouse=True)
def one_core(monkeypatch):
    """A quota of one core."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(torch_runner, "quota_cores", lambda: 1)
    for module in (ort_session, openvino):
        monkeypatch.setattr(module, "compute_threads", lambda: 1)


def test_runners_keep_to_the_quota(trained, exported):
    before = torch.get_num_threads()
    for asked, threads in ((0, 1), (2, 2)):
        with open_runner(trained, device="cpu", threads=asked):
            assert torch.get_num_threads() == threads
        assert torch.get_num_threads() == before
        session = open_runner(exported, device="cpu", threads=asked).session
        assert session.get_session_options().intra_op_num_threads == threads


def test_openvino_keeps_to_the_quota(exported):
    pytest.importorskip("openvino", reason="OpenVINO is not installed (pip install openvino)")
    for asked, threads in ((0, 1), (2, 2)):
        runner = openvino.OpenVinoRunner(exported, asked)
        assert runner._compiled.get_property("INFERENCE_NUM_THREADS") == threads
