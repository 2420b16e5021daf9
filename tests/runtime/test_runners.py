import dataclasses
import json
import logging
import re
import shutil

import numpy as np
import pytest

from pmm.artifacts.artifact import Artifact, manifest_path
from pmm.artifacts.checkpoint import load
from pmm.artifacts.onnx_file import read_onnx
from pmm.artifacts.trained_model import load_model
from pmm.data.crops import load_crops
from pmm.data.preprocessing import preprocessing_of
from pmm.data.readers import read_dataset
from pmm.embedding.embed import embed_samples
from pmm.evaluation.parity.numeric import numeric_parity
from pmm.evaluation.ranking import rank_split
from pmm.export.options import MIN_COSINE, ExportOptions, VerifyOptions
from pmm.runtime import ort_session
from pmm.runtime.open import open_runner
from pmm.runtime.trt_variant import FLAVORS
from pmm.utils import cuda_versions, hardware
from pmm.utils.errors import BackendUnavailable, InvalidFile, InvalidInput, InvalidValue, UserError
from pmm.utils.hardware import RTX_CAPABILITIES, Gpu, nvidia_gpus
from tests.refusals import refuses


@pytest.fixture(scope="module")
def artifact(exported):
    return Artifact(exported, read_onnx(exported).manifest)


@pytest.fixture(scope="module")
def crops(people):
    return load_crops([s.path for s in read_dataset("synthetic", people).query[:10]], 128, 64)


def test_the_eager_runner_is_the_checkpoint(trained, crops):
    import torch

    from pmm.config import Config

    preprocessing = preprocessing_of(Config.from_dict(load(trained)["config"]))
    with torch.inference_mode():
        expected = load_model(trained)(torch.from_numpy(preprocessing.normalise(crops))).numpy()
    with open_runner(trained) as runner:
        found = runner(crops)
        assert (runner.info.backend, runner.info.device, runner.info.precision) == ("torch", "cpu", "fp32")
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("batch", [1, 2, 3, 7, 10])
def test_onnx_runtime_gives_the_same_for_every_batch(trained, artifact, crops, batch):
    with open_runner(trained) as reference, open_runner(artifact.path) as runner:
        assert runner.info.backend == "ort-cpu"
        assert "CPUExecutionProvider" in runner.info.provider
        np.testing.assert_allclose(runner(crops[:batch]), reference(crops[:batch]), rtol=1e-4, atol=1e-4)


def test_bound_steps_run_and_do_not_change_the_answer(trained, artifact, crops):
    for path in (trained, artifact.path):
        with open_runner(path) as runner:
            before = runner(crops)
            step = runner.bind(crops[:4])
            step()
            step()
            assert np.array_equal(runner(crops), before)


def test_embeddings_of_files_in_order(trained, people):
    split = read_dataset("synthetic", people)
    with open_runner(trained) as runner:
        query = embed_samples(runner, split.query, batch_size=7)
        gallery = embed_samples(runner, split.gallery, batch_size=50)
        one = embed_samples(runner, split.query[5:6])
    np.testing.assert_allclose(one[0], query[5], rtol=1e-4, atol=1e-4)
    assert 0 < rank_split(split, query, gallery).mAP <= 1


@pytest.mark.parametrize(
    "images",
    [np.zeros((2, 64, 128, 3), np.uint8), np.zeros((2, 3, 128, 64), np.uint8), np.zeros((2, 128, 64, 3), np.float32)],
)
def test_wrong_crops_are_refused(trained, artifact, images):
    for path in (trained, artifact.path):
        with open_runner(path) as runner, refuses(InvalidInput, expected="uint8 [B, 128, 64, 3]"):
            runner(images)


def test_a_copied_file_keeps_its_contract(artifact, tmp_path, crops):
    shutil.copyfile(artifact.path, tmp_path / "alone.onnx")
    with open_runner(tmp_path / "alone.onnx") as runner:
        assert runner.preprocessing == artifact.manifest.preprocessing


def test_a_changed_file_is_refused(artifact, tmp_path):
    for path in (artifact.path, artifact.path.with_name("model.onnx.json")):
        shutil.copyfile(path, tmp_path / path.name)
    content = bytearray((tmp_path / "model.onnx").read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / "model.onnx").write_bytes(content)
    with refuses(InvalidFile, "sha256", path=tmp_path / "model.onnx"):
        open_runner(tmp_path / "model.onnx")


