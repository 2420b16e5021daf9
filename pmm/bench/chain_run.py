"""The chain of a bench run: which artifact it goes on with, its larger gallery, its gates, and thresholds on disk."""

from __future__ import annotations

import dataclasses
import math
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np

from pmm.artifacts.artifact import write_thresholds
from pmm.artifacts.measured_thresholds import MeasuredPoint, MeasuredThresholds
from pmm.artifacts.origin import manifest_of
from pmm.bench.accuracy import AccuracyEvaluator
from pmm.bench.candidate_evaluator import CandidateEvaluator
from pmm.bench.candidates import Candidate
from pmm.bench.chain.distractors import NEIGHBOURS, DistractorRecipe, impostor_quantiles
from pmm.bench.chain.gates import chain_failures
from pmm.bench.chain.measure import ChainTask, measure_chain
from pmm.bench.chain_schema import TARGETS
from pmm.bench.pages.queries import completed, shipping
from pmm.bench.request import ChainOptions, Request
from pmm.bench.result_schema import Result
from pmm.bench.schema import BenchReport
from pmm.data.samples import ReidDataset, pids_of
from pmm.evaluation.parity.labels import Labels, QueryGallery
from pmm.evaluation.parity.thresholds import MIN_ACCEPTED
from pmm.utils.arrays import Floats
from pmm.utils.errors import InvalidInput, InvalidValue, UserError
from pmm.utils.files import make_folder

SAMPLED = 2000
"""Made-up rows that quantiles are taken of."""


def add_chain(
    report: BenchReport,
    request: Request,
    evaluator: CandidateEvaluator,
    accuracy: AccuracyEvaluator,
    *,
    threads: int,
    on_progress: Callable[[str], None],
) -> BenchReport:
    """`report` with the chain and the gates that it fails; the thresholds are written beside the exported files.

    The chain goes on with the fastest result that may ship, else the fastest that ran, else the reference. Raises
    UserError where the data set is too small for a threshold, or the training part for distractors.
    """
    result = next(iter([*shipping(report), *(r for r in completed(report) if r.name != report.reference)]), None)
    result = result or report.result(report.reference)
    assert result is not None
    candidate = next(each for each in request.candidates if each.name == result.name)
    folder = make_folder(request.out / "unfinished" / "chain")
    shutil.rmtree(folder)
    make_folder(folder)
    task = _task(request, evaluator, accuracy, candidate, result, folder)
    plan = request.options.plan
    chain = measure_chain(
        task,
        folder,
        indexes=request.chain.names,
        required=request.chain.required,
        plan=dataclasses.replace(plan, samples=min(plan.samples, 200), budget=min(plan.budget, 5.0)),
        threads=threads,
        on_progress=lambda text: on_progress(f"gallery: {text}"),
    )
    broken = list(chain_failures(chain, request.gates, queries=accuracy.evaluable))
    links = tuple(
        dataclasses.replace(link, failed_gates=tuple(dict.fromkeys(f.gate for f in broken if f.result == link.name)))
        for link in chain.links
    )
    required = {link.name for link in links if link.required or link.status == "failed"}
    failures = (*report.gates.failures, *(failure for failure in broken if failure.result in required))
    keep_thresholds(report)
    return dataclasses.replace(
        report,
        chain=dataclasses.replace(chain, links=links),
        gates=dataclasses.replace(report.gates, failures=failures),
        seconds=report.seconds + chain.seconds,
    )


def check_chain(options: ChainOptions, split: ReidDataset) -> None:
    """Before anything is measured: there are pairs enough for a threshold, and a gallery that grows has people to make
    others from.

    Raises InvalidValue, or InvalidInput for a data set that is too small.
    """
    if not options.gallery:
        return
    of_pid = Counter(sample.pid for sample in split.gallery)
    impostor = sum(len(split.gallery) - of_pid[sample.pid] for sample in split.query)
    needed = MIN_ACCEPTED * round(1 / options.target_fmr)
    if impostor < needed:
        rate = f"a false match rate of {options.target_fmr:g}"
        problem = f"the data set has {impostor:,} pairs of different identities, too few for {rate}"
        lower = [x for x in TARGETS if x > options.target_fmr and impostor >= MIN_ACCEPTED * round(1 / x)]
        hint = f"give --target-fmr {min(lower):g}" if lower else "leave --gallery out"
        raise InvalidInput(problem, expected=f"{needed:,} or more", hint=hint)
    size, crops = options.gallery_size, len(split.gallery)
    if size and size <= crops:
        raise InvalidValue("--gallery-size", size, f"more than the {crops:,} crops that there are")
    known = len({sample.pid for sample in split.train})
    if size and known < NEIGHBOURS:
        problem = f"{known} identities in the training part"
        raise InvalidInput(problem, expected=f"{NEIGHBOURS} or more, to make up people from")


