"""Where a model looks: class activation maps of crops, per classifier, of one model or of several side by side."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor, nn

from pmm.data.preprocessing import Crops, Preprocessing
from pmm.models.output import Evidence
from pmm.ops.mixed_cam import cam
from pmm.runtime.eager import Normalise
from pmm.visualize.heat import heated, resized, scale
from pmm.visualize.sheet import HEIGHT, Group, Panel, sheet, text_size

SCALE_WORDS = "0 to the largest of each map"


class StageCam(NamedTuple):
    """What one classifier looks at in a batch."""

    cam: npt.NDArray[np.float32]
    """Class activation maps [N, h, w] of `classes`."""
    classes: npt.NDArray[np.int64]
    """Training label [N] that each map explains."""
    share: npt.NDArray[np.float32]
    """Softmax share of that label [N], in 0..1."""
    stride: int
    """Pixels of the crop per cell of the map."""
    name: str = ""
    """Of the classifier, and on a second line of what it is fed."""


@dataclass(frozen=True, kw_only=True)
class View:
    """One model's maps of the crops on a sheet."""

    title: str
    crops: Crops
    """uint8 [N, H, W, 3], as this model sees them."""
    stages: Sequence[StageCam]
    names: Mapping[int, str] = field(default_factory=dict)
    """The name of a training label."""
    faces: Mapping[int, Crops] = field(default_factory=dict)
    """A crop of a training label, uint8 [H, W, 3]."""


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Eval mode and no gradients; afterwards every module is in the mode it was in."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def to_model(model: nn.Module, crops: Crops, preprocessing: Preprocessing) -> Tensor:
    """uint8 [N, H, W, 3] -> normalised images [N, 3, H, W], where the model is."""
    parameter = next(model.parameters())
    normalise = Normalise(preprocessing).to(parameter.device)
    return normalise(torch.from_numpy(np.ascontiguousarray(crops)).to(parameter.device)).to(parameter.dtype)


def stage_cams(model: Any, images: Tensor, classes: Tensor | None = None) -> list[StageCam]:
    """What each classifier of `model` (see `pmm.models.output.ReidModel.evidence`) looks at, at test time.

    Args:
        model: its state is not changed.
        images: normalised [N, 3, H, W], on the model's device.
        classes: training labels to explain [N] (default: what each classifier predicts, the largest of its logits).
    """
    with eval_mode(model), torch.enable_grad():
        return [_stage_cam(evidence, classes, model.backbone.stride) for evidence in model.evidence(images)]


def _stage_cam(evidence: Evidence, classes: Tensor | None, stride: int) -> StageCam:
    """Grad-CAM, or a sum by the evidence's own weights; no more of a cell than the classifier sees."""
    logits, maps = evidence.logits, evidence.maps
    chosen = logits.argmax(1) if classes is None else classes
    picked = logits.gather(1, chosen[:, None])
    if evidence.weights is None:
        (gradient,) = torch.autograd.grad(picked.sum(), maps, retain_graph=True)
        weights = gradient.mean((2, 3))
    else:
        weights = evidence.weights[chosen]
    with torch.no_grad():
        share = logits.float().softmax(1).gather(1, chosen[:, None])[:, 0]
        found = cam(maps, weights).float()
        if evidence.shares is not None:
            found = found * evidence.shares
    heat, labels, shares = (values.cpu().numpy() for values in (found, chosen, share))
    return StageCam(heat, labels, shares, stride, evidence.name)


def cam_picture(names: Sequence[str], views: Sequence[View], *, true: bool, height: int = HEIGHT) -> Image.Image:
    """A row per crop: the crop, then each view's stages, the map over the crop.

    `names` is a line per crop. With `true` the maps explain the identity of the crop; else the identity that the stage
    predicts, with a small crop of it beside the map. `height` is that of a crop in pixels.
    """
    groups = [Group("", ("crop",))]
    groups += [Group(view.title, tuple(stage.name for stage in view.stages)) for view in views]
    rows = []
    for row, name in enumerate(names):
        panels = [Panel(resized(views[0].crops[row], shown_size(views[0].crops, height)), name)]
        panels += [_panel(view, stage, row, true, height) for view in views for stage in view.stages]
        rows.append(panels)
    text = text_size(height)
    return sheet(groups, rows, notes=_notes(views, true), key=Panel(scale(8 * text, text), SCALE_WORDS))


def shown_size(crops: Crops, height: int) -> tuple[int, int]:
    """Width and height, in a picture, of crops uint8 [N, H, W, 3] that are `height` pixels high there."""
    return max(1, round(height * crops.shape[2] / crops.shape[1])), height


def _panel(view: View, stage: StageCam, row: int, true: bool, height: int) -> Panel:
    label, share = int(stage.classes[row]), f"{stage.share[row]:.0%}"
    image = heated(view.crops[row], stage.cam[row], stage.stride, shown_size(view.crops, height))
    empty = "" if stage.cam[row].any() else "no evidence in any cell"
    if true:
        return Panel(image, empty or share)
    face = view.faces.get(label)
    aside = None if face is None else resized(face, shown_size(face[None], height // 2))
    return Panel(image, empty, aside, ("predicted", view.names.get(label, f"label {label}"), share))


def _notes(views: Sequence[View], true: bool) -> list[str]:
    if true:
        return [
            "Training crops: each map shows the evidence for the true identity (a class activation map); below it is "
            "that identity's softmax share."
        ]
    beside = ", with a crop of it and its softmax share beside" if any(view.faces for view in views) else ""
    return [
        "Test identities are new to the classifiers: each map shows the evidence for the training identity that the "
        f"column predicts (a class activation map){beside}."
    ]
