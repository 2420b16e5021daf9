"""The demo as a newcomer runs it, and the figures it must reach on the synthetic people."""

import dataclasses
import json
import re
import shutil
import subprocess

import numpy as np
import pytest
import torch

from pmm.artifacts.checkpoint import load, restore_model
from pmm.data.crops import load_crops
from pmm.data.preprocessing import preprocessing_of
from pmm.data.readers import read_dataset
from pmm.data.samples import camids_of, pids_of
from pmm.embedding.embed import embed_samples
from pmm.evaluation.metrics import evaluate_ranking
from pmm.evaluation.parity.numeric import numeric_parity
from pmm.evaluation.ranking import rank_split
from pmm.export.onnx import export_onnx
from pmm.export.options import ExportOptions
from pmm.models.registry import build_model
from pmm.presets import preset
from pmm.runtime.deployed_graph import deployed_graph
from pmm.runtime.eager import EagerRunner
from pmm.runtime.open import open_runner
from tests.conftest import ROOT, run_python
from tests.data.histogram_matchers import MATCHERS, histogram_features

slow, full = pytest.mark.slow, pytest.mark.full


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


@slow
def test_it_leaves_what_it_promises(demo):
    for name in ("data", "best.pth", "last.pth", "model.onnx", "model.onnx.json", "model.plan", "report/report.html"):
        assert (demo / name).exists(), name


@slow
def test_the_test_set_is_large_enough(split):
    assert len({s.pid for s in split.query}) >= 100
    assert len(split.query) >= 300
    assert len(split.gallery) >= 1500
    assert sum(s.pid == 0 for s in split.gallery) >= 0.15 * len(split.gallery)
    assert not {s.pid for s in split.train} & {s.pid for s in (*split.query, *split.gallery)}


@slow
def test_accuracy_and_parity(report):
    results = {result["name"]: result for result in report["results"]}
    assert results["torch fp32"]["mAP"] >= 0.65
    ran = ("torch fp32", "torch-compile fp32", "aoti fp32", "ort-cpu fp32", "ort-cpu int8", "openvino int8")
    for name in ran:
        assert results[name]["status"] == "ok", results[name]["reason"]
        assert [batch["batch"] for batch in results[name]["batches"]] == [1, 8]
        if results[name]["precision"] == "fp32":
            assert abs(results[name]["map_delta"]) <= 0.001
            assert results[name]["min_cosine"] >= 0.9999
    # of the file itself: what test-full asks over the same crops
    assert abs(results["ort-cpu fp32"]["map_delta"]) <= 0.0005
    assert results["ort-cpu fp32"]["min_cosine"] >= 0.999999
    assert results["tensorrt-rtx int8"]["artifact"]
    assert report["gates"]["failures"] == []


@pytest.fixture(scope="module")
def fp32(demo, split):
    """Embeddings of query and gallery by the fp32 torch checkpoint, and their mAP."""
    with open_runner(demo / "best.pth") as runner:
        rows = [embed_samples(runner, part) for part in (split.query, split.gallery)]
    return rows, rank_split(split, *rows).mAP


@pytest.mark.parametrize(
    ("recipe", "least_cosine", "most_drop"),
    [
        pytest.param(ExportOptions(), 0.999999, 0.0005, marks=full),
        pytest.param(ExportOptions(precision="fp16"), 0.9999, 0.001, marks=full),
        pytest.param(ExportOptions(precision="bf16"), 0.999, 0.005, marks=full),
        pytest.param(ExportOptions(precision="int8"), 0.98, 0.005, marks=slow),
        pytest.param(ExportOptions(precision="int8", target="cpu"), 0.98, 0.005, marks=slow),
    ],
    ids=lambda value: f"{value.precision}-{value.target}" if isinstance(value, ExportOptions) else str(value),
)
def test_every_precision_keeps_the_ranking(demo, split, fp32, tmp_path, recipe, least_cosine, most_drop):
    """Over all 4,200 test crops. ONNX Runtime runs no bf16 on CPUs: there, the torch module that was exported."""
    artifact = export_onnx(demo / "best.pth", tmp_path / "model.onnx", recipe)
    expected, reference = fp32
    if recipe.precision == "bf16":
        model, config = restore_model(load(demo / "best.pth"), demo)
        size = preprocessing_of(config)
        graph = deployed_graph(model, size, artifact.manifest.input, artifact.manifest.embedding, "bf16")
        found = []
        for part in (split.query, split.gallery):
            crops = load_crops([s.path for s in part], size.height, size.width)
            with torch.inference_mode():
                rows = [graph(torch.from_numpy(crops[k : k + 64])).numpy() for k in range(0, len(crops), 64)]
            found.append(np.concatenate(rows))
    else:
        with open_runner(artifact.path) as runner:
            found = [embed_samples(runner, part) for part in (split.query, split.gallery)]
    parity = numeric_parity(np.concatenate(expected), np.concatenate(found))
    delta = rank_split(split, *found).mAP - reference
    print(f"{recipe.precision} {recipe.target}: min cosine {parity.min_cosine:.7f}, mAP {delta:+.5f}")
    assert parity.min_cosine >= least_cosine
    assert delta >= -most_drop
    if recipe.precision in ("fp32", "fp16"):
        assert abs(delta) <= most_drop


@slow
def test_colour_histograms_do_not_solve_it(report, split):
    parts = [histogram_features(load_crops([s.path for s in p], 128, 64)) for p in (split.query, split.gallery)]
    ids = [f(part) for f in (pids_of, camids_of) for part in (split.query, split.gallery)]
    scores = {name: evaluate_ranking(*(part[name] for part in parts), *ids).mAP for name in MATCHERS}
    assert len(scores) >= 6
    assert max(scores.values()) < report["results"][0]["mAP"] / 3, scores


@slow
def test_an_untrained_network_does_not_solve_it(report, split):
    torch.manual_seed(0)
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
