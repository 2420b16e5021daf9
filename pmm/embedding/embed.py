"""Crops on disk -> embeddings, the same way for every backend. Loads no torch for an ONNX file or an engine."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from pmm.data.crops import iter_crops
from pmm.data.preprocessing import Crops
from pmm.data.samples import Sample
from pmm.runtime.base import Embeddings, Runner
from pmm.utils.errors import ConflictingOptions, InvalidFile, InvalidValue, UserError


def iter_embeddings(
    runner: Runner,
    files: Sequence[Path],
    *,
    batch_size: int = 64,
    label: str = "",
    flip: bool = False,
    unreadable: dict[int, InvalidFile] | None = None,
) -> Iterator[Embeddings]:
    """Embeddings [B, D] of image files, in order, batch by batch; with a `label`, a progress bar of that name.

    With `flip`, each is the mean of the embeddings of the crop and of its mirror image, normalised again if those are.

    Raises InvalidFile for the first image that cannot be read, unless there is `unreadable` to collect such images (see
    `iter_crops`); ConflictingOptions for `flip` if the model averages by itself; InvalidValue for batch_size < 1.
    """
    from tqdm import tqdm

    if batch_size < 1:
        raise InvalidValue("batch_size", batch_size, "1 or more")
    if flip and runner.embedding.flip_tta:
        raise ConflictingOptions(
            "the file averages with the mirror image already (exported with --flip-tta)", "--flip-test", "--flip-tta",
            hint="leave --flip-test out",
        )  # fmt: skip
    with tqdm(total=len(files), desc=label, unit="img", leave=False, disable=None if label else True) as bar:
        for crops in iter_crops(files, runner.preprocessing, batch_size, unreadable=unreadable):
            batch = runner(crops)
            if flip:
                batch = (batch + runner(np.ascontiguousarray(crops[:, :, ::-1]))) / np.float32(2)
                if runner.embedding.normalised:
                    batch /= np.linalg.norm(batch, axis=1, keepdims=True)
            yield batch
            bar.update(len(crops))


def embed_files(
    runner: Runner,
    files: Sequence[Path],
    *,
    batch_size: int = 64,
    label: str = "",
    flip: bool = False,
    unreadable: dict[int, InvalidFile] | None = None,
) -> Embeddings:
    """Embeddings [N, D] of image files; arguments and errors are those of `iter_embeddings`."""
    embeddings = np.empty((len(files), runner.embedding.dim), np.float32)
    done = 0
    batches = iter_embeddings(runner, files, batch_size=batch_size, label=label, flip=flip, unreadable=unreadable)
    for batch in batches:
        embeddings[done : done + len(batch)] = batch
        done += len(batch)
    return embeddings


def embed_samples(
    runner: Runner,
    samples: Sequence[Sample],
    *,
    batch_size: int = 64,
    label: str = "",
    flip: bool = False,
    unreadable: dict[int, InvalidFile] | None = None,
) -> Embeddings:
    """As `embed_files`, of `samples`. Also raises UserError for NaN or Inf, naming the first file."""
    files = [sample.path for sample in samples]
    embeddings = embed_files(runner, files, batch_size=batch_size, label=label, flip=flip, unreadable=unreadable)
    bad = np.flatnonzero(~np.isfinite(embeddings.sum(1, dtype=np.float64)))
    if len(bad):
        many = f"{len(bad)} of {len(files)} embeddings{f' of {label}' if label else ''}"
        raise UserError(
            f"{many} hold NaN or Inf, the first is that of {files[bad[0]]}", hint="the model or the backend is broken"
        )
    return embeddings


def embed_crops(runner: Runner, crops: Crops, *, batch_size: int = 64) -> Embeddings:
    """Embeddings [N, D] of crops in memory [N, H, W, 3], batch by batch."""
    embeddings = np.empty((len(crops), runner.embedding.dim), np.float32)
    for start in range(0, len(crops), batch_size):
        embeddings[start : start + batch_size] = runner(crops[start : start + batch_size])
    return embeddings
