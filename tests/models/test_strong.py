"""Today's recipe: heads with a BN-neck, and embeddings of length 1 from the model to every export."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from pmm.artifacts.artifact import Artifact
from pmm.artifacts.checkpoint import load
from pmm.artifacts.manifest import EmbeddingContract, InputContract
from pmm.artifacts.onnx_file import read_onnx
from pmm.artifacts.trained_model import load_model
from pmm.data.crops import load_crops
from pmm.data.readers import read_dataset
from pmm.evaluation.parity.numeric import numeric_parity
from pmm.export.onnx import export_onnx, export_onnx_cached
from pmm.export.options import ExportOptions, VerifyOptions
from pmm.models.registry import METHODS, build_model, deployed
from pmm.models.stages import Head
from pmm.ops.mixed_cam import cam
from pmm.presets import PRESETS, preset
from pmm.runtime.deployed_graph import deployed_graph
from pmm.runtime.open import open_runner
from pmm.training.flags import TrainOptions
from pmm.training.launch import train
from pmm.training.losses import reid_losses
from pmm.training.state import learning_rate
from tests.conftest import run_here

PIDS = torch.tensor([0, 0, 1, 1, 3, 3])
WITH_HEADS = [name for name, method in METHODS.items() if "metric" in method.config_keys]


def model_of(method="pmm", name="tiny-strong", **model):
    base = preset(name)
    torch.manual_seed(0)
    model = dataclasses.replace(base.model, **{"method": method, "num_classes": 4, **model})
    return build_model(dataclasses.replace(base, model=model))


def settled(model):
    """With running statistics that are no defaults, in eval mode."""
    with torch.no_grad():
        for _ in range(3):
            model(torch.randn(8, 3, 128, 64), torch.arange(8) // 2)
    return model.eval()


@pytest.mark.parametrize(("strong", "plain"), [("strong", "paper"), ("tiny-strong", "tiny")])
def test_the_network_and_the_mix_are_those_of_the_plain_preset(strong, plain):
    strong, plain = preset(strong), preset(plain)
    assert strong.data == plain.data
    assert dataclasses.replace(strong.model, neck="none", metric="euclidean") == plain.model
    assert (strong.model.neck, strong.model.metric) == ("bn", "cosine")
    recipe = strong.recipe
    assert (recipe.schedule, 60 <= recipe.epochs <= 120) == ("flat-cosine", True)
    rates = [learning_rate(recipe, step, 10) for step in range(10 * recipe.epochs)]
    top = rates.index(max(rates))
    assert top == pytest.approx(recipe.warmup * len(rates), abs=1)
    assert rates[top] == pytest.approx(recipe.lr, rel=0.01)
    rising, falling = rates[: top + 1], rates[top:]
    assert rising == sorted(rising)
    assert len(set(falling)) == len(falling)  # a cosine from the top down, nothing flat
    assert falling == sorted(falling, reverse=True)
    assert rates[-1] == pytest.approx(0, abs=1e-9)


def test_presets_train_in_the_fastest_precision_of_the_hardware():
    assert {each.recipe.amp for each in PRESETS.values()} == {"auto"}


def test_a_neck_lies_between_the_losses():
    torch.manual_seed(0)
    head = Head(8, 6, 5, fan="fan_in", neck=True).double()
    with torch.no_grad():
        head.bn.weight.uniform_(0.5, 2)
    pooled = torch.randn(7, 8, dtype=torch.float64)
    before, logits = head(pooled)
    expected = pooled @ head.reduction.weight.T + head.reduction.bias
    torch.testing.assert_close(before, expected)
    after = (expected - expected.mean(0)) / (expected.var(0, correction=0) + head.bn.eps).sqrt() * head.bn.weight
    torch.testing.assert_close(logits, after @ head.classifier.weight.T)
    assert (after < 0).any()
    assert head.classifier.bias is None
    assert not head.bn.bias.requires_grad
    assert head.bn.bias.count_nonzero() == 0
    head.eval()
    mean, var = head.bn.running_mean, head.bn.running_var
    torch.testing.assert_close(
        head.feature(pooled), (expected - mean) / (var + head.bn.eps).sqrt() * head.bn.weight + head.bn.bias
    )


@pytest.mark.parametrize("neck", [True, False])
@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_cam_weights_equal_grad_cam_through_the_map(training, frozen, neck):
    """With and without a neck; a frozen batch-norm keeps to its running statistics in training, too."""
    torch.manual_seed(0)
    head = Head(8, 6, 5, fan="fan_in", neck=neck).double().train(training)
    head.bn.running_mean.uniform_(-1, 1)
    head.bn.running_var.uniform_(0.5, 2)
    with torch.no_grad():
        for parameter in (head.bn.weight, head.bn.bias, head.classifier.weight):
            parameter.uniform_(-1, 1)
    if frozen:
        head.bn.eval()
    pids = torch.tensor([0, 1, 1, 4])
    for pool in (lambda a: a.mean((2, 3)), lambda a: F.adaptive_max_pool2d(a, 1).flatten(1)):
        maps = torch.randn(4, 8, 3, 2, dtype=torch.float64, requires_grad=True)
        pooled = pool(maps)
        buffers = [b.clone() for b in head.buffers()]
        weights = head.cam_weights(pooled, pids, cells=6)
        assert all(torch.equal(a, b) for a, b in zip(buffers, head.buffers(), strict=True))
        score = head(pooled)[1].gather(1, pids[:, None]).sum()
        (gradient,) = torch.autograd.grad(score, maps)
        torch.testing.assert_close(weights, gradient.mean((2, 3)), rtol=1e-9, atol=1e-12)
        expected = (gradient.mean((2, 3))[:, :, None, None] * maps).sum(1).relu()
        torch.testing.assert_close(cam(maps, weights), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("method", WITH_HEADS)
def test_every_method_trains_on_it(method):
    model = model_of(method)
    output = model(torch.randn(6, 3, 128, 64), PIDS)
    sum(reid_losses(output, PIDS, label_smoothing=0.1).values()).backward()
    still = {name for name, p in model.named_parameters() if p.grad is None}
    assert still == {f"stages.{stage}.bn.bias" for stage in range(len(model.stages))}
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("method", [m if m == "pmm" else pytest.param(m, marks=pytest.mark.slow) for m in WITH_HEADS])
def test_its_training_is_one_graph_to_the_compiler(method):
    """Of heads without a neck, test_methods.py shows it for all methods; of those with one, pmm asks them for most."""
    graphs = torch._dynamo.explain(model_of(method))(torch.randn(6, 3, 64, 32), PIDS)
    assert graphs.graph_break_count == 0


@pytest.mark.parametrize("neck", ["none", "bn"])
@pytest.mark.parametrize("method", WITH_HEADS)
def test_embeddings_have_length_1_and_the_direction_they_had(method, neck):
    """In the model, and in the network that is deployed."""
    unit, plain = (settled(model_of(method, neck=neck, metric=metric)) for metric in ("cosine", "euclidean"))
    images = torch.randn(5, 3, 128, 64)
    with torch.inference_mode():
        expected = plain(images)
        assert (expected.norm(dim=1) - 1).abs().min() > 0.1
        assert (expected < 0).any() == (neck == "bn")
        for network in (unit, deployed(unit)):
            torch.testing.assert_close(network(images), expected / expected.norm(dim=1, keepdim=True))
        torch.testing.assert_close(deployed(plain)(images), expected, rtol=1e-5, atol=1e-5)


def test_an_embedding_of_zeros_stays_one():
    model = settled(model_of(neck="none"))
    for head in model.stages:
        head.bn.bias.data.fill_(-1e30)
    with torch.inference_mode():
        assert model(torch.randn(2, 3, 128, 64)).count_nonzero() == 0


def test_the_contract_says_what_the_model_does():
    unit, plain = model_of(), model_of(metric="euclidean")
    cosine = EmbeddingContract(dim=384, normalised=True, metric="cosine")
    assert EmbeddingContract.of(unit) == EmbeddingContract.of(plain, normalised=True) == cosine
    assert EmbeddingContract.of(plain) == EmbeddingContract(dim=384)
    assert EmbeddingContract.of(unit, flip_tta=True) == dataclasses.replace(cosine, flip_tta=True)


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("normalise", [False, True])
@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_the_graph_brings_embeddings_to_length_1_once(metric, normalise, flip):
    """Again only after the mean with the mirror image, which is shorter."""
    from pmm.data.preprocessing import Preprocessing

    model = settled(model_of(metric=metric))
    size = Preprocessing(height=128, width=64, mean=(0.5, 0.5, 0.5), std=(0.2, 0.2, 0.2))
    contract = EmbeddingContract.of(model, normalised=normalise, flip_tta=flip)
    crops = np.random.default_rng(0).integers(0, 256, (3, 128, 64, 3), np.uint8)
    graph = deployed_graph(model, size, InputContract(), contract, "fp32")
    with torch.inference_mode():
        found = graph(torch.from_numpy(crops))
        images = torch.from_numpy(size.normalise(crops))
        expected = (model(images) + model(images.flip(3))) / 2 if flip else model(images)
        if metric == "cosine" or normalise:
            expected = expected / expected.norm(dim=1, keepdim=True)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    from pmm.models.output import L2Normalize

    steps = sum(isinstance(module, L2Normalize) for module in graph.modules())
    assert steps == {("cosine", True): 2, ("cosine", False): 1}.get((metric, flip), int(normalise))


@pytest.fixture(scope="module")
def strong(store, small_config):
    """best.pth of a short run of tiny-strong; read only."""
    base = preset("tiny-strong")
    recipe = dataclasses.replace(base.recipe, epochs=2, batch_size=12, val_every=1, amp="off")
    config = dataclasses.replace(base, data=small_config.data, recipe=recipe)
    return store.get("run-strong", lambda home: train(config, home, TrainOptions(device="cpu"))) / "best.pth"


@pytest.fixture(scope="module")
def exported(store, strong):
    """Its fp32 ONNX file, verified; read only."""
    return store.get("onnx-strong", lambda home: export_onnx(strong, home / "model.onnx")) / "model.onnx"


@pytest.fixture(scope="module")
def crops(people):
    return load_crops([s.path for s in read_dataset("synthetic", people).query[:32]], 128, 64)


RECIPES = [
    ExportOptions(),
    *(
        pytest.param(recipe, marks=pytest.mark.slow)
        for recipe in (ExportOptions(normalize=True, flip_tta=True), ExportOptions(precision="int8", target="cpu"))
    ),
    *(
        pytest.param(ExportOptions(precision=precision), marks=pytest.mark.full)
        for precision in ("fp16", "bf16", "int8")
    ),
]
"""Its own is the end of the graph, which is fp32 in every precision: of those, pmm.export has its own tests."""


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda r: f"{r.precision}-{r.target}{'-flip' * r.flip_tta}")
def test_every_export_of_it_is_proved_and_has_length_1(strong, exported, crops, tmp_path, recipe):
    path = exported if recipe == ExportOptions() else export_onnx(strong, tmp_path / "model.onnx", recipe).path
    artifact = Artifact(path, read_onnx(path).manifest)
    embedding = artifact.manifest.embedding
    assert (embedding.normalised, embedding.metric) == (True, "cosine")
    assert artifact.manifest.parity["rows"] == 64
    if recipe.precision == "fp32":
        assert artifact.manifest.parity["min_cosine"] >= 0.99999
    if recipe.precision == "bf16":
        return  # ONNX Runtime runs none on CPUs; the export has judged it
    with open_runner(artifact.path) as runner, open_runner(strong) as reference:
        found, expected = runner(crops), reference(crops)
        assert reference.embedding == EmbeddingContract(dim=384, normalised=True, metric="cosine")
    for embeddings in (found, expected):
        np.testing.assert_allclose(np.linalg.norm(embeddings, axis=1), 1, atol=1e-5)
    if not recipe.flip_tta:
        assert numeric_parity(expected, found).min_cosine > {"int8": 0.98}.get(recipe.precision, 0.9999)


def test_normalize_changes_nothing_of_it(strong, exported, tmp_path):
    """Neither the graph nor that the file is taken for what was asked for."""
    taken = tmp_path / "model.onnx"
    shutil.copytree(exported.parent, tmp_path, dirs_exist_ok=True)
    before = taken.stat().st_mtime_ns
    found = export_onnx_cached(strong, taken)
    assert export_onnx_cached(strong, taken, ExportOptions(normalize=True)) == found
    assert found.manifest.parity
    assert taken.stat().st_mtime_ns == before
    again = export_onnx(strong, tmp_path / "again.onnx", ExportOptions(normalize=True), VerifyOptions(no_verify=True))
    assert again.path.read_bytes() == exported.read_bytes()


def test_the_commands_rank_it_by_cosine(strong, people, tmp_path):
    state = load(strong)
    assert (state["config"]["preset"], state["config"]["model"]["metric"]) == ("tiny-strong", "cosine")
    run = shutil.copytree(strong.parent, tmp_path / "run", copy_function=shutil.copyfile)
    again = run_here("-m", "pmm.train", "--out", run, "--resume", "--device", "cpu")
    assert "the run is finished (2 epochs)" in again.stdout, again.stderr
    results = []
    for flags in ([], ["--metric", "euclidean"], ["--flip-test"]):
        out = tmp_path / "evaluation.json"
        done = run_here(
            "-m", "pmm", "evaluate", strong, "--dataset", "synthetic", "--root", people, "--json", out, *flags
        )
        assert done.returncode == 0, done.stderr
        results.append(json.loads(out.read_text()))
    assert [result["metric"] for result in results] == ["cosine", "euclidean", "cosine"]
    assert results[0]["mAP"] == pytest.approx(results[1]["mAP"], abs=1e-6)
    assert results[2]["mAP"] != results[0]["mAP"]
    done = run_here("-m", "pmm", "info", strong, "--json")
    assert json.loads(done.stdout)["file"]["metric"] == "cosine"
    assert load_model(strong).normalised


@pytest.mark.parametrize(
    "backends",
    [
        pytest.param("torch,ort-cpu,openvino", marks=pytest.mark.full),
        pytest.param("torch,torch-compile,aoti", marks=pytest.mark.full),
    ],
)
def test_the_bench_measures_it(strong, tmp_path, backends):
    done = run_here(
        "bench/run.py", strong, "--backends", backends, "--precisions", "fp32",
        "--out", tmp_path / "report", PMM_FAST="1",
    )  # fmt: skip
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    for result in report["results"]:
        assert result["status"] == "ok", (result, done.stderr)
        assert result["min_cosine"] >= 0.99999
        assert result["max_norm_error"] <= 1e-5
