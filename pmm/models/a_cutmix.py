"""A-CutMix: the attentive blocks of Hard-Mix with CutMix's labels (PMM's Table 2; the direction is our reading)."""

from __future__ import annotations

from torch import Tensor

from pmm.config import ModelConfig
from pmm.models.cutmix import mixed_labels
from pmm.models.output import MixedLabels
from pmm.models.pmm import PMM
from pmm.ops import hard_mix_select
from pmm.ops.block_ranking import replaced_cells


class ACutMix(PMM):
    """PMM with the labels of its cross-entropies mixed by area.

    Direction "replace": the anchor's attentive blocks are overwritten with the partner's, as in PMM. "paste": they are
    put into the partner's map, so that the partner's label has the larger share; a sample without any is not mixed.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.direction = config.direction

    def mixed_max(self, x: Tensor, cam: Tensor, partner: Tensor) -> tuple[Tensor, Tensor]:
        """As `PMM.mixed_max`, in this direction."""
        if self.direction == "replace":
            return super().mixed_max(x, cam, partner)
        attentive = replaced_cells(cam, self.block, self.k, self.on_empty)
        taken = ~attentive & attentive.flatten(1).any(1)[:, None, None]
        return hard_mix_select(x, taken, partner).amax((2, 3)), taken

    def labels(self, pids: Tensor, partner: Tensor, taken: Tensor) -> MixedLabels | None:
        """Mixed by the share of the cells."""
        return mixed_labels(pids, partner, taken)
