"""The model that made a gallery: where it is, whether another file is the same one, and its thresholds. Loads no
torch."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import TYPE_CHECKING

from pmm.artifacts.artifact import read_manifest
from pmm.artifacts.kinds import RUNNABLE, kind_of, require_kind
from pmm.gallery.storage.manifest import StoredPrecision
from pmm.gallery.storage.source import EmbeddingSource, check_comparable
from pmm.gallery.storage.thresholds import Threshold
from pmm.utils.errors import InvalidFile
from pmm.utils.files import existing_file, sha256

if TYPE_CHECKING:
    from pmm.runtime.base import Runner


def source_of(artifact: Path, runner: Runner) -> EmbeddingSource:
    """The source of embeddings that `runner`, opened from `artifact`, computes."""
    digest = sha256(artifact)
    manifest = getattr(runner, "manifest", None)  # a checkpoint has none: it is where the others come from
    return EmbeddingSource(
        checkpoint_sha256=manifest.source_sha256(digest) if manifest else digest,
        artifact_sha256=digest,
        precision=runner.info.precision,
        embedding=runner.embedding,
        preprocessing=runner.preprocessing,
        artifact=str(artifact.resolve()),
    )


def check_artifact(source: EmbeddingSource, artifact: Path) -> None:
    """Raises InvalidFile if `artifact` is another model than the gallery's, as far as its file and manifest tell."""
    kind, digest = require_kind(artifact, *RUNNABLE), sha256(artifact)
    if digest == source.artifact_sha256:
        return
    manifest = None if kind == "checkpoint" else read_manifest(artifact, digest)
    if manifest is None and kind != "checkpoint":
        return  # its manifest is inside
    checkpoint = manifest.source_sha256(digest) if manifest else digest
    if checkpoint != source.checkpoint_sha256:
        other = dataclasses.replace(source, checkpoint_sha256=checkpoint, artifact_sha256=digest)
        check_comparable(source, other, artifact)


def check_gallery_precision(source: EmbeddingSource, new: EmbeddingSource, artifact: Path) -> None:
    """Raises InvalidFile for an artifact that computes in another precision, for which thresholds would not hold."""
    if source.precision != new.precision:
        raise InvalidFile(
            f"it runs in {new.precision}, and the gallery was made in {source.precision}", path=artifact,
            hint=f"add with the file that made it, {source.artifact}",
        )  # fmt: skip


def thresholds_of_manifest(artifact: Path, source: EmbeddingSource, stored: StoredPrecision) -> list[Threshold]:
    """The thresholds that the bench measured for the `artifact` and wrote into its manifest. None for another stored
    precision than the bench's; one line (logger "pmm") then says so."""
    manifest = None if kind_of(artifact) == "checkpoint" else read_manifest(artifact)
    if manifest is None:
        return []
    if stored != "fp32":
        if manifest.thresholds:
            note = f"its thresholds were measured for embeddings in fp32 and are not taken over to {stored}"
            logging.getLogger("pmm").warning("%s: %s; pmm threshold finds others", artifact, note)
        return []
    return [
        Threshold.of_source(
            source, stored, "bench", fmr=point.fmr, distance=point.distance, tpr=point.tpr, data=measured.data
        )
        for measured in manifest.thresholds
        if (measured.precision, measured.metric) == (source.precision, source.embedding.metric)
        for point in measured.points
    ]  # fmt: skip


def model_of(gallery: Path, source: EmbeddingSource | None, given: Path | None = None) -> Path:
    """The file that embeds queries: the one `given`, or the one that made the gallery.

    Raises InvalidFile if it is gone, has changed, or is another model.
    """
    if source is None:
        raise InvalidFile(
            "it does not say what made its embeddings, so none of an image can be compared with them", path=gallery,
            hint="search with embeddings of that model: pmm.Gallery.open(...).search(embeddings)",
        )  # fmt: skip
    if given is not None:
        check_artifact(source, existing_file(given, "a model"))
        return given
    hint = "give --model FILE, the file that made the gallery or another one of the same checkpoint"
    if not source.artifact:
        raise InvalidFile("it does not say where its model is", path=gallery, hint=hint)
    model = Path(source.artifact)
    if not model.is_file():
        raise InvalidFile(f"its model, {model}, is gone", path=gallery, hint=hint)
    if sha256(model) != source.artifact_sha256:
        raise InvalidFile(f"its model, {model}, has changed since", path=gallery, hint=hint)
    return model
