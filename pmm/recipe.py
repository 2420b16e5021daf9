"""How a network is trained: the defaults are those of the paper. Loads no torch."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, Literal

from pmm.utils.arguments import Arg
from pmm.utils.errors import ConflictingOptions, one_of, require


@dataclass(frozen=True, kw_only=True)
class RecipeConfig:
    """How the network is trained (the defaults are the paper's)."""

    epochs: int = 400
    """Number of epochs; each visits every identity once, or with --sampler shuffle every image. On synthetic people a
    run has at most 60, whatever its preset says, unless this says how many."""
    sampler: Literal["pk", "shuffle"] = "pk"
    """Order of the images: pk (identities, each with --images-per-id images) or shuffle (images, each once an epoch),
    for methods without a triplet loss."""
    batch_size: int = 128
    """Images per batch; for pk, identities times --images-per-id."""
    images_per_id: int = 4
    """For pk: images of one identity in a batch."""
    optimizer: Literal["adam", "adamw", "sgd", "nesterov"] = "adam"
    """Optimizer: adam, adamw (with decoupled weight decay, and none of norms and biases), sgd (with momentum 0.9) or
    nesterov (the same with Nesterov's momentum)."""
    schedule: Literal["paper", "flat-cosine", "milestones"] = "paper"
    """Learning rate: the paper's steps (stretched to --epochs), a warm-up, then flat, then a cosine (flat-cosine), or
    a warm-up, then flat, then a tenth after each of --milestones."""
    lr: float = 1e-3
    """Highest learning rate."""
    warmup: float = 0.125
    """For flat-cosine and milestones: share of the iterations in which the learning rate rises."""
    flat: float = 0.5
    """For flat-cosine: share of the iterations after which the learning rate falls."""
    milestones: tuple[float, ...] = ()
    """For milestones: shares of the epochs after which the learning rate falls to a tenth."""
    weight_decay: float = 5e-4
    """Weight decay of the optimizer; adamw multiplies it by the learning rate, so that it needs more, as 0.05."""
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
    rpp_schedule: Literal["authors", "induced"] = "authors"
    """For pcb-rpp: the phases of the authors' code (stripes, then everything), or of the paper's induced training
    (stripes, the part classifier alone, then everything)."""
    aos_pick: Literal["sampling", "hard-1", "random", "no-adversary"] = "sampling"
    """For aos: the window that occludes a crop is drawn by how much it hurts, the one that hurts most, anywhere, or the
    one that hurts least."""
    aos_share: float = 0.5
    """For aos: probability that a crop is occluded in the second training."""
    aos_step: Annotated[int, Arg("PIXELS")] = 10
    """For aos: pixels between two of the windows that are tried on each crop."""
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
            require(getattr(self, name) > 0, name, getattr(self, name), "at least 1")
        expected = "at least 2, for triplets need a positive"
        require(self.images_per_id > 1, "images_per_id", self.images_per_id, expected)
        if self.sampler == "pk":
            whole = self.batch_size >= 2 * self.images_per_id and self.batch_size % self.images_per_id == 0
            expected = f"a multiple of --images-per-id {self.images_per_id} with at least two identities"
            require(whole, "batch_size", self.batch_size, expected)
        for name in ("lr", "backbone_lr"):
            require(getattr(self, name) > 0, name, getattr(self, name), "a positive number")
        if self.schedule != "milestones" and self.warmup > self.flat:
            raise ConflictingOptions(f"{{warmup}} {self.warmup} is above {{flat}} {self.flat}", "warmup", "flat")
        rising = all(before < after for before, after in pairwise((0.0, *self.milestones, 1.0)))
        require(rising, "milestones", self.milestones, "shares between 0 and 1, each larger than the one before it")
        for name in ("warmup", "flat", "flip", "cutout", "label_smoothing", "aos_share"):
            require(0 <= getattr(self, name) <= 1, name, getattr(self, name), "a number from 0 to 1")
        require(min(self.cutout_size) > 0, "cutout_size", self.cutout_size, "two positive numbers")
        require(self.aos_step > 0, "aos_step", self.aos_step, "at least 1 pixel")
        for name in ("weight_decay", "shift", "clip_norm", "freeze_backbone", "eval_every"):
            require(getattr(self, name) >= 0, name, getattr(self, name), "at least 0")
        if self.freeze_backbone > self.epochs:
            problem = f"{{freeze_backbone}} {self.freeze_backbone} is more than {{epochs}} {self.epochs}"
            raise ConflictingOptions(problem, "freeze_backbone", "epochs", hint="change one of them")
        if self.freeze_backbone == self.epochs and self.backbone_lr != 1:
            problem = f"{{backbone_lr}} would change nothing: {{freeze_backbone}} {self.epochs} is all epochs"
            raise ConflictingOptions(problem, "backbone_lr", "freeze_backbone", hint="leave one of them out")
        require(0 <= self.ema < 1, "ema", self.ema, "a decay between 0 and 1, or 0 for none")
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
        """Identities in each of the parts that `world` processes cut a batch into; for shuffle, images.

        Raises ConflictingOptions, with the numbers that would do, if that leaves no whole identities or fewer than two.
        """
        parts = world * self.accumulate
        if self.sampler == "shuffle":
            return self._images_per_part(parts)
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

    def _images_per_part(self, parts: int) -> int:
        if self.batch_size % parts == 0 and self.batch_size >= 2 * parts:
            return self.batch_size // parts
        problem = f"a batch of {self.batch_size} images cannot be shared in {parts} equal parts of two images or more"
        nearest = parts * max(2, -(-self.batch_size // parts))
        expected = f"a multiple of {parts}, processes x accumulate"
        hint = f"use --batch-size {nearest}"
        raise ConflictingOptions(problem, "batch_size", "accumulate", expected=expected, hint=hint)