def test_foreign_files_are_refused(artifact, tmp_path):
    import onnx

    (tmp_path / "bad.onnx").write_bytes(b"not onnx")
    with refuses(InvalidFile, "ONNX", path=tmp_path / "bad.onnx"):
        open_runner(tmp_path / "bad.onnx")
    model = onnx.load(artifact.path)
    del model.metadata_props[:]
    onnx.save(model, tmp_path / "foreign.onnx")
    with refuses(InvalidFile, "without a manifest", path=tmp_path / "foreign.onnx"):
        open_runner(tmp_path / "foreign.onnx")
    shutil.copyfile(artifact.path, tmp_path / "model.onnx")
    (tmp_path / "model.onnx.json").write_text(json.dumps({"format": "other"}))
    with refuses(InvalidFile, "'other'", path=tmp_path / "model.onnx.json"):
        open_runner(tmp_path / "model.onnx")
    (tmp_path / "model.onnx.json").write_text("{")
    with refuses(InvalidFile, "manifest", path=tmp_path / "model.onnx.json"):
        open_runner(tmp_path / "model.onnx")
    (tmp_path / "model.xyz").write_bytes(b"not onnx")
    with refuses(InvalidFile, ".pth", ".onnx", ".plan", path=tmp_path / "model.xyz"):
        open_runner(tmp_path / "model.xyz")
    with refuses(InvalidFile, "not exist", path=tmp_path / "missing.onnx"):
        open_runner(tmp_path / "missing.onnx")


def test_threads_are_given_back(trained):
    import torch

    before = torch.get_num_threads()
    with open_runner(trained, threads=before + 1):
        assert torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before


def test_devices_are_resolved_or_refused(artifact):
    with refuses(InvalidValue, value="gpu", expected="auto, cpu, cuda"):
        open_runner(artifact.path, device="gpu")
    if not nvidia_gpus():
        assert open_runner(artifact.path, device="auto").info.device == "cpu"


def test_a_manifest_of_another_size_is_refused(artifact, tmp_path):
    shutil.copyfile(artifact.path, tmp_path / "model.onnx")
    text = json.loads(artifact.path.with_name("model.onnx.json").read_text())
    text["preprocessing"]["height"] = 256
    (tmp_path / "model.onnx.json").write_text(json.dumps(text))
    with refuses(InvalidFile, "preprocessing", "height=256", "changed", path=tmp_path / "model.onnx"):
        open_runner(tmp_path / "model.onnx")
    taller = dataclasses.replace(artifact.manifest.preprocessing, height=256)
    with open_runner(artifact.path) as runner, refuses(InvalidFile, path="x", expected="256"):
        ort_session.check_interface(runner.session, dataclasses.replace(artifact.manifest, preprocessing=taller), "x")


@pytest.mark.parametrize(("name", "key", "value"), [("input", "colour", "bgr"), ("embedding", "metric", "cosine")])
def test_a_manifest_that_was_edited_is_found_out(artifact, tmp_path, name, key, value):
    shutil.copyfile(artifact.path, tmp_path / "model.onnx")
    text = json.loads(artifact.path.with_name("model.onnx.json").read_text())
    text[name][key] = value
    (tmp_path / "model.onnx.json").write_text(json.dumps(text))
    with refuses(InvalidFile, f"{name} ", "changed", path=tmp_path / "model.onnx"):
        open_runner(tmp_path / "model.onnx")


def test_a_link_to_a_file_has_its_manifest_and_a_bare_copy_says_what_it_lacks(artifact, tmp_path, caplog):
    (tmp_path / "current.onnx").symlink_to(artifact.path)
    shutil.copyfile(artifact.path, tmp_path / "copy.onnx")
    with caplog.at_level(logging.WARNING, "pmm"):
        assert open_runner(tmp_path / "current.onnx").manifest == artifact.manifest
        assert "current.onnx" not in caplog.text
        open_runner(tmp_path / "copy.onnx")
    assert "copy.onnx: no manifest beside it, only the copy inside" in caplog.text


def sees(monkeypatch, *gpus):
    for module in (ort_session, hardware):
        monkeypatch.setattr(module, "nvidia_gpus", lambda: gpus)


def test_cuda_is_used_or_refused_but_never_quietly_replaced(artifact, monkeypatch):
    import onnxruntime

    if nvidia_gpus() and "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        assert open_runner(artifact.path, device="cuda").info.backend == "ort-cuda"
        return
    with refuses(BackendUnavailable, "--device cuda:", "no NVIDIA GPU"):
        open_runner(artifact.path, device="cuda")
    # a GPU that the driver sees but ONNX Runtime cannot use: it would go on with the CPU, with a warning in a log
    sees(monkeypatch, Gpu("a GPU", "8.9"))
    with pytest.raises(UserError, match=r"fell back to CPUExecutionProvider|cannot load it"):
        open_runner(artifact.path, device="cuda")


