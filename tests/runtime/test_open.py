"""open_runner: the backend that fits a file, by whatever name it goes, or one line that says which would."""

import shutil
import sys

import numpy as np
import pytest
import torch

from pmm.artifacts.artifact import manifest_path
from pmm.bench.candidates import Candidate
from pmm.data.crops import load_crops
from pmm.runtime.aoti import AotiRunner
from pmm.runtime.eager import EagerRunner
from pmm.runtime.open import BACKEND_HELP, BACKENDS, ONNXRUNTIME, RunOptions, backends_for, open_runner
from pmm.runtime.openvino import OpenVinoRunner
from pmm.runtime.ort import OrtRunner
from pmm.runtime.torch_graph import GraphRunner
from pmm.runtime.trt import TrtRunner
from pmm.utils.errors import BackendUnavailable, ConflictingOptions, InvalidFile, InvalidValue, MissingLibrary
from pmm.utils.hardware import nvidia_gpus
from tests.export.test_triton import make_engine
from tests.refusals import refuses


@pytest.fixture(scope="module")
def crops(people):
    return load_crops(sorted((people / "query").glob("*.jpg"))[:5], 128, 64)


class Asked(Exception):
    pass


@pytest.fixture
def ask(monkeypatch):
    """open_runner, up to the runner: its class, and what that is constructed with after the file (or the graph)."""

    def record(kind, first):
        def init(self, *args, **options):
            raise Asked(kind, args[first:], options)

        monkeypatch.setattr(kind, "__init__", init)

    for kind in (AotiRunner, OrtRunner, OpenVinoRunner, TrtRunner):
        record(kind, 1)
    for kind in (EagerRunner, GraphRunner):
        record(kind, 2)

    def ask(*args, **options):
        with pytest.raises(Asked) as asked:
            open_runner(*args, **options)
        return asked.value.args

    return ask


