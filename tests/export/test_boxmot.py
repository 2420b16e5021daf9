"""What is written for BoxMOT: the sidecars by which it sizes its crops, and files that take what it feeds."""

import json
import sys

import pytest

from pmm.artifacts.onnx_file import read_onnx
from pmm.config import IMAGENET_MEAN, IMAGENET_STD
from pmm.export import boxmot as module
from pmm.export.boxmot import export_boxmot
from pmm.export.options import ExportOptions, VerifyOptions
from pmm.utils.errors import CannotWrite, ConflictingOptions, InvalidFile, MissingLibrary
from tests.adoption.onnx_graphs import SIZE, foreign
from tests.conftest import run_here
from tests.export.targets import adopted_onnx, with_resize
from tests.refusals import refuses

UNVERIFIED = VerifyOptions(no_verify=True)
SIDECAR = {
    "schema_version": 1,
    "model_kwargs_schema_version": 1,
    "model_name": "pmm",
    "model_kwargs": {"img_size": [128, 64]},
    "img_size": [128, 64],
    "preprocess": "resize",
}


def test_the_command_writes_the_file_and_what_boxmot_reads_beside_it(trained, tmp_path):
    words = ("export", "boxmot", trained, "-o", tmp_path / "new", "--openvino", "--no-verify")
    done = run_here("-m", "pmm", *words)
    assert done.returncode == 0, done.stderr
    assert "OpenCV's bilinear" in done.stderr
    folder = tmp_path / "new" / "best_openvino_model"
    sidecars = (
        tmp_path / "new" / "best.onnx.metadata.json",  # boxmot.reid.core.artifacts.artifact_metadata_path
        folder / "manifest.json",
        folder / "best.xml.metadata.json",
    )
    for path in sidecars:
        assert json.loads(path.read_text()) == SIDECAR
    assert {path.suffix for path in folder.iterdir()} == {".xml", ".bin", ".json"}
    assert read_onnx(tmp_path / "new" / "best.onnx").manifest.input == ExportOptions(input="float").contract


@pytest.mark.slow
def test_other_statistics_are_converted_in_the_graph(trained, tmp_path, monkeypatch):
    with_resize(monkeypatch, module, mean=(0.5, 0.5, 0.5))
    model = export_boxmot(trained, tmp_path / "model.onnx", verification=UNVERIFIED)
    size = model.artifact.manifest.preprocessing
    assert (size.mean, size.std) == (IMAGENET_MEAN, IMAGENET_STD)
    assert model.files == (tmp_path / "model.onnx",)


def test_an_adopted_file_that_takes_what_boxmot_feeds(tmp_path, people):
    path = adopted_onnx(foreign(tmp_path / "foreign.onnx", names=("images", "features")), people)
    model = export_boxmot(path, tmp_path / "out", verification=UNVERIFIED)
    sidecar = json.loads((tmp_path / "out" / "adopted.onnx.metadata.json").read_text())
    assert sidecar["img_size"] == list(SIZE)
    assert model.artifact.manifest.input.normalised_by == "caller"
    with refuses(ConflictingOptions, options=("--flip-tta",)):
        export_boxmot(path, tmp_path / "new", flip_tta=True)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("graph", "images", "fact"),
    [
        ({"names": ("images", "y"), "layout": "NHWC"}, {}, "NHWC"),
        ({"names": ("x", "y")}, {}, "x: float32"),
        ({"names": ("images", "y")}, {"colour": "bgr"}, "BGR"),
        ({"names": ("images", "y")}, {"mean": (0.5, 0.5, 0.5), "std": (0.2, 0.2, 0.2)}, "0.5"),
    ],
    ids=["layout", "name", "colour", "statistics"],
)
def test_adopted_files_that_take_something_else_are_refused(tmp_path, people, graph, images, fact):
    path = adopted_onnx(foreign(tmp_path / "foreign.onnx", **graph), people, **images)
    with refuses(InvalidFile, fact, path=path, expected="ImageNet"):
        export_boxmot(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_padded_crops_are_refused_before_anything_is_written(trained, tmp_path, monkeypatch):
    with_resize(monkeypatch, module, padding=(0, 0, 0))
    with refuses(InvalidFile, "padded", path=trained):
        export_boxmot(trained, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_without_openvino_nothing_is_begun(trained, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "openvino", None)
    with refuses(MissingLibrary, library="openvino", hint="pip install openvino"):
        export_boxmot(trained, tmp_path / "out", openvino=True)
    assert not list(tmp_path.iterdir())


def test_a_name_that_is_the_checkpoints_is_refused(tmp_path, people):
    path = adopted_onnx(foreign(tmp_path / "foreign.onnx"), people)
    with refuses(CannotWrite, path=path):
        export_boxmot(path, path)