class Session:
    """A session that names CUDA first, and says where its operators really run."""

    def __init__(self, *placed):
        nodes = lambda kinds: [type("Node", (), {"op_type": kind}) for kind in kinds]  # noqa: E731
        self.parts = [
            type("Part", (), {"ep_name": name, "get_nodes": lambda self, kinds=kinds: nodes(kinds)})()
            for name, kinds in placed
        ]

    def get_providers(self):
        return ["CUDAExecutionProvider", "CPUExecutionProvider"]

    def get_provider_graph_assignment_info(self):
        return self.parts


@pytest.mark.skipif(bool(nvidia_gpus()), reason="needs a machine whose driver is missing")
def test_a_provider_that_does_not_load_is_said_with_the_loaders_reason(artifact, monkeypatch, caplog):
    """ONNX Runtime itself, told of a GPU: it finds its CUDA libraries in the nvidia packages, without torch's help, and
    misses the driver alone."""
    sees(monkeypatch, Gpu("NVIDIA Standin A1", "8.0"))
    facts = ("CPUExecutionProvider", "libcuda.so.1", "CUDA 13", "onnxruntime-gpu[cuda,cudnn]")
    with refuses(UserError, *facts, path=artifact.path, expected="CUDAExecutionProvider"):
        open_runner(artifact.path, device="cuda")
    with caplog.at_level(logging.WARNING, "pmm"), open_runner(artifact.path) as runner:
        assert runner.info.backend == "ort-cpu"
    assert "runs on the CPU" in caplog.text
    assert "libcuda.so.1" in caplog.text


@pytest.mark.parametrize(
    ("missing", "driver", "torch", "mend"),
    [
        # what the system's loader says: github.com/microsoft/onnxruntime issues 25609 and 21684
        ("libcudnn.so.9", "13.0", "13.0", "pip install nvidia-cudnn-cu13"),
        ("libcublasLt.so.13", "13.0", "12.8", 'pip install "onnxruntime-gpu[cuda,cudnn]>=1.23,<1.27"'),
        ("libcublasLt.so.13", "12.4", "12.8", "update the NVIDIA driver to 580 or later, or pip install"),
        ("libcublasLt.so.13", "13.0", "13.0", 'pip install "onnxruntime-gpu[cuda,cudnn]"'),
    ],
)
def test_what_a_provider_that_does_not_load_needs(monkeypatch, missing, driver, torch, mend):
    built = cuda_versions.GpuLibrary
    installed = [built("torch", "2.11.0", torch), built("onnxruntime-gpu", "1.31.1", "13.0")]
    monkeypatch.setattr(cuda_versions, "gpu_libraries", lambda: installed)
    for module in (cuda_versions, ort_session):
        monkeypatch.setattr(module, "driver_version", lambda: driver)

    def load(path):
        raise OSError(f"{missing}: cannot open shared object file: No such file or directory")

    monkeypatch.setattr(ort_session.ctypes, "CDLL", load)
    fallen = type("Fallen", (), {"get_providers": lambda self: ["CPUExecutionProvider"]})()
    with refuses(
        UserError, "fell back", missing, "built for CUDA 13.0", f"serves CUDA {driver}", path="x.onnx", hint=mend
    ):
        ort_session.verify_provider(fallen, "cuda:1", "x.onnx")


def test_a_file_for_cpus_runs_on_one_beside_a_gpu(shared, monkeypatch):
    """On a GPU ONNX Runtime would compute it in fp32."""
    monkeypatch.setattr(ort_session, "nvidia_gpus", lambda: (Gpu("NVIDIA Standin A1", "8.0"),))
    with open_runner(shared.onnx(ExportOptions(precision="int8", target="cpu"))) as runner:
        assert (runner.info.backend, runner.info.precision) == ("ort-cpu", "int8")


