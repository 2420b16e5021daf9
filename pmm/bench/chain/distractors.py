"""A larger gallery than there are crops for: embeddings of made-up people, by a stated model.

Each new person is a mix, Dirichlet(0.5), of three neighbouring identities of the training part (one drawn evenly, and
the two nearest to it), times 1.03; ten crops each are that centre and residuals of training crops, times 1.15, drawn
evenly; clipped at 0 where no embedding of the training part is negative, and at norm 1 where all of these are. The
quantiles of impostor distances come near those of real ones; the extreme tail is thinner (see `impostor_quantiles`).

What is drawn says which identities and crops are mixed, not where they lie: two backends that embed the same training
crops get the same made-up people, each as it would see them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pmm.evaluation.distances import squared_distances
from pmm.utils.arrays import Floats, Ints, Singles
from pmm.utils.errors import InvalidInput

CROPS = 10
"""Of each made-up person."""
NEIGHBOURS = 3
CONCENTRATION = 0.5
EXPANSION = 1.03
SPREAD = 1.15
PEOPLE_AT_ONCE = 1000
QUANTILES = (0.01, 0.05, 0.25, 0.5)
MODEL = (
    f"each person a Dirichlet({CONCENTRATION}) mix of {NEIGHBOURS} neighbouring training identities times {EXPANSION}, "
    f"{CROPS} crops each with residuals of training crops times {SPREAD}"
)


@dataclass(frozen=True, eq=False)
class DistractorRecipe:
    """What is mixed: drawn once, of the training part as the reference embeds it."""

    neighbours: Ints
    """Of each identity itself and its nearest ones [I, 3]."""
    identity: Ints
    """Of each training crop, which identity, from 0 [N]."""
    count: int
    """Rows to make."""
    seed: int = 0

    @classmethod
    def of(cls, train: Floats, pids: Ints, count: int, *, seed: int = 0) -> DistractorRecipe:
        """From embeddings of the training part [N, D] and their identities [N].

        Raises InvalidInput for fewer than three identities.
        """
        known, identity = np.unique(pids, return_inverse=True)
        if len(known) < NEIGHBOURS:
            problem = f"{len(known)} identities in the training part"
            raise InvalidInput(problem, expected=f"{NEIGHBOURS} or more, to make up people from")
        gaps = squared_distances(*[_centroids(train, identity)] * 2)
        np.fill_diagonal(gaps, -1)  # itself first, equal ones after it
        return cls(np.argsort(gaps, axis=1, kind="stable")[:, :NEIGHBOURS], identity, count, seed)

    def rows(self, train: Floats) -> Iterator[Singles]:
        """The made-up embeddings, some thousand rows at a time, where the training crops lie at `train` [N, D]."""
        centroids = _centroids(train, self.identity)
        residuals = np.asarray(train, np.float64) - centroids[self.identity]
        clipped = bool(np.min(train) >= 0)
        normalised = bool(np.allclose(np.linalg.norm(train, axis=1), 1, atol=1e-3))
        for number, start in enumerate(range(0, self.count, CROPS * PEOPLE_AT_ONCE)):
            rng = np.random.default_rng((self.seed, number))  # whoever makes this part alone makes the same
            mixed = self.neighbours[rng.integers(0, len(self.neighbours), PEOPLE_AT_ONCE)]
            weights = rng.dirichlet([CONCENTRATION] * NEIGHBOURS, PEOPLE_AT_ONCE)
            crops = rng.integers(0, len(residuals), (PEOPLE_AT_ONCE, CROPS))
            people = EXPANSION * np.einsum("pn,pnd->pd", weights, centroids[mixed])
            rows = (people[:, None] + SPREAD * residuals[crops]).reshape(-1, train.shape[1])
            rows = rows[: self.count - start]
            if clipped:
                rows = rows.clip(min=0)
            if normalised:
                rows /= np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
            yield rows.astype(np.float32)

    def pids(self, first: int) -> Ints:
        """Identities of the rows [count], from `first` on."""
        return first + np.arange(self.count, dtype=np.int64) // CROPS

    def camids(self, cameras: Ints) -> Ints:
        """Cameras of the rows [count]: the known ones in turn."""
        return np.asarray(cameras, np.int64)[np.arange(self.count) % CROPS % len(cameras)]


def impostor_quantiles(
    query: Floats, gallery: Floats, impostors: npt.NDArray[np.bool_], made_up: Floats
) -> tuple[tuple[float, float, float], ...]:
    """Quantile, the distance of it among pairs of two identities (`impostors` [Q, G]), and among queries with made-up
    rows: what the model gets right."""
    real = np.sqrt(squared_distances(query, gallery).clip(min=0))[impostors]
    made = np.sqrt(squared_distances(query, made_up).clip(min=0))
    both = (np.quantile(each, QUANTILES).tolist() for each in (real, made))
    return tuple((share, float(one), float(other)) for share, one, other in zip(QUANTILES, *both, strict=True))


def _centroids(train: Floats, identity: Ints) -> npt.NDArray[np.float64]:
    sums = np.zeros((int(identity.max()) + 1, train.shape[1]))
    np.add.at(sums, identity, np.asarray(train, np.float64))
    return sums / np.bincount(identity)[:, None]
