"""What every backbone must do: train and resume, be exported in each precision within the gates, and be benched."""

import dataclasses
import itertools
import json

import numpy as np
import pytest
import torch

from pmm.artifacts.checkpoint import load
from pmm.artifacts.onnx_file import read_onnx
from pmm.config import Config
from pmm.data.crops import load_crops
from pmm.data.readers import read_dataset
from pmm.export.aoti import export_aoti
from pmm.export.onnx import export_onnx
from pmm.export.options import MIN_COSINE, MIN_SHARE, EngineOptions, ExportOptions
from pmm.export.trt import engine_from_onnx
from pmm.models.backbone import build_backbone
from pmm.models.fold_batchnorm import fold_batch_norms
from pmm.models.instance_batch_norm import resnet50_ibn_a
from pmm.models.registry import METHODS, build_model, deployed
from pmm.runtime.open import open_runner
from pmm.training.flags import TrainOptions
from pmm.training.launch import train
from pmm.training.losses import reid_losses
from tests.conftest import run_here

pytest.importorskip("timm", reason="timm is not installed (pip install timm)")

BACKBONES = (
    "resnet50-ibn-a",
    "timm:mobilenetv4_conv_small",
    "timm:resnet18",
    "timm:resnet50d",
    "timm:convnextv2_atto",
    "timm:efficientnet_lite0",
    "timm:regnety_002",
    "timm:mobilenetv3_small_100",
    "timm:ghostnet_100",
    "timm:repvgg_a0",
    "timm:densenet121",
)
TRAINED = tuple(name for name in BACKBONES if name != "timm:repvgg_a0")
"""On a CPU; see `pmm.training.state.check_network_on`."""
PRECISIONS = (
    ExportOptions(),
    ExportOptions(precision="fp16"),
    ExportOptions(precision="bf16"),
    ExportOptions(precision="int8"),
    ExportOptions(precision="int8", target="cpu"),
    ExportOptions(precision="int8", int8_fallback="fp16"),
)
PACKAGES = ("fp32", "fp16", "bf16")
ENGINES = (0, 1, 3, 5)
"""Places in PRECISIONS that TensorRT-RTX builds."""
ALL = [
    pytest.param("timm:resnet18", PRECISIONS[:1], marks=pytest.mark.slow),
    *(pytest.param(name, PRECISIONS, marks=pytest.mark.full) for name in TRAINED),
]
"""Each is trained with one method in turn, so that each method meets each precision."""


@pytest.fixture(scope="module")
def calm(store):
    """ResNet-50-IBN-a whose residual branches add little, as in a trained one. Else noise grows from block to block: of
    what tells an fp16 file's rows apart, hardly trained, 1-3% are rounding, of ResNet-50 as of this; that one's rows
    are almost alike, which hides it from the gates."""

    def make(folder):
        torch.manual_seed(0)
        state = resnet50_ibn_a().state_dict()
        weights = {key: value * 0.2 if key.endswith("bn3.weight") else value for key, value in state.items()}
        torch.save(weights, folder / "calm.pth")

    return store.get("calm", make) / "calm.pth"


def config_of(base, backbone, request, method=None):
    method = method or list(METHODS)[BACKBONES.index(backbone) % len(METHODS)]
    init = str(request.getfixturevalue("calm")) if backbone == "resnet50-ibn-a" else base.model.init
    model = dataclasses.replace(base.model, backbone=backbone, method=method, init=init)
    # gentle, for what is hardly trained magnifies rounding
    recipe = dataclasses.replace(base.recipe, epochs=3, lr=1e-3, val_every=3)
    return dataclasses.replace(base, model=model, recipe=recipe)


