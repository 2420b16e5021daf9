"""The demo as a newcomer runs it, and the figures it must reach on the synthetic people."""

import dataclasses
import json
import re
import shutil
import subprocess

import numpy as np
import pytest
import torch

from pmm.config import preset
from pmm.data.crops import load_crops, preprocessing_of
from pmm.data.readers import read_dataset
from pmm.data.samples import camids_of, pids_of
from pmm.embed import embed_samples, rank_split
from pmm.engine import seed_everything
from pmm.metrics import evaluate_ranking
from pmm.models.registry import build_model
from pmm.runtime.eager import EagerRunner
from tests.conftest import ROOT, run_python
from tests.data.histogram_matchers import MATCHERS, histogram_features

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """The recipe of `make demo`, line by line, in this environment and an empty folder."""
    folder = tmp_path_factory.mktemp("demo")
    for name in ("export", "bench"):
        shutil.copytree(ROOT / name, folder / name)
    recipe = subprocess.run(
        ["make", "--no-print-directory", "-n", "-o", "setup", "demo"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    lines = [line for line in recipe.splitlines() if line.startswith(".venv/bin/python ")]
    assert len(lines) == 5, recipe
    for line in lines:
        arguments = re.sub(r"\$\(test.*\)", "", line).split()[1:]
        done = run_python(*arguments, cwd=folder, PYTHONPATH=str(ROOT), PMM_FAST="0")
        assert done.returncode == 0, done.stderr
    return folder / "runs" / "demo"


@pytest.fixture(scope="module")
def split(demo):
    return read_dataset("market1501", demo / "data")


@pytest.fixture(scope="module")
def report(demo):
    return json.loads((demo / "report" / "report.json").read_text())


def test_it_leaves_what_it_promises(demo):
    for name in ("data", "best.pth", "last.pth", "model.onnx", "model.onnx.json", "model.plan", "report/report.html"):
        assert (demo / name).exists(), name


def test_the_test_set_is_large_enough(split):
    assert len({s.pid for s in split.query}) >= 100
    assert len(split.query) >= 300
    assert len(split.gallery) >= 1500
    assert sum(s.pid == 0 for s in split.gallery) >= 0.15 * len(split.gallery)
    assert not {s.pid for s in split.train} & {s.pid for s in (*split.query, *split.gallery)}


def test_accuracy_and_parity(report):
    torch_result, ort_result = report["results"][:2]
    assert torch_result["mAP"] >= 0.65
    assert abs(ort_result["map_delta"]) <= 0.001
    assert ort_result["min_cosine"] >= 0.9999
    assert all(b["p90_ms"] for r in (torch_result, ort_result) for b in r["batches"])


def test_colour_histograms_do_not_solve_it(report, split):
    parts = [load_crops([s.path for s in part], 128, 64) for part in (split.query, split.gallery)]
    ids = [f(part) for f in (pids_of, camids_of) for part in (split.query, split.gallery)]
    scores = {
        name: evaluate_ranking(*(histogram_features(part, name) for part in parts), *ids).mAP for name in MATCHERS
    }
    assert len(scores) >= 6
    assert max(scores.values()) < report["results"][0]["mAP"] / 3, scores


def test_an_untrained_network_does_not_solve_it(report, split):
    seed_everything(0)
    base = preset("tiny")
    config = dataclasses.replace(base, model=dataclasses.replace(base.model, num_classes=10))
    model = build_model(config)
    preprocessing = preprocessing_of(config)
    crops = load_crops([s.path for s in split.train[::8]], 128, 64)
    for module in model.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            module.momentum = None  # plain averages: statistics calibrated on people
    with torch.no_grad():
        for batch in np.array_split(crops, 5):
            model(torch.from_numpy(preprocessing.normalise(batch)))
    runner = EagerRunner(model, preprocessing, torch.device("cpu"))
    untrained = rank_split(split, embed_samples(runner, split.query), embed_samples(runner, split.gallery)).mAP
    assert untrained < report["results"][0]["mAP"] / 5
