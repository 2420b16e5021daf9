"""A disk that fills during a write: one line, what was there stays, nothing half-written is left."""

import pytest

from pmm.export.onnx import export_onnx
from pmm.export.recipe import Verification
from tests.conftest import assert_one_line_error, run_python


@pytest.fixture(scope="module")
def exported(trained, tmp_path_factory):
    out = tmp_path_factory.mktemp("exported") / "model.onnx"
    return export_onnx(trained, out, verification=Verification(no_verify=True)).path


def limited(limit, script, *args, **env):
    """A command of ours that cannot write files longer than `limit` bytes."""
    code = (
        "import resource, runpy, sys\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))\n"
        f"sys.argv = {[script, *map(str, args)]!r}\n"
        f"runpy.run_path({script!r}, run_name='__main__')"
    )
    return run_python("-c", code, PYTHONPATH=".", **env)


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_an_onnx_file_that_does_not_fit(trained, tmp_path, precision):
    out = tmp_path / "out" / "model.onnx"
    out.parent.mkdir()
    out.write_bytes(b"what was there")
    (tmp_path / "tmp").mkdir()
    command = ("export/to_onnx.py", trained, "-o", out, "--precision", precision)
    done = limited(200_000, *command, TMPDIR=str(tmp_path / "tmp"))
    assert_one_line_error(done, "File too large")
    assert [path.name for path in out.parent.iterdir()] == ["model.onnx"]
    assert out.read_bytes() == b"what was there"
    left = {path.name for path in (tmp_path / "tmp").iterdir()}
    assert left <= {".ses"}, "more than ONNX Runtime's own session file"


def test_an_engine_that_does_not_fit(exported, tmp_path):
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed (pip install tensorrt-rtx)")
    out = tmp_path / "model.plan"
    out.write_bytes(b"what was there")
    done = limited(200_000, "export/to_trt.py", exported, "-o", out, "--flavor", "rtx")
    assert_one_line_error(done, f"cannot write {out}: File too large; what was there before is unchanged")
    assert [path.name for path in tmp_path.iterdir()] == ["model.plan"]
    assert out.read_bytes() == b"what was there"


def test_a_model_repository_that_does_not_fit(exported, tmp_path):
    done = limited(200_000, "export/to_triton.py", exported, "--repo", tmp_path / "models")
    assert_one_line_error(done, "File too large")
    assert not list(tmp_path.rglob("*.onnx"))
    assert not list(tmp_path.rglob("config.pbtxt"))
