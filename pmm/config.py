"""The configuration of a training run: validated, frozen dataclasses of data, model and recipe. Loads no torch."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pmm.recipe import RecipeConfig
from pmm.utils.arguments import Arg
from pmm.utils.errors import ConflictingOptions, InvalidInput, InvalidValue, MissingLibrary, require
from pmm.utils.extras import import_library
from pmm.utils.facts import flattened
from pmm.utils.from_dict import from_dict

SYNTHETIC = "synthetic"
BACKBONE_NAMES = ("resnet50", "resnet50-ibn-a", "resnet10")
"""Those of pmm.models.backbone; timm has more."""
IMAGENET = {"resnet50": "ResNet50_Weights.IMAGENET1K_V1"}
"""Which of them have ImageNet's weights, and torchvision's name of these."""
TIMM = "timm:"
"""Before the name of a network of timm."""
MAX_SIDE = 4096
"""Of a crop, pixels."""
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def fast_mode() -> bool:
    """True if `PMM_FAST=1`: a few epochs, a few identities and short timings, to see that a command works at all."""
    return os.environ.get("PMM_FAST", "0") not in ("", "0")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which people, and the size and scale in which the network sees them."""

    dataset: Annotated[str, Arg("NAME", group="options")] = SYNTHETIC
    """Data set: synthetic (drawn the first time), market1501, dukemtmc-reid, cuhk03-np-labeled, cuhk03-np-detected,
    msmt17-v1, msmt17-v2, or folder (one folder of crops per identity; folder:camera/identity for folders of cameras
    above those; of identity, camera, date and any)."""
    root: Annotated[str, Arg("DIR", group="options")] = ""
    """Folder of the data set, or the folder that has it under its usual name (default: runs/people-IDS-SEED for
    synthetic identities)."""
    synthetic_ids: int = 200
    """Identities per split, where synthetic ones are drawn."""
    synthetic_seed: int = 0
    """Seed of the drawing, where synthetic identities are drawn."""
    height: int = 384
    """Crop height in pixels."""
    width: int = 128
    """Crop width in pixels."""
    mean: tuple[float, float, float] = IMAGENET_MEAN
    """Mean per RGB channel, of pixels in 0..1."""
    std: tuple[float, float, float] = IMAGENET_STD
    """Standard deviation per RGB channel, of pixels in 0..1."""
    val_identities: float = 0.0
    """Share of the training identities that is held out to choose best.pth; with 0, best.pth is last.pth."""
    workers: int = 4
    """Processes that load training images; 0 loads them in the training process."""

    def __post_init__(self) -> None:
        for name, side in (("height", self.height), ("width", self.width)):
            require(0 < side <= MAX_SIDE, name, side, f"1 to {MAX_SIDE} pixels")
        require(min(self.std) > 0, "std", self.std, "positive numbers")
        require(0 <= self.val_identities < 1, "val_identities", self.val_identities, "0 or more, below 1")
        require(self.workers >= 0, "workers", self.workers, "at least 0")
        require(self.synthetic_ids >= 2, "synthetic_ids", self.synthetic_ids, "2 or more")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The network and the mix. Sizes that follow from the backbone or the data are not repeated here."""

    method: Annotated[str, Arg("NAME", group="options")] = "pmm"
    """Method: pmm, baseline (stage I alone), bdb (Batch DropBlock), cutout-batch, cutout-sample (rectangles of zeros in
    place of the mix), cutmix (a rectangle of the partner, labels mixed), a-cutmix (pmm's blocks, labels mixed), pcb
    (Part-based Convolutional Baseline: a classifier per stripe), pcb-rpp (with refined part pooling), aos
    (Adversarially Occluded Samples: trained twice) or cama (branches that attend to different cells)."""
    backbone: Annotated[str, Arg("NAME")] = "resnet50"
    """Backbone: resnet50, resnet50-ibn-a, resnet10 (16 to 128 channels wide, for CPUs), or timm:NAME, a convolutional
    network of timm (pip install timm) whose last map has stride 16 or 32, as timm:mobilenetv4_conv_small."""
    weights: Literal["auto", "imagenet", "none"] = "auto"
    """Initial weights of the backbone: imagenet (downloaded), none, or auto (imagenet where the backbone has them and
    the data set is not synthetic)."""
    last_stride: int = 1
    """Stride of the last layer of a ResNet: 1, or 2 as ResNets have it, for a map of half the rows and columns."""
    init: Annotated[str, Arg("FILE")] = ""
    """Start from the weights in this file instead: a PMM checkpoint, or one of another toolkit with the same
    backbone."""
    feature_dim: int = 512
    """Dimension of each stage's feature, for pcb of each part's; the embedding is three of them (one for baseline)."""
    num_classes: int = 0
    """Training identities; 0 takes their number from the data."""
    neck: Literal["none", "bn"] = "none"
    """Heads: the paper's, or BN-necks (the triplet loss sees the feature before the batch-norm, a classifier without a
    bias and the embedding the one after it)."""
    metric: Literal["euclidean", "cosine"] = "euclidean"
    """How embeddings are compared: as they are, or by cosine (the model and every export normalise them to norm 1)."""
    block: tuple[int, int] = (3, 2)
    """For a-cutmix and pmm: height and width of the blocks that are ranked, in cells of the feature map."""
    k: int = 3
    """For a-cutmix and pmm: blocks that are mixed per sample; 0 trains three heads without mixing."""
    on_empty: Literal["first", "skip"] = "first"
    """For a-cutmix and pmm: samples with an empty CAM have their first k blocks mixed, or none (skip)."""
    direction: Literal["replace", "paste"] = "replace"
    """For a-cutmix: replace the attentive blocks by the partner's, or paste them into the partner's map."""
    parts: int = 6
    """For pcb and pcb-rpp: parts of a person, at first stripes of the map of equal height."""
    reduction: Literal["shared", "independent"] = "shared"
    """For pcb and pcb-rpp: whether the parts share the layer that makes their features, or each has its own."""
    embedding: Literal["g", "h"] = "g"
    """For pcb and pcb-rpp: the embedding is what the parts pool (g), or their features before batch-norm (h)."""
    dropout: float = 0.5
    """For aos, pcb and pcb-rpp: probability of dropout before the classifiers."""
    branches: int = 3
    """For cama: branches, each with a last layer of the ResNet of its own."""
    penalty: float = 5.0
    """For cama: weight of the penalty on cells to which two branches attend; 0 for none."""

    def __post_init__(self) -> None:
        if self.backbone not in BACKBONE_NAMES and not re.fullmatch(f"{TIMM}[A-Za-z0-9_.]+", self.backbone):
            raise _no_backbone(self.backbone)
        if self.init and self.weights == "imagenet":
            hint = "leave one out, or use {weights} none"
            raise ConflictingOptions("{init} would replace {weights} imagenet", "init", "weights", hint=hint)
        require(0 < self.feature_dim <= 1 << 16, "feature_dim", self.feature_dim, "1 to 65536")
        require(0 <= self.num_classes <= 1 << 24, "num_classes", self.num_classes, "the number of identities")
        require(min(self.block) > 0, "block", self.block, "two positive numbers")
        require(self.k >= 0, "k", self.k, "at least 0")
        require(self.last_stride in (1, 2), "last_stride", self.last_stride, "1 or 2")
        if self.last_stride != 1 and self.backbone.startswith(TIMM):
            problem = f"{{last_stride}} {self.last_stride} is for ResNets, and {{backbone}} is {self.backbone}"
            raise ConflictingOptions(problem, "last_stride", "backbone", hint="leave {last_stride} out")
        require(self.parts > 0, "parts", self.parts, "at least 1")
        require(0 <= self.dropout < 1, "dropout", self.dropout, "0 or more, below 1")
        require(self.branches > 1, "branches", self.branches, "at least 2")
        require(self.penalty >= 0, "penalty", self.penalty, "at least 0")


@dataclass(frozen=True, kw_only=True)
class Config:
    """One training run, whole: what a checkpoint carries so that no later command needs flags to rebuild it."""

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    recipe: Annotated[RecipeConfig, Arg(group="training")] = field(default_factory=RecipeConfig)
    preset: Annotated[str, Arg("NAME")] = "paper"
    """Set of defaults of the other flags: paper, strong (BN-necks, warm-up and cosine decay, after Luo et al. 2019 and
    fast-reid), or tiny and tiny-strong for CPUs."""
    seed: Annotated[int, Arg(group="training")] = 0
    """Seed of the weights, the order of the data, the augmentation and the partners."""

    def __post_init__(self) -> None:
        require(0 <= self.seed < 1 << 64, "seed", self.seed, "at least 0 and below 2**64")

    def to_dict(self) -> dict[str, Any]:
        """Plain nested dict: numbers, strings and lists only."""
        plain: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(self)))
        return plain

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Config:
        """Inverse of `to_dict`. Raises InvalidInput for an unknown key (naming the known ones) or a wrong type, and
        InvalidValue, ConflictingOptions for values that cannot be used."""
        try:
            return from_dict(cls, values, "config")
        except ValueError as error:
            raise InvalidInput(str(error)) from error

    def lines(self) -> list[str]:
        """Every value, a line per section."""
        sections: dict[str, list[str]] = {}
        for key, value in flattened(self.to_dict()).items():
            section, _, name = key.rpartition(".")
            sections.setdefault(section or "run", []).append(f"{name or key}={value}")
        return [f"{section}: {', '.join(values)}" for section, values in sections.items()]

    def differences(self, other: Config) -> list[str]:
        """`section.key: value -> value of the other` for every value that differs."""
        before, after = flattened(self.to_dict()), flattened(other.to_dict())
        return [f"{key}: {before[key]} -> {after[key]}" for key in before if before[key] != after[key]]


def _no_backbone(value: str) -> InvalidValue:
    """Of a name that is none of a backbone: what it may have been meant to be."""
    name, choices = re.sub(f"^{TIMM}", "", value, flags=re.IGNORECASE), (*BACKBONE_NAMES, f"{TIMM}NAME")
    if name != value:
        hint = f"did you mean {TIMM}{name}?" if name else ""
        return InvalidValue("backbone", value, f"{TIMM}NAME, as {TIMM}mobilenetv4_conv_small", hint=hint)
    with contextlib.suppress(MissingLibrary):
        if import_library("timm").is_model(name):
            return InvalidValue("backbone", value, choices=choices, hint=f"did you mean {TIMM}{name}?")
    return InvalidValue("backbone", value, choices=choices)
