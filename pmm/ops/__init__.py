"""The operations of the mix. Each file holds one op: schema, reference, fake, autograd and the public function."""

from pmm.ops.hard_mix import hard_mix, hard_mix_select
from pmm.ops.hard_mix_max_pool import hard_mix_max_pool
from pmm.ops.mixed_cam import mixed_cam
from pmm.ops.partners import sample_partners
from pmm.utils.build_info import build_info

__all__ = ["build_info", "hard_mix", "hard_mix_max_pool", "hard_mix_select", "mixed_cam", "sample_partners"]
