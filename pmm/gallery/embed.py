"""Crops on disk -> embeddings, the same way for every backend: a checkpoint, an ONNX file or an engine. Loads no torch.

pmm embed ARTIFACT FOLDER -o OUT.npz
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro

from pmm.data.crops import Crops, iter_crops
from pmm.data.readers import IMAGE_SUFFIXES
from pmm.data.samples import Sample, Split, camids_of, pids_of
from pmm.evaluation.distances import MEMORY_LIMIT, Blocks
from pmm.evaluation.metrics import RankingResult, counting_threads, evaluate_distances, evaluate_ranking
from pmm.evaluation.reranking import Reranking, check_memory, reranked
from pmm.gallery.index import Index, IndexContract
from pmm.runtime.base import Embeddings, Runner, open_runner
from pmm.runtime.memory import batch_fits
from pmm.utils import command_line
from pmm.utils.errors import UserError
from pmm.utils.files import output_file, sha256
from pmm.utils.hardware import cuda_index, usable_cores

PROG = "pmm embed"


@dataclass(frozen=True, kw_only=True)
class Command:
    """`pmm embed ARTIFACT FOLDER -o OUT.npz`"""

    artifact: tyro.conf.Positional[Path]
    """Checkpoint (.pth), exported ONNX file (.onnx) or engine (.plan, .engine)."""
    folder: tyro.conf.Positional[Path]
    """Folder of crops: every image in it and below it, but for hidden ones."""
    out: Annotated[Path, tyro.conf.arg(aliases=["-o"])]
    """The index to write (.npz), for pmm search."""
    device: str = "auto"
    """Where to run: auto, cpu, cuda, or cuda:N for the GPU of that number."""
    batch_size: Annotated[int, tyro.conf.arg(aliases=["-b"])] = 64
    """Images at once."""
    threads: int = 0
    """CPU threads of the backend (0: its default)."""


def main() -> None:
    """Entry point."""
    command = command_line.parse(Command, prog=PROG, description=__doc__ or "")
    if command.batch_size < 1:
        raise UserError(f"--batch-size is {command.batch_size}; it must be at least 1")
    command_line.threads(command.threads)
    cuda_index(command.device)
    if command.out.suffix.lower() != ".npz":
        raise UserError(f"--out is {command.out}; give the index a name that ends in .npz")
    images_below(command.folder)  # before a model is loaded for nothing
    output_file(command.out, command.artifact)
    with open_runner(command.artifact, command.device, command.threads) as runner:
        contract = contract_of(command.artifact, runner)
        begin = time.perf_counter()
        index = embed_folder(runner, contract, command.folder, batch_size=command.batch_size, label=PROG)
        seconds = time.perf_counter() - begin
    index.save(command.out)
    info = runner.info
    print(
        f"{command.out}: {len(index)} images, {index.embeddings.shape[1]} dimensions, {len(index) / seconds:.0f} "
        f"images/s with reading, {info.backend} in {info.precision} on {info.device} ({info.provider})"
    )


def embed_folder(
    runner: Runner, contract: IndexContract, folder: Path, *, batch_size: int = 64, label: str = ""
) -> Index:
    """Every image below `folder`, embedded; with a `label`, a progress bar of that name.

    Only the embeddings stay in memory. Raises UserError for a folder without images, a bad image (naming it), or NaN
    or Inf among the embeddings (naming the first files).
    """
    files = images_below(folder)
    embeddings = embed_files(runner, files, batch_size=batch_size, label=label)
    paths = tuple(file.relative_to(folder).as_posix() for file in files)
    return Index(embeddings=embeddings, paths=paths, folder=str(folder.resolve()), contract=contract)


def contract_of(artifact: Path, runner: Runner) -> IndexContract:
    """What embeddings of `artifact`, opened as `runner`, can be compared with."""
    digest = sha256(artifact)
    manifest = getattr(runner, "manifest", None)  # a checkpoint has none: it is where the others come from
    return IndexContract(
        checkpoint_sha256=manifest.checkpoint_sha256 if manifest else digest,
        artifact_sha256=digest,
        precision=runner.info.precision,
        embedding=runner.embedding,
        preprocessing=runner.preprocessing,
    )


def images_below(folder: Path) -> list[Path]:
    """Every image in `folder` and below it, in the order of its path; hidden files and folders are left out.

    Folders that are symbolic links are not entered: they may lead round in a circle. Raises UserError if there is no
    image, or a folder that cannot be read.
    """

    def refuse(error: OSError) -> None:
        raise UserError(f"{error.filename}: {error.strerror}; expected a folder of images") from error

    found = []
    for place, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [
            Path(place, name)
            for name in names
            if not name.startswith(".") and os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES
        ]
    if not found:
        raise UserError(f"{folder} holds no image; expected files ending in {', '.join(IMAGE_SUFFIXES)}")
    for file in found:
        if file.exists() and not file.is_file():  # a pipe would be waited on for ever
            raise UserError(f"{file}: not a readable image (it is no regular file); replace or remove it")
    return sorted(found, key=lambda file: file.relative_to(folder).as_posix())


def embed_files(
    runner: Runner, files: Sequence[Path], *, batch_size: int = 64, label: str = "", flip: bool = False
) -> Embeddings:
    """Embeddings [N, D] of image files, in order, batch by batch; with a `label`, a progress bar of that name.

    With `flip` the mean of each crop's and its mirror image's, at length 1 if the runner's are. Raises UserError for a
    runner that takes that mean by itself.
    """
    from tqdm import tqdm

    if flip and runner.embedding.flip_tta:
        raise UserError("the file averages with the mirror image already (--flip-tta at export); leave --flip-test out")
    size = runner.preprocessing
    embeddings = np.empty((len(files), runner.embedding.dim), np.float32)
    done = 0
    with tqdm(total=len(files), desc=label, unit="img", leave=False, disable=None if label else True) as bar:
        for crops in iter_crops(files, size.height, size.width, batch_size):
            found = _run(runner, crops)
            if flip:
                found = (found + _run(runner, np.ascontiguousarray(crops[:, :, ::-1]))) / np.float32(2)
                if runner.embedding.normalised:
                    found /= np.linalg.norm(found, axis=1, keepdims=True)
            embeddings[done : done + len(crops)] = found
            done += len(crops)
            bar.update(len(crops))
    return embeddings


def _run(runner: Runner, crops: Crops) -> Embeddings:
    """Raises UserError for a batch that is too large for the memory."""
    with batch_fits(len(crops)):
        return runner(crops)


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
            f"{many} hold NaN or Inf, the first that of {files[bad[0]]}; the model or the backend is broken"
        )
    return embeddings


def embed_crops(runner: Runner, crops: Crops, *, batch_size: int = 64) -> Embeddings:
    """Embeddings [N, D] of crops already in memory [N, H, W, 3]."""
    return np.concatenate([runner(crops[start : start + batch_size]) for start in range(0, len(crops), batch_size)])


@dataclass(frozen=True, kw_only=True)
class Ranking:
    """How embeddings are ranked and scored; see `pmm.evaluation.metrics`."""

    metric: str = "euclidean"
    ap: str = "standard"
    reranking: Reranking | None = None
    memory_limit: int = MEMORY_LIMIT
    """Bytes beyond the embeddings."""
    threads: int = 0

    def check(self, split: Split, dim: int) -> None:
        """Raise UserError if the memory limit is too small: before hours of embedding."""
        queries, gallery = len(split.query), len(split.gallery)
        if self.reranking:
            check_memory(queries + gallery, dim, self.reranking, self.memory_limit, self.threads or usable_cores())
        else:
            Blocks.within(self.memory_limit, (queries, gallery), dim, counting_threads(self.threads))


def rank_split(
    split: Split, query: Embeddings, gallery: Embeddings, ranking: Ranking | None = None, *, label: str = ""
) -> RankingResult:
    """`evaluate_ranking` of a split's embeddings (by default: standard AP, Euclidean distance); with a `label`, a
    progress bar of that name for re-ranking."""
    how = ranking or Ranking()
    labels = pids_of(split.query), pids_of(split.gallery), camids_of(split.query), camids_of(split.gallery)
    options: dict[str, Any] = {"ap": how.ap, "memory_limit": how.memory_limit, "threads": how.threads}
    if how.reranking is None:
        return evaluate_ranking(query, gallery, *labels, metric=how.metric, **options)
    distances = reranked(
        query, gallery, metric=how.metric, parameters=how.reranking, memory_limit=how.memory_limit,
        threads=how.threads, label=label,
    )  # fmt: skip
    return evaluate_distances(distances, *labels, **options)


if __name__ == "__main__":
    command_line.run(main, prog=PROG)
