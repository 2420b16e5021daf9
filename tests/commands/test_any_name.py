"""A file is what its content says, under whatever name, in every command; where the two disagree, one line says so."""

import json
import shutil

import pytest

from pmm.artifacts.artifact import manifest_path
from pmm.bench.request import Options, resolve_inputs
from tests.conftest import assert_one_line_error, run_here, run_python


@pytest.fixture(scope="module")
def home(trained, exported, tmp_path_factory):
    """The checkpoint as model.pt and as weights, the ONNX file as served.bin."""
    home = tmp_path_factory.mktemp("names")
    shutil.copy(trained, home / "model.pt")
    shutil.copy(trained, home / "weights")
    shutil.copy(exported, home / "served.bin")
    shutil.copy(manifest_path(exported), home / "served.bin.json")
    return home


def done(*args, **env):
    ended = run_here("-m", "pmm", *args, **env)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


@pytest.mark.parametrize("name", ["model.pt", "weights", "served.bin"])
def test_what_runs_a_model_takes_it(home, people, tmp_path, name):
    gallery, query = tmp_path / "gallery", min((people / "query").glob("*.jpg"))
    done("embed", home / name, people / "query", "-o", gallery, "--device", "cpu")
    for model in ((), ("--model", home / name)):
        listed = done("search", gallery, "--query", query, *model, "--top", "1", "--device", "cpu")
        assert query.name in listed
    done("evaluate", home / name, "--device", "cpu", "--json", tmp_path / "a.json")
    assert json.loads((tmp_path / "a.json").read_text())["backend"] == ("ort-cpu" if "served" in name else "torch")
    kind = json.loads(done("info", home / name, "--json"))["file"]["kind"]
    assert kind == ("ONNX file" if "served" in name else "checkpoint")


def test_what_takes_a_checkpoint_takes_it(home, people, tmp_path):
    done("visualize", home / "model.pt", "--what", "lists", "--crops", "1", "--out", tmp_path, "--device", "cpu")
    assert (tmp_path / "lists.png").exists()
    done("export", "onnx", home / "weights", "-o", tmp_path / "a.onnx", "--no-verify")
    assert (tmp_path / "a.onnx").exists()


def test_what_takes_either_tells_them_apart(home, tmp_path):
    for name in ("model.pt", "weights"):
        ended = run_here("-m", "pmm", "export", "trt", home / name, "--no-manifest", "-o", tmp_path / "a.plan")
        assert_one_line_error(ended, "--no-manifest", "ONNX")
    ended = run_here("-m", "pmm", "export", "trt", home / "served.bin", "--flip-tta", "-o", tmp_path / "a.plan")
    assert_one_line_error(ended, "--flip-tta")
    ended = run_here("-m", "pmm", "export", "trt", home / "served.bin.json", "-o", tmp_path / "a.plan")
    assert_one_line_error(ended, "served.bin.json: neither its content nor its name tells")
    done("export", "triton", home / "served.bin", "--repo", tmp_path / "repo")
    assert (tmp_path / "repo/served/1/model.onnx").exists()
    ended = run_here("-m", "pmm", "export", "triton", home / "weights", "--repo", tmp_path / "repo")
    assert_one_line_error(ended, "weights: it is a checkpoint", "pmm export onnx")
    checkpoint, candidates, _ = resolve_inputs([home / "model.pt", home / "served.bin"], Options())
    assert checkpoint == home / "model.pt"
    assert [candidate.backend for candidate in candidates] == ["torch", "ort-cpu"]


def test_a_name_that_promises_something_else_is_said(home, tmp_path):
    wrong = shutil.copy(home / "served.bin", tmp_path / "model.pth")
    ended = run_python("-m", "pmm", "info", wrong)
    assert ended.returncode == 0
    assert ended.stderr.count("\n") == 1, ended.stderr
    assert "model.pth: its name ends in .pth, but it is an ONNX file" in ended.stderr
