"""Times of whole training steps of preset `paper`: without mixing, with our kernels, with eager ops, the authors' way.

All are trained by `pmm.training.step.train_step` on the same weights, in turns; they differ in the forward alone.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.lab.mix_report import AUTHORS, EAGER, NO_MIXING, OURS, heading, interval, timing
from bench.lab.mix_timing import name_of, require_kernels, stopwatch
from bench.lab.mix_variants import authors_mix, eager_cam, eager_mix
from pmm.bench.latency import LatencyPlan, measure
from pmm.bench.statistics import Latency, median_ratio
from pmm.config import Config, fast_mode
from pmm.data.batches import TrainBatch, normalize_batch
from pmm.data.preprocessing import Preprocessing, preprocessing_of
from pmm.models.output import TrainOutput
from pmm.models.pmm import PMM
from pmm.models.registry import build_model
from pmm.ops import sample_partners
from pmm.presets import preset
from pmm.training.losses import reid_losses
from pmm.training.state import make_train_state
from pmm.training.step import set_deterministic, train_step
from pmm.utils.errors import InvalidValue

CLASSES = 751  # of Market-1501's training part
SAME_LOSS, SAME_GRADIENT = 1e-5, 1e-4
"""Largest relative difference of loss and gradient from ours: for float32 sums in another order."""

Forward = Callable[[PMM, Tensor, Tensor, torch.Generator | None], TrainOutput]


def bench_step(
    *,
    batch: int,
    device: torch.device,
    threads: int,
    plan: LatencyPlan,
    amp: Literal["off", "bf16", "fp16"] = "off",
    fast: bool = False,
) -> dict[str, Any]:
    """Measure a training step of each way on random crops and weights; see `bench.lab.mix_report`.

    Verified in fp32, timed in the mixed precision `amp`.

    A way whose loss or gradient differs from ours on two batches is not timed, and `equal` is then false. `fast`: a
    small backbone instead of ResNet-50, for a quick test.

    Raises BackendUnavailable without compiled kernels for `device`, InvalidValue for a batch that is not identities
    times images.
    """
    config = step_config(batch, "resnet10" if fast else "resnet50", amp)
    require_kernels(device)
    torch.set_num_threads(threads)
    set_deterministic(device, config.recipe.deterministic)
    torch.manual_seed(0)
    state = make_train_state(build_model(config), config, device, 1)
    model = state.model
    crops = random_crops(config, device)
    with torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
        proofs = _proofs(model, crops, preprocessing_of(config))
        if not all(proof.equal for proof in proofs.values()):
            # of hundreds of rankings one may be so close that sums in another order decide it otherwise: not twice
            again = _proofs(model, random_crops(config, device, seed=3), preprocessing_of(config))
            proofs = {name: proof if proof.equal else again[name] for name, proof in proofs.items()}
    for name, proof in proofs.items():
        if not proof.equal:
            print(f"step: {name} has another result: {proof}", file=sys.stderr)
    steps = {
        name: partial(train_step, dataclasses.replace(state, network=_Way(model, forward)), crops)
        for name, forward in WAYS.items()
        if proofs[name].equal
    }
    times = measure(steps, plan, stopwatch=stopwatch(device))
    return {
        **heading(name_of(device), threads, plan),
        "step": {
            "preset": config.preset,
            "backbone": config.model.backbone,
            "batch": batch,
            "classes": CLASSES,
            "amp": amp,
            "deterministic": config.recipe.deterministic,
        },
        "equal": all(proof.equal for proof in proofs.values()),
        "rows": [_row(name, proof, times) for name, proof in proofs.items()],
        "ratios": [
            {"phase": "step", "of": name, "over": base, **interval(median_ratio(found, times[base], block=plan.block))}
            for base in (OURS, NO_MIXING)
            for name, found in times.items()
            if name != base and base in times
        ],
    }


def step_plan(samples: int = 0, budget: float = 0.0) -> LatencyPlan:
    """How long to measure each way (0: the default; with PMM_FAST=1 hardly at all). `budget` in seconds.

    The proof has warmed up once already; a step takes seconds, so that turns need no start that is not counted.
    """
    samples = samples or (2 if fast_mode() else 30)
    return LatencyPlan(warmup=0.0, warmup_runs=1, samples=samples, block=1, settle=0.0, lead=0, budget=budget or 100.0)


def without_mixing(model: PMM, images: Tensor, pids: Tensor, generator: torch.Generator | None) -> TrainOutput:
    """X2 = X3 = X, no CAM, and one max pool for both."""
    f1, x = _maps(model, images)
    largest = _largest(x)
    return _output(model, (f1.mean((2, 3)), largest, largest))


def with_our_kernels(model: PMM, images: Tensor, pids: Tensor, generator: torch.Generator | None) -> TrainOutput:
    """`pmm.models.pmm.PMM`."""
    return model(images, pids, generator)


def with_eager_ops(model: PMM, images: Tensor, pids: Tensor, generator: torch.Generator | None) -> TrainOutput:
    """The model with good eager torch for the mixes, their pooling and the CAMs, whose weights are in closed form."""
    f1, x = _maps(model, images)
    average, cells = f1.mean((2, 3)), f1.shape[2] * f1.shape[3]
    head1, head2, _ = model.stages
    cam1 = eager_cam(f1, head1.cam_weights(average, pids, cells))  # type: ignore[operator]
    x2 = eager_mix(x, cam1, sample_partners(pids, generator))
    pooled2 = _largest(x2)
    cam2 = eager_cam(x2, head2.cam_weights(pooled2, pids, cells))  # type: ignore[operator]
    x3 = eager_mix(x, cam2, sample_partners(pids, generator))
    return _output(model, (average, pooled2, _largest(x3)))


def authors_way(model: PMM, images: Tensor, pids: Tensor, generator: torch.Generator | None) -> TrainOutput:
    """As the authors' public code does (this text is ours): each CAM by a backward of the true identities'
    logits through the whole network, which also fills the parameters' gradients in vain, and their mix."""
    f1, x = _maps(model, images)
    head1, head2, head3 = model.stages
    average = f1.mean((2, 3))
    feature1, logits1 = head1(average)
    cam1 = _cam_by_backward(f1, logits1, pids)
    x2 = authors_mix(x, cam1, sample_partners(pids, generator))
    feature2, logits2 = head2(_largest(x2))
    cam2 = _cam_by_backward(x2, logits2, pids)
    feature3, logits3 = head3(_largest(authors_mix(x, cam2, sample_partners(pids, generator))))
    return TrainOutput(features=(feature1, feature2, feature3), logits=(logits1, logits2, logits3))


