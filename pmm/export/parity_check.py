"""The parity check: an artifact gets its name only if its embeddings of real crops match the checkpoint's.

Loads no torch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from pmm.artifacts.manifest import EmbeddingContract
from pmm.data.bad_images import load_readable
from pmm.data.preprocessing import Crops, Preprocessing
from pmm.data.readers import read_dataset
from pmm.data.samples import evenly_spaced
from pmm.evaluation.parity.numeric import numeric_parity
from pmm.export.options import MAX_NORM_ERROR, MIN_COSINE, MIN_VERIFICATION_CROPS
from pmm.runtime.base import Embeddings
from pmm.utils.errors import InvalidFile, UserError

VERIFY_CROPS = 64
MIN_BATCH_COSINE = 0.999
"""Least cosine of a row with itself in another batch: kernels differ per batch size, rows must not."""

Embed = Callable[[Crops], Embeddings]


class ParityFailed(UserError):
    """The embeddings differ from the checkpoint's, or depend on the batch."""


@dataclass(frozen=True)
class ParityCheck:
    """Crops [N, H, W, 3] and what they must become, [N, D]."""

    crops: Crops
    expected: Embeddings
    against: str = "the torch checkpoint's"
    """Whose embeddings the expected ones are."""
    allowance: float = 1.0
    """The share of the allowed error that may be used up."""

    @classmethod
    def of(cls, reference: Embed, crops: Crops, embedding: EmbeddingContract) -> ParityCheck:
        """`reference` maps crops to plain embeddings; mirroring and norm are applied here, those of `embedding`."""
        expected = np.asarray(reference(crops), np.float64)
        if embedding.flip_tta:
            expected = (expected + reference(np.ascontiguousarray(crops[:, :, ::-1]))) / 2
        if embedding.normalised:
            expected /= np.maximum(np.linalg.norm(expected, axis=1, keepdims=True), 1e-12)
        return cls(crops, expected.astype(np.float32))

    def sample(self, count: int) -> ParityCheck:
        """The same check on `count` of the crops, evenly spaced."""
        rows = list(evenly_spaced(len(self.crops), count))
        return dataclasses.replace(self, crops=self.crops[rows], expected=self.expected[rows])

    def check(
        self, candidate: Embed, precision: str, name: str, ran_on: str, batches: Sequence[int] = ()
    ) -> dict[str, Any]:
        """Run `candidate` in batches of 1, 3 and N - 4, rows alone, and all at once; the figures for the manifest.

        Args:
            name, ran_on: of the file and of what executed it, for the message and the manifest.
            batches: further ones, of crops that are taken in turn: those that other kernels run in.

        Raises:
            ParityFailed: the worst row's cosine with the expected one is too low for `precision`, its norm is
                another, or a row alone is not the row in its batch.
            UserError: NaN or Inf in the embeddings.
        """
        count = len(self.crops)
        bounds = [0, 1, 4, count] if count > 4 else [0, count]
        rows = np.concatenate([candidate(self.crops[a:b]) for a, b in pairwise(bounds)])
        alone = [count - 1, count // 2]
        rows[alone] = np.concatenate([candidate(self.crops[index : index + 1]) for index in alone])
        parity = numeric_parity(self.expected, rows)
        turns = [np.arange(size) % count for size in (count, *batches)]
        together, indices = np.concatenate([candidate(self.crops[turn]) for turn in turns]), np.concatenate(turns)
        batched = numeric_parity(rows[indices], together)
        batched = dataclasses.replace(batched, worst_row=int(indices[batched.worst_row]))
        # 1 - (1 - c) is not c to the bit
        least_cosine = MIN_COSINE[precision] + (1 - self.allowance) * (1 - MIN_COSINE[precision])
        most_norm_error = self.allowance * MAX_NORM_ERROR[precision]
        least = {self.against: least_cosine,
                 "that of the same row in another batch": min(MIN_BATCH_COSINE, MIN_COSINE[precision])}  # fmt: skip
        for figures, (against, allowed) in zip((parity, batched), least.items(), strict=True):
            if figures.min_cosine < allowed:
                raise ParityFailed(
                    f"parity failed: row {figures.worst_row} has cosine {figures.min_cosine:.7f} with {against}",
                    path=name,
                    expected=f"{allowed} or more for {precision}",
                    hint="nothing was written",
                )
            if figures.max_norm_error > most_norm_error:
                raise ParityFailed(
                    f"parity failed: a row's norm differs by {figures.max_norm_error:.1%} from {against}",
                    path=name,
                    expected=f"{most_norm_error:.2%} or less for {precision}",
                    hint="nothing was written",
                )
        return {
            **dataclasses.asdict(parity),
            "against": self.against,
            "batches": [*(b - a for a, b in pairwise(bounds)), *batches],
            "batch_min_cosine": batched.min_cosine,
            "least_allowed": MIN_COSINE[precision],
            "ran_on": ran_on,
        }


def verification_crops(dataset: str, root: str, size: Preprocessing) -> Crops:
    """Real test crops [N, H, W, 3], evenly over query and gallery of the data set at `root`; those that cannot be read
    are left out, and counted in a line (logger "pmm").

    Raises InvalidFile if there are too few.
    """
    try:
        if not root:
            raise InvalidFile("no data set is named")
        split = read_dataset(dataset, root, flags="verify")
        samples = (*split.query, *split.gallery)
        if len(samples) < MIN_VERIFICATION_CROPS:
            enough = f"at least {MIN_VERIFICATION_CROPS}"
            raise InvalidFile(f"{len(samples)} test crops", path=root, expected=enough)
    except UserError as error:
        hint = "give --verify-root DIR (with --verify-dataset NAME if its layout is another), or --no-verify"
        raise InvalidFile(
            f"no crops to verify the export on ({error.problem})",
            path=error.path or root or None,
            expected=error.expected,
            hint="; or ".join(filter(None, (error.hint, hint))),
        ) from error
    chosen = [samples[index].path for index in evenly_spaced(len(samples), VERIFY_CROPS)]
    return load_readable(chosen, size, least=MIN_VERIFICATION_CROPS)
