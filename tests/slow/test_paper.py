"""The full-size path: preset paper trains a step on the CPU, exports, and ONNX Runtime equals torch."""

import dataclasses

import numpy as np
import pytest
import torch

from bench.lab.exporting import random_checkpoint
from pmm.artifacts import checkpoint
from pmm.artifacts.onnx_file import read_onnx
from pmm.data.crops import load_crops
from pmm.data.loader import train_batches
from pmm.data.readers import read_dataset
from pmm.data.samples import class_indices, evenly_spaced
from pmm.data.synthetic.dataset import draw_dataset
from pmm.embedding.embed import embed_crops
from pmm.evaluation.parity.numeric import numeric_parity
from pmm.export.half_precision import emulated
from pmm.export.onnx import export_onnx
from pmm.export.options import EngineOptions, ExportOptions, VerifyOptions
from pmm.export.reference import in_memory
from pmm.export.trt import engine_from_onnx
from pmm.models.registry import build_model
from pmm.presets import preset
from pmm.runtime.open import open_runner
from pmm.training.snapshot import snapshot
from pmm.training.state import make_train_state
from pmm.training.step import train_step


@pytest.fixture(scope="module")
def config(people):
    base = preset("paper")
    return dataclasses.replace(
        base,
        data=dataclasses.replace(base.data, root=str(people), workers=0),
        model=dataclasses.replace(base.model, weights="none", num_classes=12),
        recipe=dataclasses.replace(base.recipe, batch_size=8, images_per_id=2, epochs=1, lr=1e-4, amp="off"),
    )


@pytest.fixture(scope="module")
def stepped(config, people, tmp_path_factory):
    """A checkpoint after training steps at 384x128, with batch-norm statistics of real crops."""
    torch.manual_seed(0)
    samples = read_dataset("synthetic", people).train
    batches, sampler = train_batches(samples, config)
    state = make_train_state(build_model(config), config, torch.device("cpu"), len(sampler))
    before = {name: value.clone() for name, value in state.model.named_parameters()}
    state.model.train()
    for batch in batches:
        assert np.isfinite(train_step(state, batch)["loss"])
    assert len(sampler) == 3
    assert all(not torch.equal(value, before[name]) for name, value in state.model.named_parameters())
    assert len(class_indices(samples)) == 12
    path = tmp_path_factory.mktemp("paper") / "paper.pth"
    checkpoint.save(path, snapshot(state, 1, -1.0))
    return path


@pytest.fixture(scope="module")
def exported(stepped):
    return export_onnx(stepped, stepped.with_name("paper.onnx"))


@pytest.mark.slow
def test_a_trained_step_exports_and_equals_torch(stepped, exported, people):
    assert exported.manifest.embedding.dim == 1536
    crops = load_crops([s.path for s in read_dataset("synthetic", people).query[::9]], 384, 128)
    with open_runner(stepped) as reference, open_runner(exported.path) as runner:
        expected, found = reference(crops), runner(crops)
    # a hardly trained network's embeddings are almost collinear: compare what is left without their mean
    mean = expected.mean(0)
    assert numeric_parity(expected - mean, found - mean).min_cosine > 0.9999


@pytest.mark.slow
def test_the_graph_of_paper(exported):
    proto = read_onnx(exported.path).proto
    operators = [node.op_type for node in proto.graph.node]
    assert not {"BatchNormalization", "Dropout"} & set(operators)
    shapes = {tensor.name: list(tensor.dims) for tensor in proto.graph.initializer}
    heads = [sorted(shapes[n.input[1]]) for n in proto.graph.node if n.op_type in ("Gemm", "MatMul")]
    assert sorted(heads) == [[512, 2048], [1024, 2048]]
    assert exported.manifest.macs <= 1.01 * 6.94e9


@pytest.fixture(scope="module")
def untrained(tmp_path_factory):
    """Preset paper, random weights, batch-norm statistics of 256 synthetic crops; and the people."""
    folder = tmp_path_factory.mktemp("untrained")
    root = folder / "people"
    draw_dataset(root, ids=24, seed=3, workers=2)
    return random_checkpoint(preset("paper"), root, folder / "paper.pth"), root


@pytest.fixture(scope="module")
def crops(untrained):
    split = read_dataset("synthetic", untrained[1])
    samples = (*split.query, *split.gallery)
    return load_crops([samples[index].path for index in evenly_spaced(len(samples), 64)], 384, 128)


@pytest.fixture(scope="module")
def expected(untrained, crops):
    with open_runner(untrained[0]) as reference:
        return embed_crops(reference, crops, batch_size=16)


@pytest.mark.full
@pytest.mark.parametrize(("precision", "least"), [("fp32", 0.99999), ("fp16", 0.999), ("bf16", 0.95), ("int8", 0.5)])
def test_paper_in_every_precision(untrained, crops, expected, precision, least, tmp_path):
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed (pip install tensorrt-rtx)")
    checkpoint_file, root = untrained
    calibration = {"calibration_root": str(root), "calibration_images": 64} if precision == "int8" else {}
    recipe = ExportOptions(precision=precision, **calibration)
    artifact = export_onnx(checkpoint_file, tmp_path / "paper.onnx", recipe, VerifyOptions(verify_root=str(root)))
    manifest, file = artifact.manifest, read_onnx(artifact.path)
    half = precision in ("fp16", "bf16")
    graph = emulated(file.proto) if half else file.proto
    embed = in_memory(graph, manifest.input, manifest.preprocessing, optimise=not half)
    found = np.concatenate([embed(crops[k : k + 16]) for k in range(0, len(crops), 16)])
    mean = expected.mean(0)
    cosine = numeric_parity(expected - mean, found - mean).min_cosine
    print(f"paper {precision}: min cosine without the mean {cosine:.7f}")
    assert cosine >= least
    engine = engine_from_onnx(file, tmp_path / "paper.plan", EngineOptions(flavor="rtx")).manifest
    assert engine.precision_share[precision] > 0.99
    assert engine.macs == manifest.macs
