"""The crops on which a network is compared with what was adopted of it. Loads no torch."""

from __future__ import annotations

import numpy as np

from pmm.data.preprocessing import Crops, Preprocessing

PROBES = 8
"""How many."""
UNIT_NORM = 1e-4
"""By which norms may differ from 1 for embeddings to count as normalised."""


def probes(size: Preprocessing) -> Crops:
    """Coarse patterns of several brightnesses and contrasts [8, H, W, 3]: plain noise would have the same statistics in
    every image, which hides a network that mixes them within a batch."""
    generator = np.random.default_rng(0)
    coarse = generator.random((PROBES, 8, 4, 3))
    bright = np.linspace(0, 1, PROBES).reshape(-1, 1, 1, 1)
    pixels = 255 * (0.3 * bright + coarse * (0.2 + 0.5 * bright[::-1]))
    rows, columns = np.arange(size.height) * 8 // size.height, np.arange(size.width) * 4 // size.width
    return pixels.astype(np.uint8)[:, rows][:, :, columns]
