"""Programs that know nothing of us read files of methods with parts, and have our embeddings."""

import numpy as np
import pytest
import torch

from pmm.artifacts.checkpoint import load
from pmm.export.onnx import export_onnx
from pmm.export.options import VerifyOptions
from tests.clients.readers import python_client, run
from tests.clients.test_readers import FILES, check, images, our_embeddings

__all__ = ["images"]
pytestmark = pytest.mark.full


@pytest.fixture(scope="module", params=["pcb", "pcb-rpp"])
def checkpoint(shared, request, tmp_path_factory):
    """Call it with the embedding."""
    folder = tmp_path_factory.mktemp("parts")

    def of(embedding):
        content, path = load(shared.run(request.param)), folder / f"{embedding}.pth"
        content["config"]["model"]["embedding"] = embedding
        torch.save(content, path)
        return path

    return of


OPENCV4, OPENCV5, OPENVINO = ("opencv410", "opencv"), ("opencv5", "opencv"), ("plain", "openvino")


@pytest.mark.parametrize(
    ("client", "file"),
    [
        *((client, file) for client in (OPENCV4, OPENCV5, OPENVINO) for file in ("`--input float`", "both", "fp16")),
        # OpenVINO computes in 8 bits in its own way, which needs a model that is trained
        (OPENCV4, "int8"),
        (OPENCV5, "int8"),
    ],
)
@pytest.mark.parametrize("embedding", ["g", "h"])
def test_a_client_has_our_embeddings_of_parts(checkpoint, images, tmp_path, client, file, embedding):
    artifact, out = tmp_path / "model.onnx", tmp_path / "theirs.csv"
    recipe = FILES[file]
    export_onnx(checkpoint(embedding), artifact, recipe, VerifyOptions(no_verify=recipe.precision == "int8"))
    ours = our_embeddings(artifact, images)
    for count in (1, 5):
        done = run(*python_client(*client), artifact, out, *images[:count], cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        cell = "yes" if recipe.precision == "fp32" else "near"
        check(np.loadtxt(out, delimiter=",", ndmin=2), ours[:count], recipe.precision, cell)