WAYS: dict[str, Forward] = {
    NO_MIXING: without_mixing,
    OURS: with_our_kernels,
    EAGER: with_eager_ops,
    AUTHORS: authors_way,
}


def _cam_by_backward(maps: Tensor, logits: Tensor, pids: Tensor) -> Tensor:
    """Grad-CAM [N, H, W] of `maps` for the sum of each sample's own logit."""
    gradients: list[Tensor] = []
    handle = maps.register_hook(gradients.append)
    logits.gather(1, pids[:, None]).sum().backward(retain_graph=True)
    handle.remove()
    weights = gradients[0].mean((2, 3), keepdim=True)
    return (weights * maps.detach()).sum(1).relu()


def _maps(model: PMM, images: Tensor) -> tuple[Tensor, Tensor]:
    f1 = model.backbone(images)
    return f1, model.bottleneck(f1)


def _largest(x: Tensor) -> Tensor:
    return F.adaptive_max_pool2d(x, 1).flatten(1)


def _output(model: PMM, pooled: tuple[Tensor, ...]) -> TrainOutput:
    outputs = [head(p) for head, p in zip(model.stages, pooled, strict=True)]
    return TrainOutput(features=tuple(f for f, _ in outputs), logits=tuple(z for _, z in outputs))


class _Proof(NamedTuple):
    """Relative distances of loss and gradient from the true ones."""

    loss: float
    gradient: float

    @property
    def equal(self) -> bool:
        return self.loss <= SAME_LOSS and self.gradient <= SAME_GRADIENT

    def __str__(self) -> str:
        return f"loss within {self.loss:.1e}, gradient within {self.gradient:.1e} (relative)"


