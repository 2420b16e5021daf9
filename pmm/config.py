"""Every default of the toolkit: validated, frozen dataclasses and the presets made of them. Loads no torch."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pmm.utils.arguments import Arg
from pmm.utils.errors import ConflictingOptions, InvalidInput, InvalidValue, MissingLibrary, one_of
from pmm.utils.extras import import_library
from pmm.utils.from_dict import from_dict

SYNTHETIC = "synthetic"
BACKBONES = ("resnet50", "resnet50-ibn-a", "resnet10")
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


def _require(condition: bool, name: str, value: object, expected: str) -> None:
    if not condition:
        raise InvalidValue(name, value, expected)


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which people, and the size and scale in which the network sees them."""

    dataset: Annotated[str, Arg("NAME")] = SYNTHETIC
    """Data set: synthetic (drawn the first time), market1501, dukemtmc-reid, cuhk03-np-labeled, cuhk03-np-detected,
    msmt17-v1, msmt17-v2, or folder (one folder of crops per identity; folder:camera/identity for folders of cameras
    above those; of identity, camera, date and any)."""
    root: Annotated[str, Arg("DIR")] = ""
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
            _require(0 < side <= MAX_SIDE, name, side, f"1 to {MAX_SIDE} pixels")
        _require(min(self.std) > 0, "std", self.std, "positive numbers")
        _require(0 <= self.val_identities < 1, "val_identities", self.val_identities, "0 or more, below 1")
        _require(self.workers >= 0, "workers", self.workers, "at least 0")
        _require(self.synthetic_ids >= 2, "synthetic_ids", self.synthetic_ids, "2 or more")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The network and the mix. Sizes that follow from the backbone or the data are not repeated here."""

    method: Annotated[str, Arg("NAME")] = "pmm"
    """Method: pmm, baseline (stage I alone), bdb (Batch DropBlock), cutout-batch, cutout-sample (rectangles of zeros in
    place of the mix), cutmix (a rectangle of the partner, labels mixed) or a-cutmix (pmm's blocks, labels mixed)."""
    backbone: Annotated[str, Arg("NAME")] = "resnet50"
    """Backbone: resnet50, resnet50-ibn-a, resnet10 (16 to 128 channels wide, for CPUs), or timm:NAME, a convolutional
    network of timm (pip install timm) whose last map has stride 16 or 32, as timm:mobilenetv4_conv_small."""
    weights: Literal["auto", "imagenet", "none"] = "auto"
    """Initial weights of the backbone: imagenet (downloaded), none, or auto (imagenet where the backbone has them and
    the data set is not synthetic)."""
    init: Annotated[str, Arg("FILE")] = ""
    """Start from the weights in this file instead: a PMM checkpoint, or one of another toolkit with the same
    backbone."""
    feature_dim: int = 512
    """Dimension of each stage's feature; the embedding is three of them (one for baseline)."""
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

    def __post_init__(self) -> None:
        if self.backbone not in BACKBONES and not re.fullmatch(f"{TIMM}[A-Za-z0-9_.]+", self.backbone):
            raise _no_backbone(self.backbone)
        if self.init and self.weights == "imagenet":
            hint = "leave one out, or use --weights none"
            raise ConflictingOptions("init would replace weights imagenet", "init", "weights", hint=hint)
        _require(0 < self.feature_dim <= 1 << 16, "feature_dim", self.feature_dim, "1 to 65536")
        _require(0 <= self.num_classes <= 1 << 24, "num_classes", self.num_classes, "the number of identities")
        _require(min(self.block) > 0, "block", self.block, "two positive numbers")
        _require(self.k >= 0, "k", self.k, "at least 0")


@dataclass(frozen=True, kw_only=True)
class RecipeConfig:
    """How the network is trained (the defaults are the paper's)."""

    epochs: int = 400
    """Number of epochs; each visits every identity once."""
    batch_size: int = 128
    """Images per batch: identities times --images-per-id."""
    images_per_id: int = 4
    """Images of one identity in a batch."""
    schedule: Literal["paper", "flat-cosine"] = "paper"
    """Learning rate: the paper's steps (stretched to --epochs), or a warm-up, then flat, then a cosine."""
    lr: float = 1e-3
    """Highest learning rate."""
    warmup: float = 0.125
    """For flat-cosine: share of the iterations in which the learning rate rises."""
    flat: float = 0.5
    """For flat-cosine: share of the iterations after which the learning rate falls."""
    weight_decay: float = 5e-4
    """Weight decay of Adam."""
    label_smoothing: float = 0.1
    """Label smoothing of the cross-entropy."""
    flip: float = 0.5
    """Probability of a horizontal flip."""
    shift: int = 0
    """Largest random shift of a crop, in pixels."""
    cutout: float = 0.5
    """Probability of Cutout."""
    cutout_size: tuple[int, int] = (64, 64)
    """Height and width of the Cutout rectangle, in pixels."""
    val_every: int = 1
    """Epochs between two evaluations on the held-out identities; the last epoch is always followed by one."""
    amp: Literal["auto", "off", "bf16", "fp16"] = "auto"
    """Precision of the network: off (fp32), bf16, fp16 (GPUs only), or auto, the fastest of them here. CAMs and losses
    are always in fp32; with off, GPUs of compute capability 8.0 or more round the inputs of convolutions to TF32."""
    deterministic: bool = False
    """On a GPU, use algorithms that repeat to the bit, not the fastest; on a CPU they always repeat."""
    compile: bool = False
    """Compile the network with torch.compile (the first steps take minutes)."""
    accumulate: int = 1
    """Parts that a batch is split into to save memory: whole identities, each part with its own forward and backward
    pass; batch statistics, triplets and partners stay within a part."""
    clip_norm: float = 0.0
    """Largest 2-norm of the gradient over all weights; a larger one is scaled down to it. 0 means no limit."""
    gather: bool = False
    """With several processes: find the triplets in the whole batch, not in the share of each process."""
    sync_bn: bool = False
    """With several GPUs: batch-norm statistics over the whole batch."""
    freeze_backbone: Annotated[int, Arg("EPOCHS")] = 0
    """Train only what follows the backbone in the first EPOCHS epochs, then the whole network; with EPOCHS as in
    --epochs, the backbone is never trained."""
    backbone_lr: Annotated[float, Arg("FACTOR")] = 1.0
    """Learning rate of the backbone, as a factor of that of the other layers."""
    ema: Annotated[float, Arg("DECAY")] = 0.0
    """Average the weights exponentially over the steps, with this decay (0.999, for example; less in the first steps);
    the averages are evaluated and deployed. 0 means no average."""
    eval_every: Annotated[int, Arg("EPOCHS")] = 0
    """Epochs between two evaluations on the test split, and one after the last epoch, which are reported and never used
    to choose best.pth; 0 means none at all."""

    def __post_init__(self) -> None:
        for name in ("val_every", "epochs", "accumulate"):
            _require(getattr(self, name) > 0, name, getattr(self, name), "at least 1")
        expected = "at least 2, for triplets need a positive"
        _require(self.images_per_id > 1, "images_per_id", self.images_per_id, expected)
        whole = self.batch_size >= 2 * self.images_per_id and self.batch_size % self.images_per_id == 0
        expected = f"a multiple of --images-per-id {self.images_per_id} with at least two identities"
        _require(whole, "batch_size", self.batch_size, expected)
        for name in ("lr", "backbone_lr"):
            _require(getattr(self, name) > 0, name, getattr(self, name), "a positive number")
        if self.warmup > self.flat:
            raise ConflictingOptions(f"warmup {self.warmup} is above flat {self.flat}", "warmup", "flat")
        for name in ("warmup", "flat", "flip", "cutout", "label_smoothing"):
            _require(0 <= getattr(self, name) <= 1, name, getattr(self, name), "a number from 0 to 1")
        _require(min(self.cutout_size) > 0, "cutout_size", self.cutout_size, "two positive numbers")
        for name in ("weight_decay", "shift", "clip_norm", "freeze_backbone", "eval_every"):
            _require(getattr(self, name) >= 0, name, getattr(self, name), "at least 0")
        if self.freeze_backbone > self.epochs:
            problem = f"freeze_backbone {self.freeze_backbone} is more than epochs {self.epochs}"
            raise ConflictingOptions(problem, "freeze_backbone", "epochs", hint="change one of them")
        if self.freeze_backbone == self.epochs and self.backbone_lr != 1:
            problem = f"backbone_lr would change nothing: freeze_backbone {self.epochs} is all epochs"
            raise ConflictingOptions(problem, "backbone_lr", "freeze_backbone", hint="leave one of them out")
        _require(0 <= self.ema < 1, "ema", self.ema, "a decay between 0 and 1, or 0 for none")
        self.ids_per_part(1)

    @property
    def divergence_hint(self) -> str:
        """What to do where training diverges, in words."""
        return "lower --lr" if self.schedule == "paper" else "lower --lr or lengthen --warmup"

    @property
    def ids_per_batch(self) -> int:
        """Identities in a batch (P of P x K)."""
        return self.batch_size // self.images_per_id

    def ids_per_part(self, world: int) -> int:
        """Identities in each of the parts that `world` processes cut a batch into.

        Raises ConflictingOptions, with the numbers that would do, if that leaves no whole identities or fewer than two.
        """
        parts = world * self.accumulate
        if self.ids_per_batch % parts == 0 and self.ids_per_batch >= 2 * parts:
            return self.ids_per_batch // parts
        fitting = [n for n in range(1, self.ids_per_batch // 2 + 1) if self.ids_per_batch % n == 0]
        cut = f"{world} process{'es' * (world > 1)} x accumulate={self.accumulate}"
        nearest = parts * max(2, -(-self.ids_per_batch // parts)) * self.images_per_id
        problem = (
            f"a batch of {self.batch_size} is {self.ids_per_batch} identities x {self.images_per_id} images, "
            f"which {cut} cannot share in parts of two or more whole identities"
        )
        expected, hint = f"processes x accumulate of {one_of(map(str, fitting))}", f"or use --batch-size {nearest}"
        raise ConflictingOptions(problem, "batch_size", "accumulate", expected=expected, hint=hint)


@dataclass(frozen=True, kw_only=True)
class Config:
    """One training run, whole: what a checkpoint carries so that no later command needs flags to rebuild it."""

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    recipe: Annotated[RecipeConfig, Arg(group="training")] = field(default_factory=RecipeConfig)
    preset: Annotated[str, Arg("NAME")] = "paper"
    """Set of defaults of the other flags: paper, strong (a current recipe), or tiny and tiny-strong for CPUs."""
    seed: int = 0
    """Seed of the weights, the order of the data, the augmentation and the partners."""

    def __post_init__(self) -> None:
        _require(0 <= self.seed < 1 << 64, "seed", self.seed, "at least 0 and below 2**64")

    def to_dict(self) -> dict[str, Any]:
        """Plain nested dict: numbers, strings and lists only."""
        plain: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(self)))
        return plain

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Config:
        """Inverse of `to_dict`. Raises InvalidInput for an unknown key (naming the known ones) or a wrong type, and
        InvalidValue, ConflictingOptions for values that cannot be used."""
        try:
            return from_dict(cls, _of_this_version(values), "config")
        except ValueError as error:
            raise InvalidInput(str(error)) from error

    def lines(self) -> list[str]:
        """Every value, a line per section."""
        sections: dict[str, list[str]] = {}
        for key, value in _flat(self.to_dict()).items():
            section, _, name = key.rpartition(".")
            sections.setdefault(section or "run", []).append(f"{name or key}={value}")
        return [f"{section}: {', '.join(values)}" for section, values in sections.items()]

    def differences(self, other: Config) -> list[str]:
        """`section.key: value -> value of the other` for every value that differs."""
        before, after = _flat(self.to_dict()), _flat(other.to_dict())
        return [f"{key}: {before[key]} -> {after[key]}" for key in before if before[key] != after[key]]


def _no_backbone(value: str) -> InvalidValue:
    """Of a name that is none of a backbone: what it may have been meant to be."""
    name, choices = re.sub(f"^{TIMM}", "", value, flags=re.IGNORECASE), (*BACKBONES, f"{TIMM}NAME")
    if name != value:
        hint = f"did you mean {TIMM}{name}?" if name else ""
        return InvalidValue("backbone", value, f"{TIMM}NAME, as {TIMM}mobilenetv4_conv_small", hint=hint)
    with contextlib.suppress(MissingLibrary):
        if import_library("timm").is_model(name):
            return InvalidValue("backbone", value, choices=choices, hint=f"did you mean {TIMM}{name}?")
    return InvalidValue("backbone", value, choices=choices)


def _of_this_version(values: Any) -> Any:
    """`values` as this version writes them: the weights' file once had no key of its own, and algorithms on a GPU were
    always deterministic."""
    recipe, model = (values.get(key) if isinstance(values, Mapping) else None for key in ("recipe", "model"))
    if isinstance(recipe, Mapping) and "amp" in recipe and "deterministic" not in recipe:
        values = {**values, "recipe": {**recipe, "deterministic": True}}
    weights = model.get("weights") if isinstance(model, Mapping) else None
    if isinstance(weights, str) and weights not in ("auto", "imagenet", "none"):
        values = {**values, "model": {**model, "weights": "none", "init": weights}}  # type: ignore[dict-item]
    return values


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
    return flat
