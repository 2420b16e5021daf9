"""A disk that fills during a write: one line, what was there stays, nothing half-written is left."""

import resource
import tempfile

import pytest

from tests.conftest import assert_one_line_error, run_here, run_python

LIMIT = 200_000


def limited(script, *args):
    """A command of ours that cannot write files longer than LIMIT bytes: in this process."""
    allowed, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (LIMIT, most))
    try:
        return run_here(script, *args)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (allowed, most))


def limited_alone(script, *args, **env):
    """The same in a process of its own."""
    code = (
        "import resource, runpy, sys\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({LIMIT}, {LIMIT}))\n"
        f"sys.argv = {[script, *map(str, args)]!r}\n"
        f"runpy.run_path({script!r}, run_name='__main__')"
    )
    return run_python("-c", code, PYTHONPATH=".", **env)


@pytest.fixture
def kept(tmp_path):
    """A file to replace, alone in its folder."""
    out = tmp_path / "out" / "model.onnx"
    out.parent.mkdir()
    out.write_bytes(b"what was there")
    return out


@pytest.fixture
def scratch(tmp_path, monkeypatch):
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    return tmp_path / "tmp"


def check(done, kept, scratch):
    assert_one_line_error(done, "File too large")
    assert [path.name for path in kept.parent.iterdir()] == ["model.onnx"]
    assert kept.read_bytes() == b"what was there"
    left = {path.name for path in scratch.iterdir()}
    assert left <= {".ses"}, "more than ONNX Runtime's own session file"


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_an_onnx_file_that_does_not_fit(trained, kept, scratch, precision, traced_once):
    check(limited("export/to_onnx.py", trained, "-o", kept, "--precision", precision), kept, scratch)


@pytest.mark.slow
def test_an_onnx_file_that_does_not_fit_in_a_process_of_its_own(trained, kept, scratch):
    command = ("export/to_onnx.py", trained, "-o", kept, "--precision", "int8")
    check(limited_alone(*command, TMPDIR=str(scratch)), kept, scratch)


def test_an_engine_that_does_not_fit(exported, tmp_path):
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed (pip install tensorrt-rtx)")
    out = tmp_path / "model.plan"
    out.write_bytes(b"what was there")
    done = limited("export/to_trt.py", exported, "-o", out, "--flavor", "rtx")
    assert_one_line_error(done, f"{out}: cannot write: File too large", "unchanged")
    assert {path.name for path in tmp_path.iterdir()} == {"model.plan", "model.plan.log"}
    assert out.read_bytes() == b"what was there"


def test_a_model_repository_that_does_not_fit(exported, tmp_path):
    done = limited("export/to_triton.py", exported, "--repo", tmp_path / "models")
    assert_one_line_error(done, "File too large")
    assert not list(tmp_path.rglob("*.onnx"))
    assert not list(tmp_path.rglob("config.pbtxt"))
