"""What is written for DeepStream's tracker: its keys, and a file that takes pixels as they are."""

import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import pytest

from pmm.artifacts.onnx_file import read_onnx
from pmm.data.crops import load_crops
from pmm.data.readers import read_dataset
from pmm.evaluation.parity.numeric import numeric_parity
from pmm.export import deepstream as module
from pmm.export.deepstream import DeepStreamOptions, export_deepstream, reid_section
from pmm.export.options import ExportOptions, VerifyOptions
from pmm.export.source import open_source
from pmm.export.unnamed_files import check_marked
from pmm.runtime.open import open_runner
from pmm.runtime.ort_session import open_session
from pmm.utils.errors import CannotWrite, InvalidFile, InvalidValue
from tests.adoption.onnx_graphs import foreign
from tests.conftest import ROOT, run_here
from tests.export.targets import adopted_onnx, with_resize
from tests.refusals import refuses

GUIDE = {  # table "Re-ID" of NVIDIA's guide to Gst-nvtracker
    "reidType", "batchSize", "workspaceSize", "reidFeatureSize", "reidHistorySize", "inferDims", "networkMode",
    "inputOrder", "colorFormat", "offsets", "netScaleFactor", "keepAspc", "addFeatureNormalization",
    "outputReidTensor", "onnxFile", "modelEngineFile",
}  # fmt: skip


def keys_of(text):
    """The values by key; JSON is YAML."""
    head, *lines = [line for line in text.splitlines() if not line.startswith("#")]
    assert head == "ReID:"
    return {m[1]: json.loads(m[2]) for m in (re.fullmatch(r"  (\w+): (.*?)  # .*", line) for line in lines) if m}


@pytest.fixture(scope="module")
def out(trained, tmp_path_factory):
    """What the command writes."""
    folder = tmp_path_factory.mktemp("deepstream") / "new" / "ds"
    words = ("export", "deepstream", trained, "-o", folder, "--no-verify", "--install-dir", "/opt/m")
    done = run_here("-m", "pmm", *words)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def manifest(out):
    return read_onnx(out / "best.onnx").manifest


def test_the_section_says_what_the_file_takes_and_gives(manifest):
    keys = keys_of(reid_section(manifest, Path("/opt/mod els/é.onnx"), DeepStreamOptions(batch_size=16)))
    assert set(keys) == GUIDE
    size = manifest.preprocessing
    assert keys["inferDims"] == [3, size.height, size.width]
    assert keys["reidFeatureSize"] == manifest.embedding.dim
    assert (keys["netScaleFactor"], keys["offsets"], keys["keepAspc"]) == (1, [0, 0, 0], 0)
    assert (keys["inputOrder"], keys["colorFormat"]) == (0, 0)  # NCHW, RGB
    assert (keys["batchSize"], keys["reidType"], keys["networkMode"]) == (16, 2, 0)
    assert keys["addFeatureNormalization"] == 1
    assert keys["onnxFile"] == "/opt/mod els/é.onnx"
    assert keys["modelEngineFile"] == "/opt/mod els/é.onnx_b16_gpu0_fp32.engine"


def test_what_the_graph_normalises_is_not_normalised_again(manifest):
    cosine = dataclasses.replace(manifest, embedding=dataclasses.replace(manifest.embedding, normalised=True))
    options = DeepStreamOptions(precision="fp16", tracker="nvdeepsort")
    keys = keys_of(reid_section(cosine, Path("/x.onnx"), options))
    assert (keys["addFeatureNormalization"], keys["networkMode"], keys["reidType"]) == (0, 1, 1)


def test_names_of_any_language_are_yaml(manifest):
    yaml = pytest.importorskip("yaml", reason="PyYAML is not installed")
    section = reid_section(manifest, Path("/opt/\U0001f600 über/a.onnx"), DeepStreamOptions())
    assert yaml.safe_load(section)["ReID"]["onnxFile"] == "/opt/\U0001f600 über/a.onnx"


def test_a_folder_that_yaml_cannot_name_is_refused(trained, tmp_path):
    with refuses(CannotWrite, hint="--install-dir"):
        export_deepstream(trained, tmp_path / "a\u2028b")
    assert not list(tmp_path.iterdir())


def test_the_section_of_the_same_checkpoint_alone_is_replaced(out, trained, tmp_path):
    section, source = tmp_path / "config_tracker_reid.yml", open_source(trained)
    section.write_text((out / "config_tracker_reid.yml").read_text())
    check_marked(section, source)
    with refuses(CannotWrite, path=section, hint="move it away"):
        check_marked(section, dataclasses.replace(source, sha256="0" * 64))


def test_every_key_is_explained_with_its_source():
    page = (ROOT / "docs/deploy.md").read_text()
    assert {key for key in GUIDE if f"`{key}`" in page} == GUIDE


def test_raw_pixels_have_our_embeddings(out, trained, people):
    paths = [sample.path for sample in read_dataset("synthetic", people).query[:12]]
    with open_runner(trained, device="cpu") as reference:
        crops = load_crops(paths, reference.preprocessing)
        expected = reference(crops)
    file = read_onnx(out / "best.onnx")
    raw = crops.transpose(0, 3, 1, 2).astype(np.float32)
    assert raw.max() > 200
    found = open_session(file.content).run(None, {"images": raw})[0]
    assert numeric_parity(expected, found).min_cosine >= 0.9999999


def test_the_command_writes_both_files(out, manifest):
    assert {"best.onnx", "best.onnx.json", "config_tracker_reid.yml"} <= {path.name for path in out.iterdir()}
    assert keys_of((out / "config_tracker_reid.yml").read_text())["onnxFile"] == "/opt/m/best.onnx"
    assert manifest.input == ExportOptions(input="float255").contract


@pytest.mark.parametrize(
    ("name", "value"),
    [("precision", "int8"), ("tracker", "iou"), ("batch_size", 0), ("install_dir", "models"), ("install_dir", "/a\nb")],
)
def test_what_deepstream_cannot_take_is_refused(name, value):
    with refuses(InvalidValue, name=f"--{name.replace('_', '-')}", value=value):
        DeepStreamOptions(**{name: value})


def test_padded_crops_are_refused_before_anything_is_written(trained, tmp_path, monkeypatch):
    with_resize(monkeypatch, module, padding=(0, 0, 0))
    with refuses(InvalidFile, "padded", path=trained):
        export_deepstream(trained, tmp_path / "out", verification=VerifyOptions(no_verify=True))
    assert not list(tmp_path.iterdir())


def test_an_adopted_onnx_file_is_refused(tmp_path, people):
    path = adopted_onnx(foreign(tmp_path / "foreign.onnx"), people)
    with refuses(InvalidFile, path=path, expected="a checkpoint"):
        export_deepstream(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_command_says_what_to_do_with_an_adopted_onnx_file(tmp_path, people):
    path = adopted_onnx(foreign(tmp_path / "foreign.onnx"), people)
    done = run_here("-m", "pmm", "export", "deepstream", path, "-o", tmp_path / "out")
    assert done.returncode == 1
    assert "adopt the network of torch instead" in done.stderr