def test_the_same_embeddings_from_every_backend_and_every_name(trained, exported, crops, tmp_path):
    with open_runner(trained, device="cpu") as runner:
        expected = runner(crops)
        assert runner.info.backend == "torch"
    checkpoint = shutil.copy(trained, tmp_path / "model.pt")
    onnx = shutil.copy(exported, tmp_path / "model")
    shutil.copy(manifest_path(exported), manifest_path(onnx))
    for path, backend, name in (
        (checkpoint, "auto", "torch"),
        (checkpoint, "torch", "torch"),
        (onnx, "auto", "ort-cpu"),
        (onnx, "onnxruntime", "ort-cpu"),
        (onnx, "ort-cpu", "ort-cpu"),
        (onnx, "openvino", "openvino"),
    ):
        if name == "openvino":
            pytest.importorskip("openvino")
        with open_runner(path, backend, device="cpu") as runner:
            assert runner.info.backend == name
            np.testing.assert_allclose(runner(crops), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_compiled_torch_is_opened_from_a_checkpoint(trained, crops):
    with open_runner(trained, "torch-compile", device="cpu") as runner, open_runner(trained, device="cpu") as plain:
        assert (runner.info.backend, runner.info.precision) == ("torch-compile", "fp32")
        assert runner.embedding == plain.embedding
        np.testing.assert_allclose(runner(crops[:1]), plain(crops[:1]), rtol=1e-4, atol=1e-4)


def test_a_precision_is_what_runs_or_refused(trained, exported, crops):
    with open_runner(trained, device="cpu", precision="bf16") as runner:
        assert runner.info.precision == "bf16"
        assert np.isfinite(runner(crops)).all()
    for path, precision, kind, facts in (
        (trained, "int8", InvalidValue, ("'int8'", "bf16, fp16, fp32 or tf32")),
        (exported, "fp16", InvalidFile, (exported, "onnxruntime", "in fp32", "expected fp16")),
        (exported, "tf32", BackendUnavailable, (exported, "CPU", "TF32")),
    ):
        with refuses(kind, *facts):
            open_runner(path, device="cpu", precision=precision)


def test_what_is_asked_for_reaches_the_runner(trained, exported, tmp_path, ask):
    engine, package = tmp_path / "m.plan", tmp_path / "m.pt2"
    engine.write_bytes(b"ptrt")
    package.write_bytes(b"PK\x03\x04")
    plain = {"tf32": False, "cuda_graph": False, "warn": True}
    assert ask(exported, device="cuda:1", threads=3) == (OrtRunner, ("cuda:1", 3), plain)
    assert ask(exported, "onnxruntime") == (OrtRunner, ("auto", 0), plain)
    assert ask(exported, "ort-cpu") == (OrtRunner, ("cpu", 0), plain)
    fast = {"tf32": True, "cuda_graph": True, "warn": True}
    assert ask(exported, "ort-cuda", precision="tf32", cuda_graph=True) == (OrtRunner, ("cuda", 0), fast)
    assert ask(exported, "openvino", threads=2, precision="bf16") == (
        OpenVinoRunner,
        (2,),
        {"precision": "bf16", "warn": True},
    )
    graphs = {"cuda_graph": True, "eager": False, "warn": True}
    assert ask(engine, device="cuda:2") == (TrtRunner, ("cuda:2",), graphs)
    assert ask(engine, cuda_graph=False) == (TrtRunner, ("auto",), {**graphs, "cuda_graph": False})
    assert ask(package, "aoti", device="cpu", threads=4) == (
        AotiRunner,
        ("cpu", 4),
        {"cuda_graph": False, "warn": True},
    )
    cpu = torch.device("cpu")
    assert ask(trained, device="cpu", threads=2) == (EagerRunner, (cpu, 2), {"tf32": False})
    compiled = {"compiled": True, "cuda_graph": False}
    assert ask(trained, "torch-compile", device="cpu", threads=2) == (GraphRunner, (cpu, "fp32", 2), compiled)
    assert ask(trained, device="cpu", precision="bf16") == (
        GraphRunner,
        (cpu, "bf16", 0),
        {**compiled, "compiled": False},
    )


def test_a_wrong_backend_names_those_that_would_do(trained, exported, tmp_path):
    package = tmp_path / "m.pt2"
    package.write_bytes(b"PK\x03\x04")
    for path, backend, texts in (
        (trained, "onnxruntime", ("a checkpoint", "torch or torch-compile")),
        (trained, "openvino", ("a checkpoint", "torch or torch-compile")),
        (exported, "torch", ("an ONNX file", "ort-cpu, ort-cuda or openvino")),
        (exported, "tensorrt", ("an ONNX file", "ort-cpu, ort-cuda or openvino")),
        (package, "torch", ("an AOTInductor package", "--backend aoti")),
    ):
        with refuses(InvalidFile, backend, *texts, path=path):
            open_runner(path, backend)
    with refuses(InvalidValue, name="backend", value="onnx", choices=("auto", "onnxruntime", *BACKENDS)):
        open_runner(exported, "onnx")


def test_a_backend_on_a_device_that_it_does_not_have(exported, tmp_path):
    for backend, device, others in (
        ("openvino", "cuda", "ort-cuda"),
        ("ort-cpu", "cuda:1", "ort-cuda"),
        ("ort-cuda", "cpu", "ort-cpu or openvino"),
    ):
        with refuses(ConflictingOptions, f"{backend} ", f"--device {device}", hint=f"--backend {others} "):
            open_runner(exported, backend, device=device)


def test_an_engine_of_the_other_library(tmp_path):
    engine = make_engine(tmp_path / "m.plan")
    with refuses(InvalidFile, "an engine of tensorrt,", "tensorrt-rtx", path=engine, hint="--backend tensorrt"):
        open_runner(engine, "tensorrt-rtx")
    if not nvidia_gpus():
        for backend in ("auto", "tensorrt"):
            with refuses(BackendUnavailable, "NVIDIA", path=engine):
                open_runner(engine, backend)


def test_files_that_nothing_runs(tmp_path):
    np.savez(tmp_path / "index.npz", a=np.zeros(2))
    with refuses(InvalidFile, "index", path=tmp_path / "index.npz", expected="a checkpoint, an ONNX file"):
        open_runner(tmp_path / "index.npz")
    torch.save(torch.nn.Linear(2, 2).state_dict(), tmp_path / "theirs.pt")
    with refuses(InvalidFile, "checkpoint", "weight, bias", path=tmp_path / "theirs.pt"):
        open_runner(tmp_path / "theirs.pt")


def test_a_library_that_is_missing_is_named_with_its_install_command(trained, exported, monkeypatch):
    monkeypatch.setitem(sys.modules, "openvino", None)
    with refuses(MissingLibrary, library="openvino", hint="pip install openvino"):
        open_runner(exported, "openvino")
    for name in ("torch", "onnxruntime"):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, name, None)
            with refuses(MissingLibrary, library=name, hint=f"pip install {name}"):
                open_runner(trained if name == "torch" else exported)
    for backend in BACKENDS.values():
        monkeypatch.setitem(sys.modules, backend.library, None)
        with refuses(MissingLibrary, library=backend.library, hint="pip install "):
            backend.load_library()


def test_one_table_serves_the_help_the_bench_and_opening():
    for name, backend in BACKENDS.items():
        assert name in BACKEND_HELP
        device = next(iter(backend.precisions))
        candidate = Candidate(backend=name, precision=backend.precisions[device][0], device=device)
        assert candidate.file_kind == backend.file_kind
        assert name in backends_for(backend.file_kind)
    assert ONNXRUNTIME in BACKEND_HELP
    assert RunOptions().device == "auto"


@pytest.mark.parametrize("threads", [-1, 1025, 10**7])
def test_threads_that_no_machine_has_use_for(exported, threads):
    with refuses(InvalidValue, "1024", name="threads", value=threads):
        open_runner(exported, threads=threads)
