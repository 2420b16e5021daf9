"""The selftest that an export writes beside its file. Loads torch only for a checkpoint."""

from __future__ import annotations

import logging

import numpy as np

from pmm.artifacts.artifact import ArtifactDraft
from pmm.artifacts.manifest import EmbeddingContract, InputContract
from pmm.artifacts.onnx_file import OnnxFile
from pmm.artifacts.trained_model import TrainedModel
from pmm.data.crops import load_crops
from pmm.data.preprocessing import Preprocessing
from pmm.export.options import MAX_NORM_ERROR, MIN_COSINE
from pmm.runtime.base import Embeddings, Runner
from pmm.runtime.ort import OrtRunner
from pmm.runtime.trt_variant import TF32_ON
from pmm.selftest.judge import cosines, norm_errors
from pmm.selftest.reference import (
    checkpoint_reference,
    onnx_reference,
    selftest_vectors,
    session_reference,
    with_own_mistakes,
)
from pmm.selftest.vectors import MeasuredDifference, Selftest, SelftestVectors, Tolerance, read_selftest, selftest_files
from pmm.utils.errors import UserError
from pmm.utils.files import sha256

ROOM = 2.0
"""Of the errors that were measured, by which a tolerance is at least: other machines round in other places."""
BROKEN = 4.0
"""Times the errors that exports are allowed; a file that differs more widens no tolerance."""
MIN_COSINE_FP32 = 1 - 1e-6
"""ONNX Runtime, OpenVINO and torch agree to 1e-10; a division by 256, not 255, costs 1e-5."""


def checkpoint_vectors(
    trained: TrainedModel, digest: str, fed: Preprocessing, input: InputContract, embedding: EmbeddingContract
) -> SelftestVectors:
    """The vectors for the export of a checkpoint with these contracts, whose crops are prepared as `fed` says."""
    import torch

    embed = checkpoint_reference(trained.model, trained.preprocessing, fed, input, embedding)
    return selftest_vectors(embed, f"the checkpoint in fp32, torch {torch.__version__}", digest, fed, input, embedding)


def onnx_vectors(file: OnnxFile) -> SelftestVectors | None:
    """The vectors beside an ONNX file of this package, else those that ONNX Runtime computes from the file. None, with
    a warning, if it cannot run the file."""
    import onnxruntime

    try:
        return read_selftest(file.path, file.sha256).vectors
    except UserError:
        pass
    manifest = file.manifest
    reference = (
        f"{'the adopted' if manifest.is_adopted_itself else 'the'} ONNX file, ONNX Runtime {onnxruntime.__version__}"
    )
    digest = manifest.source_sha256(file.sha256)
    try:
        embed = onnx_reference(file.content, manifest, str(file.path))
        return selftest_vectors(embed, reference, digest, manifest.preprocessing, manifest.input, manifest.embedding)
    except Exception as error:  # ONNX Runtime raises its own types where it has no operator of that precision
        logging.getLogger("pmm").warning("%s: no selftest: ONNX Runtime does not run it here (%s)", file.path, error)
        return None


def add_selftest(draft: ArtifactDraft, vectors: SelftestVectors | None, runner: Runner | None = None) -> None:
    """Give `draft`, which is written, the selftest of `vectors`; with what its `runner` makes of the crops, if it runs
    here."""
    if vectors is None or not np.isfinite(vectors.expected).all():
        return
    precision = draft.manifest.precision
    engine, crops = draft.manifest.engine, load_crops(vectors.images, draft.manifest.preprocessing)
    if precision == "fp32" and engine and TF32_ON in engine.flags:
        precision = "tf32"
    if precision == "int8" and isinstance(runner, OrtRunner) and not draft.manifest.is_adopted_itself:
        embed = session_reference(runner.session, draft.manifest)
        vectors = with_own_mistakes(vectors, embed, draft.manifest.preprocessing, draft.manifest.input)
    measured = _measured(vectors.expected, runner(crops), runner.info.provider) if runner else None
    if measured and _is_broken(precision, measured):
        logging.getLogger("pmm").warning(
            "%s: on the crops of its selftest it differs by a cosine of %.4f, and %.1f %% in the norm; it will fail it",
            draft.path, measured.min_cosine, 100 * measured.max_norm_error,
        )  # fmt: skip
    selftest = Selftest(
        vectors=vectors,
        artifact_sha256=sha256(draft.path),
        precision=precision,
        tolerances=tolerances(precision, measured),
        measured=measured,
    )
    try:
        draft.selftest = selftest_files(selftest)
    except ValueError as error:
        logging.getLogger("pmm").warning("%s: no selftest: %s", draft.path, error)


def tolerances(precision: str, measured: MeasuredDifference | None) -> dict[str, Tolerance]:
    """By the precision that a client computes in, of a file of `precision`: the gate of exports, or of the file's own
    precision where that is wider, or of what was `measured` of the file."""
    found = {}
    for name in MIN_COSINE:
        gates = [
            (MIN_COSINE_FP32 if each == "fp32" else MIN_COSINE[each], MAX_NORM_ERROR[each])
            for each in (name, precision)
        ]
        if measured and not _is_broken(precision, measured):
            gates.append((1 - ROOM * (1 - measured.min_cosine), ROOM * measured.max_norm_error))
        found[name] = Tolerance(min_cosine=min(c for c, _ in gates), max_norm_error=max(n for _, n in gates))
    return found


def _is_broken(precision: str, measured: MeasuredDifference) -> bool:
    """Whether a file of `precision` differs by more than what another machine's rounding explains."""
    least, most = MIN_COSINE[precision], MAX_NORM_ERROR[precision]
    return 1 - measured.min_cosine > BROKEN * (1 - least) or measured.max_norm_error > BROKEN * most


def _measured(expected: Embeddings, embeddings: Embeddings, ran_on: str) -> MeasuredDifference | None:
    given, right = np.asarray(embeddings, np.float64), np.asarray(expected, np.float64)
    if not np.isfinite(given).all():
        return None
    return MeasuredDifference(
        min_cosine=float(cosines(given, right).min()),
        max_norm_error=float(norm_errors(given, right).max()),
        ran_on=ran_on,
    )
