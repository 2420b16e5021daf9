"""The full-size path: preset paper trains a step on the CPU, exports, and ONNX Runtime equals torch."""

import dataclasses

import numpy as np
import pytest
import torch

from pmm import checkpoint
from pmm.config import preset
from pmm.data.crops import load_crops
from pmm.data.loader import train_batches
from pmm.data.readers import read_dataset
from pmm.data.samples import class_indices
from pmm.engine import seed_everything, train_one_epoch
from pmm.export.onnx import export_onnx
from pmm.models.registry import build_model
from pmm.parity.numeric import numeric_parity
from pmm.runtime.base import open_runner

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def config(people):
    base = preset("paper")
    return dataclasses.replace(
        base,
        data=dataclasses.replace(base.data, root=str(people), workers=0),
        model=dataclasses.replace(base.model, weights="none", num_classes=12),
        recipe=dataclasses.replace(base.recipe, batch_size=8, images_per_id=2, epochs=1),
    )


@pytest.fixture(scope="module")
def stepped(config, people, tmp_path_factory):
    """A checkpoint after training steps at 384x128, with batch-norm statistics of real crops."""
    seed_everything(0)
    samples = read_dataset("synthetic", people).train
    batches, sampler = train_batches(samples, config)
    model = build_model(config).to(memory_format=torch.channels_last)
    before = {name: value.clone() for name, value in model.named_parameters()}
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-5)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    losses = train_one_epoch(model, batches, optimizer, scheduler, config.recipe, torch.device("cpu"), "paper")
    assert len(sampler) == 3
    assert np.isfinite(losses["loss"])
    assert all(not torch.equal(value, before[name]) for name, value in model.named_parameters())
    assert len(class_indices(samples)) == 12
    path = tmp_path_factory.mktemp("paper") / "paper.pth"
    checkpoint.save(path, checkpoint.snapshot(model, optimizer, scheduler, config, 1, -1.0))
    return path


def test_export_equals_torch(stepped, people, tmp_path):
    artifact = export_onnx(stepped, tmp_path / "paper.onnx")
    assert artifact.manifest.embedding_dim == 1536
    crops = load_crops([s.path for s in read_dataset("synthetic", people).query[::9]], 384, 128)
    with open_runner(stepped) as reference, open_runner(artifact.path) as runner:
        expected, found = reference(crops), runner(crops)
    # a hardly trained network's embeddings are almost collinear: compare what is left without their mean
    mean = expected.mean(0)
    assert numeric_parity(expected - mean, found - mean).min_cosine > 0.9999
