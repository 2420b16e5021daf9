import json
from pathlib import Path

import pytest

from pmm.errors import UserError
from pmm.export import trt as module
from pmm.export.onnx import export_onnx
from pmm.export.trt import BatchProfile, build_engine, choose_flavor
from pmm.files import sha256
from pmm.manifest import manifest_path, read_manifest
from tests.conftest import assert_one_line_error, run_here


def test_the_engine_is_built_and_its_manifest_written(trained, tmp_path):
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed (pip install tensorrt-rtx)")
    done = run_here("export/to_trt.py", trained, "-o", tmp_path / "model.plan", "--batch", "1", "4", "16")
    assert done.returncode == 0, done.stderr
    engine = tmp_path / "model.plan"
    assert engine.stat().st_size > 100_000
    manifest = read_manifest(engine, sha256(engine))
    assert manifest.engine["batch"] == {"least": 1, "best": 4, "most": 16}
    assert manifest.engine["onnx_sha256"] == sha256(tmp_path / "model.onnx")
    assert manifest.engine["flavor"] in ("rtx", "tensorrt")
    assert manifest.checkpoint_sha256 == sha256(trained)
    assert manifest.parity is None
    assert "fp32" in done.stdout


def test_without_a_builder_it_says_what_to_install_and_where_the_onnx_file_is(trained, tmp_path, monkeypatch):
    def missing(name):
        raise ImportError(name)

    artifact = export_onnx(trained, tmp_path / "model.onnx", verify=False)
    monkeypatch.setattr(module.importlib, "import_module", missing)
    with pytest.raises(UserError, match=r"pip install tensorrt-rtx .*; the ONNX file is .*model\.onnx"):
        build_engine(artifact.path, tmp_path / "model.plan")
    assert not (tmp_path / "model.plan").exists()


def test_tensorrt_is_preferred_where_there_is_a_gpu(monkeypatch):
    monkeypatch.setattr(module.importlib, "import_module", lambda name: name)
    monkeypatch.setattr(module, "nvidia_gpus", lambda: ("a GPU",))
    assert choose_flavor(Path("x.onnx")) == ("tensorrt", "tensorrt")
    monkeypatch.setattr(module, "nvidia_gpus", tuple)
    assert choose_flavor(Path("x.onnx")) == ("rtx", "tensorrt_rtx")


@pytest.mark.parametrize("batch", [("0", "1", "2"), ("4", "2", "8"), ("1", "9", "8")])
def test_impossible_batch_profiles(trained, tmp_path, batch):
    done = run_here("export/to_trt.py", trained, "-o", tmp_path / "model.plan", "--batch", *batch)
    assert_one_line_error(done, f"batch profile {' '.join(batch)}", "expected 1 <= least <= best <= most")
    assert not list(tmp_path.iterdir())


def test_files_that_are_not_ours(trained, tmp_path):
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed (pip install tensorrt-rtx)")
    (tmp_path / "x.onnx").write_bytes(b"no model")
    with pytest.raises(UserError, match="no manifest beside it"):
        build_engine(tmp_path / "x.onnx", tmp_path / "x.plan")
    artifact = export_onnx(trained, tmp_path / "model.onnx", verify=False)
    (tmp_path / "x.onnx").write_bytes(b"no model")
    text = json.loads(artifact.manifest.to_json())
    text["sha256"] = sha256(tmp_path / "x.onnx")
    manifest_path(tmp_path / "x.onnx").write_text(json.dumps(text))
    with pytest.raises(UserError, match=r"x\.onnx: (rtx|tensorrt) .* does not parse it") as error:
        build_engine(tmp_path / "x.onnx", tmp_path / "x.plan")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "x.plan").exists()


def test_a_root_to_verify_on_is_not_answered_with_an_older_verification(trained, tmp_path):
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed (pip install tensorrt-rtx)")
    export_onnx(trained, tmp_path / "model.onnx")
    done = run_here("export/to_trt.py", trained, "-o", tmp_path / "model.plan", "--verify-root", tmp_path / "none")
    assert_one_line_error(done, "no crops to verify on")
    assert not (tmp_path / "model.plan").exists()


def test_profile_defaults_hold():
    assert BatchProfile() == BatchProfile(least=1, best=8, most=64)
