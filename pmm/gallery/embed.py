"""Crops on disk -> embeddings, the same way for every backend. Loads no torch for an ONNX file or an engine."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from pmm.data.crops import iter_crops
from pmm.data.preprocessing import Crops
from pmm.data.samples import Sample
from pmm.data.scan import IMAGE_SUFFIXES, image_advice
from pmm.gallery.index import Index, IndexContract
from pmm.runtime.base import Embeddings, Runner
from pmm.runtime.open import open_runner
from pmm.utils.errors import ConflictingOptions, InvalidFile, InvalidValue, UserError, one_of
from pmm.utils.files import sha256


def embed(
    artifact: str | Path,
    folder: str | Path,
    *,
    backend: str = "auto",
    device: str = "auto",
    batch_size: int = 64,
    threads: int = 0,
) -> Index:
    """Embed every image in `folder` and below it, for `pmm.search`.

    Args:
        artifact: checkpoint, ONNX file, AOTInductor package or engine.
        backend, device, threads: as `pmm.open_runner`.
        batch_size: images at once.

    Raises:
        InvalidFile: a folder without images, or a bad image.
        UserError: as `pmm.open_runner`, or NaN or Inf among the embeddings.

    Example:
        >>> index = pmm.embed("best.onnx", "crops")
        >>> index.save("gallery.npz")
        >>> index.embeddings.shape == (len(index), index.contract.embedding.dim)
        True
    """
    files = images_below(Path(folder))  # before a model is loaded for nothing
    with open_runner(artifact, backend, device=device, threads=threads) as runner:
        return embed_folder(runner, contract_of(Path(artifact), runner), Path(folder), files, batch_size=batch_size)


def embed_folder(
    runner: Runner,
    contract: IndexContract,
    folder: Path,
    files: Sequence[Path],
    *,
    batch_size: int = 64,
    label: str = "",
) -> Index:
    """The index of `files`, which are `images_below(folder)`; with a `label`, a progress bar of that name.

    Only the embeddings stay in memory. Raises InvalidFile for a bad image, UserError for NaN or Inf among the
    embeddings, naming the first files.
    """
    embeddings = embed_files(runner, files, batch_size=batch_size, label=label)
    paths = tuple(file.relative_to(folder).as_posix() for file in files)
    return Index(embeddings=embeddings, paths=paths, folder=str(folder.resolve()), contract=contract)


def contract_of(artifact: Path, runner: Runner) -> IndexContract:
    """What embeddings of `artifact`, opened as `runner`, can be compared with."""
    digest = sha256(artifact)
    manifest = getattr(runner, "manifest", None)  # a checkpoint has none: it is where the others come from
    return IndexContract(
        checkpoint_sha256=manifest.source_sha256(digest) if manifest else digest,
        artifact_sha256=digest,
        precision=runner.info.precision,
        embedding=runner.embedding,
        preprocessing=runner.preprocessing,
    )


def images_below(folder: Path) -> list[Path]:
    """Every image in `folder` and below it, in the order of its path; hidden files and folders are left out.

    Folders that are symbolic links are not entered: they may lead round in a circle. Raises InvalidFile if there is no
    image, or a folder that cannot be read.
    """

    def refuse(error: OSError) -> None:
        raise InvalidFile(str(error.strerror), path=error.filename, expected="a folder of images") from error

    files = []
    for place, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        files += [
            Path(place, name)
            for name in names
            if not name.startswith(".") and os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES
        ]
    if not files:
        raise InvalidFile("it holds no image", path=folder, expected=f"files ending in {one_of(IMAGE_SUFFIXES)}")
    for file in files:
        if file.exists() and not file.is_file():  # a pipe would be waited on for ever
            raise InvalidFile("it is no regular file", path=file, expected="an image", hint=image_advice())
    return sorted(files, key=lambda file: file.relative_to(folder).as_posix())


def embed_files(
    runner: Runner, files: Sequence[Path], *, batch_size: int = 64, label: str = "", flip: bool = False
) -> Embeddings:
    """Embeddings [N, D] of image files, in order, batch by batch; with a `label`, a progress bar of that name.

    With `flip` the mean of each crop's and its mirror image's, at length 1 if the runner's are. Raises InvalidFile for
    the first that cannot be read, ConflictingOptions for a `flip` that the file of the runner does by itself.
    """
    from tqdm import tqdm

    if batch_size < 1:
        raise InvalidValue("batch_size", batch_size, "1 or more")
    if flip and runner.embedding.flip_tta:
        raise ConflictingOptions(
            "the file averages with the mirror image already (exported with --flip-tta)", "--flip-test", "--flip-tta",
            hint="leave --flip-test out",
        )  # fmt: skip
    embeddings = np.empty((len(files), runner.embedding.dim), np.float32)
    done = 0
    with tqdm(total=len(files), desc=label, unit="img", leave=False, disable=None if label else True) as bar:
        for crops in iter_crops(files, runner.preprocessing, batch_size):
            batch = runner(crops)
            if flip:
                batch = (batch + runner(np.ascontiguousarray(crops[:, :, ::-1]))) / np.float32(2)
                if runner.embedding.normalised:
                    batch /= np.linalg.norm(batch, axis=1, keepdims=True)
            embeddings[done : done + len(crops)] = batch
            done += len(crops)
            bar.update(len(crops))
    return embeddings


def embed_samples(
    runner: Runner, samples: Sequence[Sample], *, batch_size: int = 64, label: str = "", flip: bool = False
) -> Embeddings:
    """`embed_files` of `samples`. Raises UserError for NaN or Inf too, naming the first file."""
    files = [sample.path for sample in samples]
    embeddings = embed_files(runner, files, batch_size=batch_size, label=label, flip=flip)
    bad = np.flatnonzero(~np.isfinite(embeddings.sum(1, dtype=np.float64)))
    if len(bad):
        many = f"{len(bad)} of {len(files)} embeddings{f' of {label}' if label else ''}"
        raise UserError(
            f"{many} hold NaN or Inf, the first that of {files[bad[0]]}", hint="the model or the backend is broken"
        )
    return embeddings


def embed_crops(runner: Runner, crops: Crops, *, batch_size: int = 64) -> Embeddings:
    """Embeddings [N, D] of crops in memory [N, H, W, 3], batch by batch."""
    embeddings = np.empty((len(crops), runner.embedding.dim), np.float32)
    for start in range(0, len(crops), batch_size):
        embeddings[start : start + batch_size] = runner(crops[start : start + batch_size])
    return embeddings
