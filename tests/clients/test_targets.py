"""What is exported for BoxMOT and OpenVINO, in those programs, which know nothing of us."""

import numpy as np
import pytest
import torch
from PIL import Image

from pmm.artifacts import checkpoint
from pmm.data.crops import load_crops
from pmm.evaluation.parity.numeric import numeric_parity
from pmm.export.boxmot import SIDECAR, export_boxmot
from pmm.export.openvino import export_openvino
from pmm.runtime.open import open_runner
from tests.clients.readers import boxmot_client, client_folder, run
from tests.conftest import ROOT

pytestmark = pytest.mark.full
HEIGHT, WIDTH = 128, 64


@pytest.fixture(scope="module")
def sources(trained, tmp_path_factory):
    """A checkpoint whose crops are normalised by ImageNet's statistics, and one by others."""
    state = checkpoint.load(trained)
    state["config"]["data"].update(mean=[0.5, 0.45, 0.4], std=[0.3, 0.25, 0.2])
    other = tmp_path_factory.mktemp("other") / "best.pth"
    torch.save(state, other)
    return {"ImageNet's": trained, "others": other}


def written(folder, people, height, width):
    """Crops of people, as PNG files of this size."""
    folder.mkdir()
    for number, crop in enumerate(load_crops(sorted((people / "query").iterdir())[::4], HEIGHT, WIDTH)):
        image = Image.fromarray(crop).resize((width, height), Image.Resampling.BICUBIC)
        image.save(folder / f"{number}.png")
    return sorted(folder.iterdir())


def ours(source, paths):
    with open_runner(source, device="cpu") as reference:
        return reference(load_crops(paths, reference.preprocessing))


@pytest.mark.parametrize("statistics", ["ImageNet's", "others"])
def test_every_backend_of_boxmot_has_our_embeddings(sources, people, tmp_path, statistics):
    model = export_boxmot(sources[statistics], tmp_path / "files", openvino=True)
    paths = written(tmp_path / "crops", people, HEIGHT, WIDTH)
    expected = ours(sources[statistics], paths)
    file, folder = model.files
    out = tmp_path / "theirs.npy"
    for given, backend in ((file, "onnxruntime"), (file, "opencv"), (folder, ""), (next(folder.glob("*.xml")), "")):
        environment = {"BOXMOT_REID_BACKEND": backend} if backend else {}
        done = run(*boxmot_client(), given, out, *paths, cwd=tmp_path, **environment)
        assert done.returncode == 0, done.stderr
        theirs = np.load(out)
        np.testing.assert_allclose(np.linalg.norm(theirs, axis=1), 1, atol=1e-5)
        assert numeric_parity(expected, theirs).min_cosine >= 0.999999, (given, backend)
        out.unlink()


def test_without_its_sidecar_boxmot_answers_wrongly(sources, people, tmp_path):
    """What the sidecar is for: if this fails, BoxMOT needs none any more."""
    file = export_boxmot(sources["ImageNet's"], tmp_path / "model.onnx").files[0]
    file.with_name(file.name + SIDECAR).unlink()
    paths = written(tmp_path / "crops", people, HEIGHT, WIDTH)
    done = run(*boxmot_client(), file, tmp_path / "x.npy", *paths, cwd=tmp_path, BOXMOT_REID_BACKEND="opencv")
    assert done.returncode == 0, done.stderr
    assert numeric_parity(ours(sources["ImageNet's"], paths), np.load(tmp_path / "x.npy")).min_cosine < 0.99


@pytest.mark.parametrize("statistics", ["ImageNet's", "others"])
@pytest.mark.parametrize("size", [(384, 192), (128, 64), (70, 30)])
def test_openvino_takes_crops_of_any_size(sources, people, tmp_path, statistics, size):
    model = export_openvino(sources[statistics], tmp_path / "files")
    paths = written(tmp_path / "crops", people, *size)
    client = [client_folder("plain") / "bin/python", "-I", ROOT / "tests/clients/openvino_client.py"]
    done = run(*client, model.path, tmp_path / "theirs.npy", *paths, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    theirs = np.load(tmp_path / "theirs.npy")
    assert numeric_parity(ours(sources[statistics], paths), theirs).min_cosine >= 0.999999
