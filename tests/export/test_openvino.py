"""OpenVINO's IR that takes crops of any size: resized and normalised inside as they would have been before."""

import sys

import numpy as np
import pytest
from PIL import Image

from pmm.data.crops import load_crops
from pmm.data.readers import read_dataset
from pmm.evaluation.parity.numeric import numeric_parity
from pmm.export import openvino as module
from pmm.export.openvino import SETTINGS, export_openvino, with_preprocessing
from pmm.export.options import VerifyOptions
from pmm.export.parity_check import ParityFailed
from pmm.runtime.open import open_runner
from pmm.utils.errors import CannotWrite, InvalidFile, MissingLibrary
from tests.adoption.onnx_graphs import SIZE, foreign
from tests.conftest import run_here
from tests.export.targets import adopted_onnx, contents, with_resize
from tests.refusals import refuses

openvino = pytest.importorskip("openvino", reason="openvino is not installed")
UNVERIFIED = VerifyOptions(no_verify=True)


@pytest.fixture(scope="module")
def crops(people):
    split = read_dataset("synthetic", people)
    return load_crops([sample.path for sample in split.query[:6]], 128, 64)


def resized(crops, height, width):
    return np.stack([np.asarray(Image.fromarray(crop).resize((width, height), Image.BICUBIC)) for crop in crops])


def compiled(path):
    return openvino.Core().compile_model(path, "CPU", SETTINGS)


def test_crops_of_any_size_have_our_embeddings(trained, crops, tmp_path):
    done = run_here("-m", "pmm", "export", "openvino", trained, "-o", tmp_path)
    assert done.returncode == 0, done.stderr
    assert "INFERENCE_PRECISION_HINT" in done.stderr
    model = compiled(tmp_path / "best.xml")
    with open_runner(trained, device="cpu") as reference:
        for height, width, least in ((384, 192, 0.999999), (128, 64, 0.999999), (64, 32, 0.999999), (300, 100, 0.9999)):
            images = resized(crops, height, width)
            expected = reference(load_crops(images, reference.preprocessing))
            assert numeric_parity(expected, model(images)[0]).min_cosine >= least, (height, width)


@pytest.mark.parametrize(
    ("graph", "images"),
    [
        ({}, {}),
        ({"layout": "NHWC"}, {"colour": "bgr", "interpolation": "bicubic"}),
        ({"dtype": "uint8", "layout": "NHWC"}, {}),
        ({}, {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.4), "colour": "bgr"}),
    ],
    ids=["as exports", "NHWC BGR", "uint8", "other statistics"],
)
def test_whatever_an_adopted_file_takes_the_ir_takes_crops(tmp_path, people, graph, images):
    path = adopted_onnx(foreign(tmp_path / "foreign.onnx", **graph), people, **images)
    written = export_openvino(path, tmp_path / "out", verification=UNVERIFIED)
    larger = np.random.default_rng(0).integers(0, 256, (4, 3 * SIZE[0], 3 * SIZE[1], 3), dtype=np.uint8)
    with open_runner(path) as runner:
        expected = runner(load_crops(larger, runner.preprocessing))
    assert numeric_parity(expected, compiled(written.path)(larger)[0]).min_cosine >= 0.99999


@pytest.mark.parametrize(
    "changes",
    [{"padding": (0, 0, 0)}, {"antialias": False}, {"interpolation": "lanczos"}],
    ids=["padded", "OpenCV's", "Lanczos"],
)
def test_resizes_that_openvino_has_not_are_refused_before_anything_is_written(trained, tmp_path, monkeypatch, changes):
    with_resize(monkeypatch, module, **changes)
    with refuses(InvalidFile, path=trained, hint="pmm export onnx"):
        export_openvino(trained, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_an_ir_whose_embeddings_moved_is_not_written(tmp_path, people, monkeypatch):
    path = adopted_onnx(foreign(tmp_path / "foreign.onnx"), people)
    right = with_preprocessing

    def as_bgr(model, manifest):
        import dataclasses

        wrong = dataclasses.replace(manifest.input, colour="bgr")
        return right(model, dataclasses.replace(manifest, input=wrong))

    monkeypatch.setattr(module, "with_preprocessing", as_bgr)
    with refuses(ParityFailed, path=tmp_path / "out" / "adopted.xml"):
        export_openvino(path, tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())
    monkeypatch.setattr(module, "with_preprocessing", right)
    export_openvino(path, tmp_path / "out")
    before = contents(tmp_path / "out")
    monkeypatch.setattr(module, "with_preprocessing", as_bgr)
    with refuses(ParityFailed):
        export_openvino(path, tmp_path / "out")
    assert contents(tmp_path / "out") == before


def test_without_openvino_nothing_is_begun(trained, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "openvino", None)
    with refuses(MissingLibrary, library="openvino", hint="pip install openvino"):
        export_openvino(trained, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_folder_with_the_adopted_file_itself_is_refused(tmp_path, people):
    path = adopted_onnx(foreign(tmp_path / "foreign.onnx"), people)
    with refuses(CannotWrite, path=path):
        export_openvino(path, tmp_path)
