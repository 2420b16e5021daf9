"""The crops on which a network is compared with what was adopted of it, and what its embeddings of them must be. Loads
no torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from pmm.data.preprocessing import Crops, Preprocessing
from pmm.runtime.base import Embeddings
from pmm.utils.errors import UserError

PROBES = 8
"""How many."""
UNIT_NORM = 1e-4
"""By which norms may differ from 1 for embeddings to count as normalised."""
BATCHES = (1, 2, 5)
"""Numbers of probes that are run together: each must have the same embedding in all."""
ROUNDING = 1e-4
"""Largest change that the other images of a batch may make to an embedding of an fp32 network, relative to the
differences between embeddings: those alone tell images apart, however large what all have in common is."""
ROUNDING_IN_HALF = 0.05
"""The same of a network with half precision or int8 inside."""
LEAST_SPREAD = 0.1
"""Rounding is relative to the embeddings themselves: of their norm, at least so much counts as differences."""
ALIKE = 1e-3
"""Largest difference between embeddings of unlike crops, relative to their norm, that says that they mean nothing."""


def probes(size: Preprocessing) -> Crops:
    """Coarse patterns of several brightnesses and contrasts [8, H, W, 3]: plain noise would have the same statistics in
    every image, which hides a network that mixes them within a batch."""
    generator = np.random.default_rng(0)
    coarse = generator.random((PROBES, 8, 4, 3))
    bright = np.linspace(0, 1, PROBES).reshape(-1, 1, 1, 1)
    pixels = 255 * (0.3 * bright + coarse * (0.2 + 0.5 * bright[::-1]))
    rows, columns = np.arange(size.height) * 8 // size.height, np.arange(size.width) * 4 // size.width
    return pixels.astype(np.uint8)[:, rows][:, :, columns]


def check_numbers(embeddings: Embeddings, what: str, refuse: Callable[..., UserError]) -> None:
    """Raises what `refuse` makes of a problem and a hint if the embeddings, `what` in messages, are no numbers."""
    if not np.isfinite(embeddings).all():
        hint = "are its weights loaded? are the mean, the std and the scale those that it was trained with?"
        raise refuse(f"NaN or Inf in {what}", hint=hint)


def check_batches(
    embeddings: Embeddings,
    batches: Sequence[Embeddings],
    refuse: Callable[..., UserError],
    *,
    rounding: float = ROUNDING,
) -> None:
    """Raises what `refuse` makes of it if embeddings depend on the other images.

    Args:
        embeddings: of probes, all run together [N, D].
        batches: the same of the first of them, fewer in each run.
        rounding: largest change, relative to the differences between embeddings.
    """
    spread, norm = _spread_and_norm(embeddings)
    apart = max(spread, LEAST_SPREAD * norm, 1e-12)
    change = np.max([np.linalg.norm(each - embeddings[: len(each)], axis=1).max() for each in batches]) / apart
    if not change <= rounding:  # NaN of fewer images
        raise refuse(
            f"its embeddings depend on the batch: the other images change one by {change:.2%} of what tells images "
            "apart",
            expected=f"{rounding:.2%} or less",
            hint="is a batch-norm not in eval mode, or without running statistics?",
        )


def alike(embeddings: Embeddings) -> str:
    """What to say where the embeddings [N, D] of unlike images hardly differ; else empty."""
    spread, norm = _spread_and_norm(embeddings)
    share = spread / max(norm, 1e-12)
    return f"embeddings of unlike images differ by {share:.2%} only: are its weights loaded?" if share < ALIKE else ""


def _spread_and_norm(embeddings: Embeddings) -> tuple[float, float]:
    """Largest distance from the mean embedding, and mean norm."""
    rows = embeddings.astype(np.float64)
    spread = np.linalg.norm(rows - rows.mean(0), axis=1).max()
    return float(spread), float(np.linalg.norm(rows, axis=1).mean())