def test_the_strongest_evidence_of_the_provider_is_asked_for():
    cuda, cpu = "CUDAExecutionProvider", "CPUExecutionProvider"
    # shapes are computed on the CPU by design
    assert (
        ort_session.verify_provider(Session((cuda, ["Conv", "Relu"]), (cpu, ["Shape"])), "cuda", "x")
        == f"{cuda} (2 of 3 operators)"
    )
    with refuses(UserError, "2 on CPUExecutionProvider", path="x", expected=cuda):
        ort_session.verify_provider(Session((cuda, ["Conv", "Gemm"]), (cpu, ["Conv", "MatMul"])), "cuda", "x")
    old = type("Old", (), {"get_providers": lambda self: [cpu]})()  # before 1.24: only the weaker evidence
    assert ort_session.verify_provider(old, "cpu", "x") == cpu
    with refuses(UserError, "fell back to CPUExecutionProvider", path="x", expected=cuda):
        ort_session.verify_provider(old, "cuda", "x")


def test_the_runner_says_how_many_operators_run_where(artifact):
    with open_runner(artifact.path) as runner:
        assert re.fullmatch(r"onnxruntime \S+ CPUExecutionProvider \((\d+) of \1 operators\)", runner.info.provider)


def test_both_wheels_of_onnx_runtime_are_refused(artifact, monkeypatch):
    monkeypatch.setattr(hardware, "installed_version", lambda name: "1.0")
    with refuses(BackendUnavailable, "onnxruntime and onnxruntime-gpu", "pip uninstall"):
        open_runner(artifact.path)
    monkeypatch.undo()
    assert hardware.installed_version("numpy")
    assert not hardware.installed_version("no-such-distribution")


def test_an_unverified_file_is_said_to_be_one(artifact, tmp_path, caplog):
    unverified = tmp_path / "unverified.onnx"
    shutil.copyfile(artifact.path, unverified)
    manifest_path(unverified).write_text(dataclasses.replace(artifact.manifest, parity=None).to_json())
    with caplog.at_level(logging.WARNING, "pmm"):
        open_runner(artifact.path)
        assert "verified" not in caplog.text
        open_runner(unverified)
    assert "unverified.onnx: its embeddings were never verified against the checkpoint" in caplog.text


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_onnx_runtime_on_a_gpu(trained, shared, crops, precision):
    if "CUDAExecutionProvider" not in pytest.importorskip("onnxruntime").get_available_providers():
        pytest.skip("the ONNX Runtime that is installed is for CPUs: pip install onnxruntime-gpu")
    path = shared.onnx(ExportOptions(precision=precision))
    with open_runner(trained) as reference, open_runner(path, device="cuda") as runner:
        assert runner.info.backend == "ort-cuda"
        assert "CUDAExecutionProvider" in runner.info.provider
        assert numeric_parity(reference(crops), runner(crops)).min_cosine > MIN_COSINE[precision]


@pytest.mark.gpu
@pytest.mark.parametrize("flavor", ["tensorrt", "rtx"])
@pytest.mark.parametrize("precision", ["fp32", "tf32", "fp16", "bf16", "int8"])
def test_an_engine_on_a_gpu(trained, shared, crops, tmp_path, flavor, precision):
    from pmm.export.options import EngineOptions
    from pmm.export.reference import engine_parity_check
    from pmm.export.trt import engine_from_onnx

    pytest.importorskip(FLAVORS[flavor], reason=f"{FLAVORS[flavor]} is not installed")
    if flavor == "rtx" and nvidia_gpus()[0].compute_capability not in RTX_CAPABILITIES:
        pytest.skip(f"TensorRT-RTX does not run on {nvidia_gpus()[0]}")
    tf32 = precision == "tf32"
    if tf32 and not nvidia_gpus()[0].has_tf32:
        pytest.skip(f"{nvidia_gpus()[0]} has no TF32")
    recipe = ExportOptions(precision="fp32" if tf32 else precision)
    file = read_onnx(shared.onnx(recipe))
    parity_check = engine_parity_check(file, trained, VerifyOptions(), flavor)
    engine = engine_from_onnx(
        file, tmp_path / "model.plan", EngineOptions(flavor=flavor, tf32=tf32), parity_check=parity_check
    )
    assert engine.manifest.engine.precision_read_from == "parsed network and engine inspector"
    with open_runner(trained) as reference, open_runner(engine.path, device="cuda") as runner:
        assert runner.info.precision == precision
        assert numeric_parity(reference(crops), runner(crops)).min_cosine > MIN_COSINE[precision]
        step, before = runner.bind(crops[:4]), runner(crops[:4])
        for _ in range(20):
            step.enqueue()
        step.wait()
        assert 0 < step.device_ms() < 1000
        assert all(0 < each < 1000 for each in step.transfers_ms())
        assert np.array_equal(runner(crops[:4]), before)
