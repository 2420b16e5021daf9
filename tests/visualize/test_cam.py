"""Where a stage looks: the true Grad-CAM, of the identity that is said, and the model as it was."""

import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pmm.data.preprocessing import preprocessing_of
from pmm.models.registry import METHODS, build_model
from pmm.presets import preset
from pmm.visualize.cam import StageCam, View, cam_picture, stage_cams, to_model
from tests.visualize.untouched import untouched

CLASSES = 5


def model_of(method):
    torch.manual_seed(0)
    base = preset("tiny", method)
    return build_model(dataclasses.replace(base, model=dataclasses.replace(base.model, num_classes=CLASSES)))


def fed(model, maps):
    """The logits of each classifier of a model, of the maps that each is fed, written out."""
    if hasattr(model, "stages"):
        first, *others = maps
        pooled = [first.mean((2, 3)), *(F.adaptive_max_pool2d(a, 1).flatten(1) for a in others)]
        return [head(vector)[1] for head, vector in zip(model.stages, pooled, strict=True)]
    if hasattr(model, "necks"):
        parts = zip(model.classifiers, model.necks, maps, strict=True)
        return [classifier(neck(a.mean((2, 3)))) for classifier, neck, a in parts]
    if hasattr(model, "classifier"):
        _, *neck = model.average
        return [model.classifier(nn.Sequential(*neck)(maps[0].mean((2, 3))))]
    logits = []
    for part, (classifier, a) in enumerate(zip(model.classifiers, maps, strict=True)):
        if hasattr(model, "part_classifier"):
            share = model.part_classifier(a)[:, part, None]
            pooled = (a * share).sum((2, 3)) * model.parts / share[0].numel()
        else:
            rows = a.shape[2] // model.parts
            pooled = a[:, :, part * rows : (part + 1) * rows].mean((2, 3))
        reduction = model.reductions[0]
        logits.append(classifier(F.relu(reduction.bn(F.linear(pooled, reduction.conv.weight[:, :, 0])))))
    return logits


def maps_of(model, images):
    """What each classifier looks at."""
    with torch.no_grad():
        f1 = model.backbone(images)
        if hasattr(model, "bottleneck"):
            return [f1, *[model.bottleneck(f1)] * (len(model.stages) - 1)]
        return list(f1) if isinstance(f1, tuple) else [f1] * len(getattr(model, "classifiers", [0]))


def seen(model, maps, part):
    """The share of each cell that goes into what a classifier is fed, [N, h, w] or 1."""
    if hasattr(model, "part_classifier"):
        return model.part_classifier(maps)[:, part].detach()
    if not hasattr(model, "parts"):
        return 1
    height = maps.shape[2] // model.parts
    return torch.arange(maps.shape[2]).div(height, rounding_mode="floor").eq(part)[None, :, None]


def random_statistics(model):
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d | nn.BatchNorm1d):
            module.running_mean.uniform_(-0.5, 0.5)
            module.running_var.uniform_(0.5, 2)
    return model


@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("method", METHODS)
def test_maps_are_grad_cam_by_autograd(method, given):
    """alpha[n, c] = mean over the map of d logit / d map, map = ReLU(sum_c alpha A), through torch's own pooling."""
    model = random_statistics(model_of(method)).double()
    images = torch.randn(4, 3, 128, 64, dtype=torch.float64)
    classes = torch.tensor([4, 0, 2, 2]) if given else None
    found = stage_cams(model, images, classes)
    model.eval()
    maps = maps_of(model, images)
    assert len(found) == len(maps)
    assert len({stage.name for stage in found}) == len(found)
    for number, stage in enumerate(found):
        leaves = [a.clone().requires_grad_() for a in maps]
        logits = fed(model, leaves)[number]
        expected = classes if given else logits.argmax(1)
        assert stage.classes.tolist() == expected.tolist()
        (gradient,) = torch.autograd.grad(logits.gather(1, expected[:, None]).sum(), leaves[number])
        weights = gradient.mean((2, 3))
        if hasattr(model, "necks"):  # the maps of the paper pass the neck by
            weights = model.classifiers[number].weight[expected]
        grad_cam = (weights[:, :, None, None] * maps[number]).sum(1).relu().detach() * seen(model, maps[number], number)
        assert grad_cam.amax() > 0
        np.testing.assert_allclose(stage.cam, grad_cam.numpy(), rtol=1e-5, atol=1e-6 * float(grad_cam.amax()))
        share = logits.softmax(1).gather(1, expected[:, None])[:, 0]
        np.testing.assert_allclose(stage.share, share.detach().numpy(), rtol=1e-5)


