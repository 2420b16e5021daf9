"""What the tests of exports share, beside tests/conftest.py."""

from __future__ import annotations

import hashlib

import pytest

_TRACED: dict[str, bytes] = {}


@pytest.fixture
def traced_once(monkeypatch):
    """An export that is traced again, in this process, gets what torch made of the same graph before: for tests of all
    that comes after the trace. Most of an export's time is torch's."""
    import onnx
    import torch

    from pmm.export import graph as module

    trace = module.to_onnx

    def to_onnx(graph, preprocessing, input, opset):
        name = repr((str(graph), graph.dtype, graph.embedding, type(graph).forward, preprocessing, input, opset))
        digest = hashlib.sha256(name.encode())
        for key, value in graph.state_dict().items():
            digest.update(f"{key} {value.dtype} {tuple(value.shape)}".encode())
            digest.update(value.flatten().view(torch.uint8).numpy().tobytes())
        key = digest.hexdigest()
        if key not in _TRACED:
            _TRACED[key] = trace(graph, preprocessing, input, opset).SerializeToString()
        return onnx.ModelProto.FromString(_TRACED[key])

    monkeypatch.setattr(module, "to_onnx", to_onnx)