@pytest.mark.usefixtures("traced_once")
@pytest.mark.parametrize(("backbone", "precisions"), ALL)
def test_it_trains_resumes_and_is_exported_in_every_precision(
    backbone, precisions, small_config, people, tmp_path, monkeypatch, request
):
    import pmm.training.trainer

    config, whole, out = config_of(small_config, backbone, request), tmp_path / "whole", tmp_path / "run"
    train(config, whole, TrainOptions(device="cpu"))
    original = pmm.training.trainer.train_step

    def stops_in_the_third(*args, epoch, step, **kwargs):
        if (epoch, step) == (3, 1):
            raise KeyboardInterrupt
        return original(*args, epoch=epoch, step=step, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(pmm.training.trainer, "train_step", stops_in_the_third)
        with pytest.raises(KeyboardInterrupt):
            train(config, out, TrainOptions(device="cpu", save_minutes=1e-9))
    train(Config.from_dict(load(out / "last.pth")["config"]), out, TrainOptions(device="cpu", resume=True))
    found, expected = (load(folder / "last.pth")["model"] for folder in (out, whole))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in found)

    split = read_dataset("synthetic", people)
    crops, files = load_crops([sample.path for sample in split.query[:5]], 128, 64), {}
    with open_runner(out / "best.pth") as runner:
        embeddings = runner(crops)
    for options in precisions:
        file = tmp_path / f"model{options.suffix}.onnx"
        manifest = export_onnx(out / "best.pth", file, options).manifest
        assert manifest.precision_found == options.precision
        assert manifest.precision_share[options.precision] >= MIN_SHARE[options.precision]
        assert manifest.parity["min_cosine"] >= MIN_COSINE[options.precision]
        files[options] = file
    with open_runner(files[precisions[0]]) as runner:
        np.testing.assert_allclose(runner(crops), embeddings, rtol=1e-3, atol=1e-3 * np.abs(embeddings).max())
    options = PRECISIONS[ENGINES[BACKBONES.index(backbone) % len(ENGINES)]]
    if options not in files:
        return
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed (pip install tensorrt-rtx)")
    engine = engine_from_onnx(read_onnx(files[options]), tmp_path / "model.plan", EngineOptions(flavor="rtx"))
    assert engine.manifest.precision_found == options.precision


@pytest.mark.full
@pytest.mark.parametrize("backbone", TRAINED)
def test_it_is_packaged_and_benched(backbone, small_config, tmp_path, request):
    run, precision = tmp_path / "run", PACKAGES[BACKBONES.index(backbone) % len(PACKAGES)]
    train(config_of(small_config, backbone, request, "baseline"), run, TrainOptions(device="cpu"))
    package = export_aoti(run / "best.pth", tmp_path / "model.pt2", precision)
    assert package.manifest.parity["min_cosine"] >= MIN_COSINE[precision]
    done = run_here(
        "bench/run.py", run / "best.pth", "--backends", "torch,ort-cpu", "--precisions", "fp32,int8", "--out",
        tmp_path / "report", PMM_FAST="1",
    )  # fmt: skip
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    status = {result["name"]: result["status"] for result in report["results"]}
    assert status["torch fp32"] == status["ort-cpu fp32"] == status["ort-cpu int8"] == "ok", (status, done.stderr)


@pytest.mark.full
@pytest.mark.parametrize(("backbone", "method"), itertools.product(BACKBONES, METHODS))
def test_every_method_takes_it(backbone, method, small_config, request):
    config = config_of(small_config, backbone, request, method)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, num_classes=4))
    torch.manual_seed(0)
    model, pids = build_model(config), torch.tensor([0, 0, 1, 1, 3, 3])
    output = model(torch.randn(6, 3, 128, 64), pids)
    sum(reid_losses(output, pids, label_smoothing=0.1).values()).backward()
    assert all(weight.grad is not None and weight.grad.isfinite().all() for weight in model.parameters())
    images = torch.randn(3, 3, 128, 64)
    with torch.inference_mode():
        torch.testing.assert_close(deployed(model.eval())(images), model(images), rtol=1e-3, atol=1e-4)


@pytest.mark.full
@pytest.mark.parametrize("backbone", BACKBONES)
def test_folding_keeps_its_map(backbone):
    torch.manual_seed(0)
    net, images = build_backbone(backbone), torch.randn(2, 3, 128, 64)
    with torch.no_grad():
        net(images)
        expected = net.eval()(images)
        torch.testing.assert_close(fold_batch_norms(net, images)(images), expected, rtol=1e-3, atol=1e-3)
