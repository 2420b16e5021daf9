"""A model and a data set -> mAP, CMC and mINP. Loads no torch for an ONNX file or an engine."""

from __future__ import annotations

import contextlib
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pmm.data.readers import read_dataset
from pmm.data.samples import ReidDataset
from pmm.data.splits import unrankable
from pmm.embedding.embed_split import embed_split
from pmm.evaluation.distance_blocks import MEMORY_LIMIT
from pmm.evaluation.metrics import ApDefinition, Metric, RankingResult
from pmm.evaluation.ranking import RankingOptions, rank_split
from pmm.evaluation.reranking import Reranking
from pmm.models.registry import method_note
from pmm.runtime.base import Runner
from pmm.runtime.open import open_runner
from pmm.utils.errors import ConflictingOptions, InvalidFile, InvalidInput
from pmm.utils.hardware import check_threads


@dataclass(frozen=True, kw_only=True)
class Evaluation(RankingResult):
    """The metrics of a model on a data set, and what they depend on. Arrays per query are in the order of
    `dataset.query`."""

    dataset: ReidDataset
    """Without the images that were left out."""
    unreadable: Mapping[str, Mapping[Path, str]]
    """Images that were left out, and why, under "query" and "gallery"."""
    backend: str
    """The one that ran: torch, ort-cpu, ..."""
    precision: str
    """It computed in: fp32, tf32, fp16, bf16 or int8."""
    metric: Metric
    """Embeddings were compared by this."""
    ap: ApDefinition
    reranking: Reranking | None
    """None: distances were ranked as they are."""
    flip_test: bool
    """Whether embeddings are the mean of a crop's and its mirror image's."""
    note: str
    """What to print with the figures of this method, if anything."""


def evaluate(
    model: str | Path | Runner,
    dataset: str | ReidDataset,
    root: str | Path = "",
    *,
    metric: Literal["auto"] | Metric = "auto",
    ap: ApDefinition = "standard",
    reranking: Reranking | None = None,
    flip_test: bool = False,
    skip_bad_images: bool = False,
    memory_limit: int = MEMORY_LIMIT,
    backend: str = "auto",
    device: str = "auto",
    batch_size: int = 64,
    threads: int = 0,
) -> Evaluation:
    """Embed the queries and the gallery of a data set, rank the gallery for each query, and score the rankings as
    `pmm.evaluate_ranking` does.

    Args:
        model: a checkpoint, ONNX file, AOTInductor package or engine, or an open runner, which stays open.
        dataset: name of a data set that `pmm check --help` lists, or crops of your own as a `pmm.ReidDataset`.
        root: folder of the data set.
        metric: "euclidean", "cosine", or "auto": the one that the model was trained for.
        ap: definition of average precision, as in `pmm.evaluate_ranking`.
        reranking: re-rank with k-reciprocal neighbours; `pmm.Reranking()` has the values of the paper.
        flip_test: use the mean of the embeddings of each crop and of its mirror image.
        skip_bad_images: leave out images that cannot be read, instead of raising.
        memory_limit: bytes that ranking may use besides the embeddings.
        backend: as `pmm.open_runner`; an open runner has its own.
        device: as `pmm.open_runner`; an open runner has its own.
        batch_size: images per call of the runner.
        threads: CPU threads of the backend and of the ranking (0: their defaults).

    Returns:
        mAP, mINP, cmc [50], per_query_ap [Q] and others, all as fractions in 0..1.

    Raises:
        InvalidFile: no data set there, images that cannot be read (all are named), no query with a match, or a model
            that fails its checks.
        InvalidInput: no query with a match in a `ReidDataset` of your own.
        InvalidValue: an unknown data set, metric, ap, backend or device; batch_size < 1.
        ConflictingOptions: a flip test of a file that does it itself, or a backend or device for an open runner.
        OutOfMemory: the memory limit is too small; the least that works is its `expected`.
        BackendUnavailable: a library or a device is missing here.
        UserError: embeddings with NaN or Inf.

    Examples:
        >>> result = pmm.evaluate("best.onnx", "market1501", "market", device="cpu")
        >>> print(f"mAP {result.mAP:.1%}, rank-1 {result.rank1:.1%}, rank-5 {result.cmc[4]:.1%}")
        mAP ...%, rank-1 ...%, rank-5 ...%
        >>> len(result.per_query_ap) == len(result.dataset.query), result.backend, result.metric
        (True, 'ort-cpu', 'euclidean')
    """
    if isinstance(model, Runner) and (backend, device) != ("auto", "auto"):
        problem = "{backend} and {device} are those of the open runner"
        raise ConflictingOptions(problem, "backend", "device", hint="leave them out, or give the file")
    check_threads(threads)
    folder = Path(root)
    split = read_dataset(dataset, root) if isinstance(dataset, str) else dataset
    _check_rankable(split, folder)
    opened = (
        contextlib.nullcontext(model)
        if isinstance(model, Runner)
        else open_runner(model, backend, device=device, threads=threads)
    )
    with opened as runner:
        options = RankingOptions(
            metric=runner.embedding.metric if metric == "auto" else metric,
            ap=ap,
            reranking=reranking,
            memory_limit=memory_limit,
            threads=threads,
        )
        options.check(split, runner.embedding.dim)
        embedded = embed_split(
            runner, split, folder, skip_bad_images=skip_bad_images, batch_size=batch_size, flip=flip_test
        )
    if any(embedded.bad.values()):
        _check_rankable(embedded.split, folder)
    label = "re-ranking" if reranking else ""
    return Evaluation(
        **vars(rank_split(embedded.split, embedded.query, embedded.gallery, options, label=label)),
        dataset=embedded.split,
        unreadable=embedded.bad,
        backend=runner.info.backend,
        precision=runner.info.precision,
        metric=options.metric,
        ap=ap,
        reranking=reranking,
        flip_test=flip_test or runner.embedding.flip_tta,
        note=method_note(runner.method),
    )


def _check_rankable(split: ReidDataset, folder: Path) -> None:
    """Raises InvalidFile, or InvalidInput for crops of no known data set, if figures would be meaningless."""
    if why := unrankable(split.query, split.gallery):
        hint = f"pmm check --dataset {split.name} --root {shlex.quote(str(folder))} lists all problems"
        raise InvalidFile(why, path=folder, hint=hint) if split.name else InvalidInput(why)
