"""What the tests of exports share, beside tests/conftest.py."""

from __future__ import annotations

import hashlib
import sys

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


@pytest.fixture
def machine(monkeypatch, tmp_path_factory):
    """A machine with GPUs and one version of TensorRT, or TensorRT-RTX: its world, where what is opened on the GPUs is
    counted, and the flavor."""
    from pmm.runtime import driver, trt_variant
    from pmm.runtime import trt as runtime
    from pmm.utils import hardware
    from tests.export.whole import GPU, Whole
    from tests.runtime.standin import HostDevice, World

    def of(version, gpus=(GPU,), **kind):
        world, opened = World(), []
        world.opened = opened
        module, flavor = Whole(version, world, **kind), "rtx" if "rtx" in version else "tensorrt"
        monkeypatch.setitem(sys.modules, trt_variant.FLAVORS[flavor], module)
        for each in (hardware, trt_variant):
            monkeypatch.setattr(each, "nvidia_gpus", lambda: gpus)
        monkeypatch.setattr(runtime, "open_device", lambda index: opened.append(index) or HostDevice(world, index))
        monkeypatch.setattr(driver, "cuda_library", lambda: module.driver)
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        return world, flavor

    return of


@pytest.fixture(scope="session")
def parity_check(trained, people):
    """The checkpoint's embeddings of some crops."""
    from pmm.data.crops import load_crops
    from pmm.data.readers import read_dataset
    from pmm.export.parity_check import ParityCheck
    from pmm.runtime.open import open_runner

    split = read_dataset("synthetic", people)
    crops = load_crops([sample.path for sample in split.query[::9]], 128, 64)
    with open_runner(trained) as runner:
        return ParityCheck(crops, runner(crops))


@pytest.fixture(scope="module")
def brittle(trained, tmp_path_factory):
    """The same function in fp32, but one channel between two convolutions is a thousand times the others: in 8 bits
    those others are lost. (ReLU lets a positive factor through.)"""
    import torch

    from pmm.artifacts import checkpoint

    state = checkpoint.load(trained)
    weights = state["model"]
    name = next(
        key.removesuffix(".conv1.weight") for key in weights if "layer3" in key and key.endswith("conv1.weight")
    )
    norm = f"{name}.bn1"
    loudest = int(weights[f"{norm}.weight"].abs().argmax())
    for key in (f"{norm}.weight", f"{norm}.bias"):
        weights[key][loudest] *= 1000
    weights[f"{name}.conv2.weight"][:, loudest] /= 1000
    path = tmp_path_factory.mktemp("brittle") / "model.pth"
    torch.save(state, path)
    return path, name.removeprefix("backbone.")
