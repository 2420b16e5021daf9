"""A selftest of random embeddings: for tests of all that needs no network."""

from __future__ import annotations

import numpy as np

from pmm.selftest.vectors import KnownMistake, Selftest, SelftestCrop, SelftestVectors, Tolerance

ROWS, DIM = 4, 16
NO_ROUNDING = Tolerance(min_cosine=1.0, max_norm_error=0.0)
NAMES = {"bgr": False, "raw": False, "nearest": True}
"""Mistakes, and whether they show only in crops that are resized."""
TOLERANCES = {
    "fp32": Tolerance(min_cosine=0.999999, max_norm_error=1e-4),
    "int8": Tolerance(min_cosine=0.98, max_norm_error=0.1),
}


def made_up(*, normalised=False, artifact_sha256="a" * 64, seed=0, rounding=NO_ROUNDING, **wrong):
    """`wrong`: embeddings of mistakes that are not random."""
    random = np.random.default_rng(seed)
    arrays = {f"crop_{row}": random.integers(0, 256, (6, 4, 3), dtype=np.uint8) for row in range(2)}
    arrays |= {f"crop_{row}": random.integers(0, 256, (9, 7, 3), dtype=np.uint8) for row in (2, 3)}
    arrays["expected"] = random.normal(size=(ROWS, DIM)).astype(np.float32)
    for name, resizes in NAMES.items():
        rows = wrong.get(name, random.normal(size=(ROWS, DIM))).astype(np.float32)
        rows[: 2 if resizes else 0] = arrays["expected"][: 2 if resizes else 0]
        arrays[f"mistake_{name}"] = rows
    if normalised:
        arrays |= {k: a / np.linalg.norm(a, axis=1, keepdims=True) for k, a in arrays.items() if a.ndim == 2}
    return Selftest(
        vectors=SelftestVectors(
            reference="nothing",
            source_sha256="b" * 64,
            height=6,
            width=4,
            normalised=normalised,
            crops=tuple(
                SelftestCrop(name=f"crop-{row}.png", height=arrays[f"crop_{row}"].shape[0],
                             width=arrays[f"crop_{row}"].shape[1])
                for row in range(ROWS)
            ),
            mistakes=tuple(
                KnownMistake(name=name, description=f"did {name}", fix=f"mend {name}", resizes=resizes)
                for name, resizes in NAMES.items()
            ),
            rounding=rounding,
            impossible={"sides": "its crops are square"},
            arrays=arrays,
        ),
        artifact_sha256=artifact_sha256,
        precision="fp32",
        tolerances=TOLERANCES,
    )  # fmt: skip
