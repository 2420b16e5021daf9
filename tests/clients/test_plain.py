"""Our ONNX files serve programs that have neither this package nor torch, by what the manifest says alone."""

import os
import subprocess
from pathlib import Path

import numpy as np
import pytest

from pmm.data.crops import load_crops
from pmm.evaluation.parity.numeric import numeric_parity
from pmm.export.options import ExportOptions
from pmm.runtime.open import open_runner
from tests.conftest import ROOT

pytestmark = pytest.mark.full
CLIENT = Path(__file__).with_name("plain_client.py")
RECIPES = (
    ExportOptions(),
    ExportOptions(input="float", input_colour="bgr", normalize=True, flip_tta=True),
    ExportOptions(precision="fp16"),
    ExportOptions(precision="int8", target="cpu"),
)


@pytest.mark.parametrize("library", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: f"{recipe.precision}-{recipe.input}")
def test_a_service_without_us_has_our_embeddings(shared, people, tmp_path, recipe, library):
    python = ROOT / os.environ.get("PMM_CLIENTS", ".venv-clients") / "plain/bin/python"
    assert python.exists(), f"{python} is missing: make clients"
    artifact = shared.onnx(recipe)
    paths = sorted((people / "query").iterdir())[::6]
    command = [python, "-I", CLIENT, library, artifact, tmp_path / "theirs.npy", *paths]
    done = subprocess.run(list(map(str, command)), cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    with open_runner(artifact) as runner:
        size = runner.preprocessing
        ours = runner(load_crops(paths, size.height, size.width))
    # OpenVINO rounds int8 products in its own way
    least = 0.99 if (library, recipe.precision) == ("openvino", "int8") else 0.999999
    assert numeric_parity(ours, np.load(tmp_path / "theirs.npy")).min_cosine >= least