def keep_thresholds(report: BenchReport) -> list[Path]:
    """Write the thresholds of each result into the manifest beside its file; returns the files. Of results that share a
    file and a precision the first counts."""
    written: dict[tuple[str, str], Path] = {}
    for result in report.results:
        measured = thresholds_for_manifest(report, result)
        if measured is None or result.artifact is None or (result.artifact, result.precision) in written:
            continue
        path = Path(result.artifact)
        if path != Path(report.checkpoint.path) and write_thresholds(path, measured):
            written[result.artifact, result.precision] = path
    return list(written.values())


def thresholds_for_manifest(report: BenchReport, result: Result) -> MeasuredThresholds | None:
    """What a manifest keeps of a result; None without thresholds."""
    found = result.thresholds
    if found is None or result.artifact is None:
        return None
    path = Path(result.artifact)
    if path == Path(report.checkpoint.path) and report.checkpoint.kind == "checkpoint":
        return None
    metric = manifest_of(path).embedding.metric
    return MeasuredThresholds(
        precision=result.precision,
        metric=metric,
        data=report.dataset.name,
        data_digest=report.dataset.digest,
        genuine=found.genuine,
        impostor=found.impostor,
        points=found.measured(metric),
    )


def _task(
    request: Request,
    evaluator: CandidateEvaluator,
    accuracy: AccuracyEvaluator,
    candidate: Candidate,
    result: Result,
    folder: Path,
) -> ChainTask:
    point = _deployed(result, request.chain.target_fmr)
    extra = max(0, request.chain.gallery_size - len(accuracy.split.gallery))
    train = accuracy.split.train if extra else ()
    reference, artifact, *of_train = evaluator.chain_embeddings(candidate, train)
    labels = accuracy.labels
    quantiles: tuple[tuple[float, float, float], ...] = ()
    if extra:
        recipe = DistractorRecipe.of(of_train[0], pids_of(train), extra)
        quantiles = _quantiles(artifact, labels, recipe, of_train[1])
        larger = _enlarged(reference, recipe, of_train[0], folder / "reference.npy")
        same = artifact is reference
        artifact = larger if same else _enlarged(artifact, recipe, of_train[1], folder / "artifact.npy")
        reference = larger
        labels = _enlarged_labels(labels, recipe)
    return ChainTask(
        reference=request.reference.name,
        artifact=candidate.name,
        of_reference=reference,
        of_artifact=artifact,
        labels=labels,
        normalised=evaluator.open(candidate)["normalised"],
        threshold=point.distance,
        target_fmr=point.fmr,
        distractors=extra,
        impostor_quantiles=quantiles,
    )


def _deployed(result: Result, target: float) -> MeasuredPoint:
    """The point of the target rate, a Euclidean distance. Raises UserError without one."""
    for point in result.thresholds.measured("euclidean") if result.thresholds else ():
        if math.isclose(point.fmr, target):
            return point
    problem = f"{result.name} has no threshold for a false match rate of {target:g}"
    raise UserError(f"{problem}: too many pairs of different identities are equal", hint="give a higher --target-fmr")


def _enlarged(embedded: QueryGallery, recipe: DistractorRecipe, train: Floats, path: Path) -> QueryGallery:
    """With made-up rows after the gallery's; in a file, which is memory-mapped."""
    real = embedded.gallery
    shape = (len(real) + recipe.count, real.shape[1])
    rows = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=shape)
    rows[: len(real)] = real
    place = len(real)
    for made in recipe.rows(train):
        rows[place : place + len(made)] = made
        place += len(made)
    rows.flush()
    return QueryGallery(embedded.query, np.load(path, mmap_mode="r", allow_pickle=False))


def _enlarged_labels(labels: Labels, recipe: DistractorRecipe) -> Labels:
    first = 1 + int(max(labels.query_pids.max(), labels.gallery_pids.max()))
    cameras = np.unique(labels.gallery_camids)
    return dataclasses.replace(
        labels,
        gallery_pids=np.concatenate([labels.gallery_pids, recipe.pids(first)]),
        gallery_camids=np.concatenate([labels.gallery_camids, recipe.camids(cameras)]),
    )


def _quantiles(
    embedded: QueryGallery, labels: Labels, recipe: DistractorRecipe, train: Floats
) -> tuple[tuple[float, float, float], ...]:
    impostors = labels.query_pids[:, None] != labels.gallery_pids
    sample = dataclasses.replace(recipe, count=min(recipe.count, SAMPLED))
    return impostor_quantiles(*embedded, impostors, np.concatenate(list(sample.rows(train))))
