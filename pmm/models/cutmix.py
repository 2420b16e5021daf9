"""Methods that mix labels by area: CutMix (Yun et al., ICCV 2019) on feature maps, and A-CutMix of PMM's Table 2."""

from __future__ import annotations

import torch
from torch import Tensor

from pmm.config import ModelConfig
from pmm.models.multi_branch import MultiBranchNet
from pmm.models.output import MixedLabels, TrainOutput
from pmm.models.pmm import PMM
from pmm.ops import hard_mix_select, sample_partners
from pmm.ops.block_ranking import replaced_cells


class CutMix(MultiBranchNet):
    """PMM's stages with CutMix: in training, stages II and III pool X with a box of the partner's X in it.

    Each stage draws partners (of another identity, our reading) and one box for the whole batch; the labels of its
    cross-entropy are mixed by the box's true area. At test both pool X itself.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config, (config.feature_dim,) * 3)

    def train_stages(
        self, f1: Tensor, x: Tensor, average: Tensor, pids: Tensor, generator: torch.Generator | None
    ) -> TrainOutput:
        """With the boxes; `generator` draws partners and boxes."""
        pooled2, labels2 = _mixed(x, pids, generator)
        pooled3, labels3 = _mixed(x, pids, generator)
        return self.heads(average, pooled2, pooled3, mixed=(None, labels2, labels3))


class ACutMix(PMM):
    """PMM with the labels of its cross-entropies mixed by area: the attentive blocks of Hard-Mix, CutMix's labels.

    Direction "replace": the partner's blocks replace the anchor's attentive ones, as in PMM. "paste": the anchor's
    attentive blocks go into the partner's map, so that the partner's label has the larger share; a sample without
    attentive blocks is not mixed. That there are two directions is our reading of Table 2.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.direction = config.direction

    def mixed_max(self, x: Tensor, cam: Tensor, partner: Tensor) -> tuple[Tensor, Tensor]:
        """As `PMM.mixed_max`, in the configured direction."""
        if self.direction == "replace":
            return super().mixed_max(x, cam, partner)
        attentive = replaced_cells(cam, self.block, self.k, self.on_empty)
        taken = ~attentive & attentive.flatten(1).any(1)[:, None, None]
        return hard_mix_select(x, taken, partner).amax((2, 3)), taken

    def labels(self, pids: Tensor, partner: Tensor, taken: Tensor) -> MixedLabels | None:
        """Mixed by the share of the cells."""
        return mixed_labels(pids, partner, taken)


def _mixed(x: Tensor, pids: Tensor, generator: torch.Generator | None) -> tuple[Tensor, MixedLabels]:
    """The maxima [N, C] of the mixed maps, and their labels."""
    partner = sample_partners(pids, generator)
    taken = random_box(x.shape[2], x.shape[3], x.device, generator).expand(len(x), -1, -1)
    return hard_mix_select(x, taken, partner).amax((2, 3)), mixed_labels(pids, partner, taken)


def mixed_labels(pids: Tensor, partner: Tensor, taken: Tensor) -> MixedLabels:
    """The labels of maps whose cells `taken` [N, H, W] are the partner's: shares by true area."""
    return MixedLabels(partner_pids=pids[partner], anchor_share=1 - taken.flatten(1).float().mean(1))


def random_box(height: int, width: int, device: torch.device, generator: torch.Generator | None = None) -> Tensor:
    """True in a box whose share of the map is uniform in [0, 1) before it is clipped: [height, width].

    Its sides are sqrt(1 - lambda) of the map's, rounded to cells, with lambda ~ Beta(1, 1); its centre is uniform over
    the cells. `generator` is on `device` (None: torch's default); nothing is copied to the host.
    """
    side = torch.rand((), generator=generator, device=device).sqrt()  # 1 - lambda is uniform, too
    rows = _span(height, side, device, generator)
    columns = _span(width, side, device, generator)
    return rows[:, None] & columns


def _span(size: int, share: Tensor, device: torch.device, generator: torch.Generator | None) -> Tensor:
    """True for round(size * share) consecutive cells [size] around a uniform centre, clipped at the edges."""
    length = (size * share).round().long()
    start = torch.randint(size, (), generator=generator, device=device) - length // 2
    index = torch.arange(size, device=device)
    return (index >= start) & (index < start + length)