def test_a_part_is_said_to_look_at_its_stripe_alone():
    """What lies elsewhere may be as active in the same channels, and yet changes no logit of the part."""
    model = random_statistics(model_of("pcb")).double()
    images = torch.randn(3, 3, 128, 64, dtype=torch.float64)
    found = stage_cams(model, images)
    for part, stage in enumerate(found):
        rows = slice(2 * part, 2 * part + 2)
        assert stage.cam[:, rows].any()
        stage.cam[:, rows] = 0
        assert not stage.cam.any()


@pytest.mark.parametrize("method", ["pmm", "pcb-rpp"])
def test_the_model_is_left_as_it_was(method):
    model = model_of(method)
    images, wrong = torch.randn(3, 3, 128, 64), torch.randn(3, 4, 128, 64)
    with untouched(model):
        stage_cams(model, images)
    with untouched(model), pytest.raises(RuntimeError):
        stage_cams(model, wrong)


def test_crops_become_the_images_of_evaluation():
    config = preset("tiny")
    crops = np.random.default_rng(0).integers(0, 256, (2, 128, 64, 3), np.uint8)
    size = preprocessing_of(config)
    images = to_model(model_of("pmm"), crops, size)
    np.testing.assert_allclose(images.numpy(), size.normalise(crops), atol=1e-5)
    assert to_model(model_of("pmm").double(), crops[:, :, ::-1], size).dtype == torch.float64


def view(title="pmm", faces=None, names=None, cam=None):
    cam = np.ones((1, 8, 4), np.float32) if cam is None else cam
    stage = StageCam(cam, np.array([3]), np.array([0.25], np.float32), 16)
    crops = np.full((1, 128, 64, 3), (10, 200, 30), np.uint8)
    return View(title=title, crops=crops, stages=[stage], names=names or {}, faces=faces or {})


def test_the_identity_that_a_stage_takes_a_crop_for_stands_beside():
    face = np.full((128, 64, 3), (200, 20, 220), np.uint8)
    with_face = cam_picture(["person 1"], [view(faces={3: face}, names={3: "person 44"})], true=False, height=128)
    pixels = np.asarray(with_face)
    assert (pixels == (200, 20, 220)).all(axis=2).sum() == 64 * 32
    assert (pixels == (10, 200, 30)).all(axis=2).sum() == 128 * 64
    without = cam_picture(["person 1"], [view(faces={2: face})], true=False, height=128)
    assert not (np.asarray(without) == (200, 20, 220)).all(axis=2).any()
    # the true identity is on the crop already
    true = cam_picture(["person 1"], [view(faces={3: face})], true=True, height=128)
    assert true.width < with_face.width


def test_an_empty_map_is_told():
    full, empty = (cam_picture(["a"], [view(cam=np.full((1, 8, 4), v, np.float32))], true=True) for v in (1, 0))
    assert empty.size != full.size or (np.asarray(empty)[-120:] != np.asarray(full)[-120:]).any()


def test_models_stand_side_by_side():
    one, two = (cam_picture(["a"], [view(str(i)) for i in range(n)], true=True) for n in (1, 2))
    assert two.width > one.width + 60
    assert two.height <= one.height