class _Way(nn.Module):
    """A model with another forward in training."""

    def __init__(self, model: nn.Module, forward: Forward) -> None:
        super().__init__()
        self.model, self.way = model, forward

    def forward(self, images: Tensor, pids: Tensor, generator: torch.Generator | None = None) -> TrainOutput:
        return self.way(self.model, images, pids, generator)  # type: ignore[arg-type]


def step_config(
    batch: int, backbone: Literal["resnet50", "resnet10"], amp: Literal["off", "bf16", "fp16"] = "off"
) -> Config:
    paper = preset("paper")
    images = paper.recipe.images_per_id
    if batch < 2 * images or batch % images:
        raise InvalidValue("--step-batch", batch, f"a multiple of {images}, and {2 * images} or more")
    model = dataclasses.replace(paper.model, backbone=backbone, weights="none", num_classes=CLASSES)
    return dataclasses.replace(paper, model=model, recipe=dataclasses.replace(paper.recipe, batch_size=batch, amp=amp))


def random_crops(config: Config, device: torch.device, seed: int = 1) -> TrainBatch:
    """Random crops; each identity has a base that its images share."""
    recipe, shape = config.recipe, (config.data.height, config.data.width, 3)
    generator = torch.Generator().manual_seed(seed)
    bases = torch.randn(recipe.ids_per_batch, 1, *shape, generator=generator)
    images = bases + 0.5 * torch.randn(recipe.ids_per_batch, recipe.images_per_id, *shape, generator=generator)
    crops = (128 + 50 * images).clamp(0, 255).to(torch.uint8).flatten(0, 1)
    labels = torch.arange(recipe.ids_per_batch).repeat_interleave(recipe.images_per_id)
    none, zeros = torch.zeros(len(crops), dtype=torch.bool), torch.zeros_like(labels)
    batch = TrainBatch(crops, none, zeros[:, None].repeat(1, 4), labels, torch.arange(len(crops)))
    return TrainBatch(*(part.to(device) for part in batch))


def _proofs(model: nn.Module, crops: TrainBatch, preprocessing: Preprocessing) -> dict[str, _Proof]:
    """How far each way is from ours with the same partners; without mixing: from ours with k = 0."""
    truth = _loss_and_gradient(model, with_our_kernels, crops, preprocessing)
    with _with_k(model, 0):
        unmixed = _loss_and_gradient(model, with_our_kernels, crops, preprocessing)
    proofs = {}
    for name, forward in WAYS.items():
        expected_loss, expected = unmixed if name == NO_MIXING else truth
        loss, gradient = _loss_and_gradient(model, forward, crops, preprocessing)
        distance = float((gradient - expected).norm() / expected.norm())
        proofs[name] = _Proof(abs(loss / expected_loss - 1), distance)
    return proofs


def _loss_and_gradient(
    model: nn.Module, forward: Forward, crops: TrainBatch, preprocessing: Preprocessing
) -> tuple[float, Tensor]:
    images = normalize_batch(crops, preprocessing, crops.crops.device)
    generator = torch.Generator(images.device).manual_seed(2)
    output = _Way(model, forward).train()(images, crops.labels, generator)
    loss = torch.stack(list(reid_losses(output, crops.labels, label_smoothing=0.1).values())).sum()
    model.zero_grad(set_to_none=True)
    loss.backward()
    gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    model.zero_grad(set_to_none=True)
    return float(loss.detach()), gradient


@contextmanager
def _with_k(model: nn.Module, k: int) -> Iterator[None]:
    before, model.k = model.k, k  # type: ignore[assignment]
    try:
        yield
    finally:
        model.k = before


def _row(name: str, proof: _Proof, times: Mapping[str, Latency]) -> dict[str, Any]:
    against = {OURS: "what the others are compared with", NO_MIXING: f"against ours with k = 0: {proof}"}
    status = "timed" if proof.equal else "wrong"
    row = {"name": name, "status": status, "proof": against.get(name, f"against ours: {proof}")}
    return row | ({"step": timing(times[name])} if proof.equal else {})
