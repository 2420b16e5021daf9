"""Without torch: the wheel alone and the few packages of pmm/serving-requirements.txt serve ONNX files and engines."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from pmm.data.crops import load_crops
from pmm.evaluation.parity.numeric import numeric_parity
from pmm.runtime.open import open_runner
from tests.conftest import ROOT, assert_one_line_error
from tests.wheel import Environment, built_wheel

pytestmark = pytest.mark.slow
REQUIREMENTS = ROOT / "pmm/serving-requirements.txt"
MAX_PACKAGES, MAX_MEGABYTES = 17, 260
SERVE = """
import shutil, sys
import numpy as np
import pmm
from pmm.utils.search_library import library

with pmm.open_runner("model.onnx") as runner:
    size = runner.preprocessing
    np.save("theirs.npy", runner(pmm.load_crops(sys.argv[1:], size.height, size.width)))
assert library() or not shutil.which("g++")  # the wheel brings the kernel of the search
assert "torch" not in sys.modules
"""
LACKING = {
    "train --out run": "torch",
    "export onnx best.pth": "torch",
    "export aoti best.pth": "torch",
    "export trt best.pth": "torch",
    "export trt model.onnx": "tensorrt-rtx",
    "visualize best.pth": "torch",
    "bench best.pth": "torch",
    "embed best.pth people/query -o other": "torch",
    "info best.pth": "torch",
    "embed model.onnx people/query -o other --backend openvino": "openvino",
}
"""Command -> the package that it says to install."""


@pytest.fixture(params=["linked", pytest.param("installed", marks=pytest.mark.full)])
def environment(request, store, tmp_path):
    """With packages of the tests' environment, which need no network; or as pip installs them."""
    made = Environment.with_wheel(tmp_path / "env", built_wheel(store))
    if request.param == "linked":
        lines = REQUIREMENTS.read_text().splitlines()
        assert len(made.add(line for line in lines if line[:1] != "#")) <= MAX_PACKAGES
    else:
        clients = ROOT / os.environ.get("PMM_CLIENTS", ".venv-clients") / "serving"
        assert (clients / ".installed").exists(), f"{clients} is missing: make clients"
        assert size_in_megabytes(Environment(clients).packages) <= MAX_MEGABYTES
        made.add_all(clients)
    return made


def size_in_megabytes(packages):
    """Of what the requirements brought; pip and setuptools come with an environment and serve nobody."""
    brought = [
        top for top in packages.iterdir() if not top.name.startswith(("pip", "setuptools", "pkg_resources", "_"))
    ]
    assert len([top for top in brought if top.suffix == ".dist-info"]) <= MAX_PACKAGES
    files = (file for top in brought for file in (top.rglob("*") if top.is_dir() else [top]) if file.is_file())
    return sum(file.stat().st_size for file in files) / 1e6


def test_without_torch_a_service_embeds_searches_and_evaluates(environment, people, exported, trained, tmp_path):
    work = tmp_path / "work"
    work.mkdir()
    for file in (exported, exported.with_name("model.onnx.json"), trained):
        shutil.copy(file, work / file.name)
    (work / "people").symlink_to(people)
    crops = sorted((people / "query").iterdir())[::6]

    for absent in ("torch", "onnxscript", "matplotlib"):
        done = environment.run("python", "-c", f"import {absent}", cwd=work)
        assert "ModuleNotFoundError" in done.stderr, absent
    commands = [
        ["python", "-c", SERVE, *map(str, crops)],
        "pmm --version",
        "pmm info",
        "pmm info model.onnx",
        "pmm check --dataset market1501 --root people",
        "pmm embed model.onnx people/bounding_box_test -o gallery --names market1501",
        "pmm info gallery",
        f"pmm search gallery --query {crops[0]} --camera 1 2 3 --top 3 --picture found.png",
        "pmm gallery verify gallery",
        "pmm evaluate model.onnx --dataset market1501 --root people --json scores.json",
        "pmm export triton model.onnx --repo models",
    ]
    commands = [words.split() if isinstance(words, str) else words for words in commands]
    environment.run_all(commands, work, preload="numpy")
    assert (work / "scores.json").exists()
    with open_runner(exported) as runner:
        size = runner.preprocessing
        ours = runner(load_crops(crops, size.height, size.width))
    assert numeric_parity(ours, np.load(work / "theirs.npy")).min_cosine >= 0.999999

    for command, package in LACKING.items():
        done = environment.run("pmm", *command.split(), cwd=work)
        assert_one_line_error(done, "pip install", package)


def test_the_wheel_finds_its_list_before_anything_else_is_installed(store, tmp_path):
    environment = Environment.with_wheel(tmp_path / "env", built_wheel(store))
    done = environment.run("python", "-c", "import pmm; print(pmm.__path__[0])", cwd=tmp_path)
    assert (Path(done.stdout.strip()) / REQUIREMENTS.name).read_text() == REQUIREMENTS.read_text()
    assert Path(done.stdout.strip()).is_relative_to(tmp_path)
    assert_one_line_error(environment.run("pmm", "info", cwd=tmp_path), "pip install numpy")
