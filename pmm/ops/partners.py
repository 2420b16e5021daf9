"""The partner of each sample: another identity of the batch."""

from __future__ import annotations

import torch
from torch import Tensor


def sample_partners(pids: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Draw for each sample a partner, uniform over the batch entries of another identity, independent per sample.

    Args:
        pids: identity of each sample [N], integer; no grouping is assumed.
        generator: random source on the device of pids (None: torch's default).

    Returns:
        Index of the partner [N], int64; a sample without any other identity in the batch gets itself.
    """
    if pids.dim() != 1:
        raise ValueError(f"sample_partners: pids is {list(pids.shape)}; it must be [N]")
    n = len(pids)
    itself = torch.arange(n, device=pids.device)
    if n == 0:
        return itself
    other = pids[:, None] != pids[None, :]
    count = other.sum(1)
    # not torch.rand: given a generator, or None for one, the compiler has no form of it for an N that changes
    share = torch.empty(n, device=pids.device, dtype=torch.float64).uniform_(generator=generator)
    chosen = (share * count).long() + 1
    # the chosen-th other identity's entry is where the running count first reaches it
    partner = (other.cumsum(1) >= chosen[:, None]).to(torch.int8).argmax(1)
    return torch.where(count > 0, partner, itself)
