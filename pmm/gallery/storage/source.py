"""What made the embeddings of a gallery, and so what has to make those of a query. Loads no torch."""

from __future__ import annotations

import dataclasses
import logging
from dataclasses import dataclass
from pathlib import Path

from pmm.artifacts.manifest import EmbeddingContract
from pmm.data.preprocessing import Preprocessing
from pmm.utils.errors import InvalidFile, InvalidInput


@dataclass(frozen=True, kw_only=True)
class EmbeddingSource:
    """The model, the file of it that ran, and how the crops were prepared."""

    checkpoint_sha256: str
    artifact_sha256: str
    """Of the file that ran: the checkpoint itself, an ONNX file or an engine."""
    precision: str
    """It ran in: fp32, tf32, fp16, bf16 or int8."""
    embedding: EmbeddingContract
    preprocessing: Preprocessing
    artifact: str = ""
    """Path of the file that ran, as it was then."""

    def differences(self, other: EmbeddingSource) -> list[str]:
        """`metric cosine, not euclidean`: what keeps embeddings of `other` from being compared with these."""
        differences = []
        if self.checkpoint_sha256 != other.checkpoint_sha256:
            differences.append(f"checkpoint {self.checkpoint_sha256[:12]}..., not {other.checkpoint_sha256[:12]}...")
        mine, others = (
            {**dataclasses.asdict(source.embedding), **source.preprocessing.facts()} for source in (self, other)
        )
        differences += [f"{name} {mine[name]}, not {others[name]}" for name in mine if mine[name] != others[name]]
        return differences


def check_comparable(indexed: EmbeddingSource, query: EmbeddingSource, artifact: Path) -> None:
    """Warn (logger "pmm") if embeddings of the query's `artifact` round differently from the gallery's.

    Raises InvalidFile if they cannot be compared.
    """
    differences = indexed.differences(query)
    if differences:
        raise InvalidFile(
            "it does not fit the gallery: embeddings of different models are not comparable (the gallery has "
            f"{'; '.join(differences)})",
            path=artifact,
            hint="use the artifact that made the gallery, or embed the folder again",
        )
    log = logging.getLogger("pmm")
    if indexed.precision != query.precision:
        precisions = f"the gallery was made in {indexed.precision}, the query in {query.precision}"
        log.warning("%s: %s; distances differ a little", artifact, precisions)
    elif indexed.artifact_sha256 != query.artifact_sha256:
        note = "the gallery was made by another file of the same checkpoint; distances may differ in the last digits"
        log.warning("%s: %s", artifact, note)


def check_added(own: EmbeddingSource | None, given: EmbeddingSource | None, gallery: Path) -> None:
    """Raise InvalidInput unless rows of the source `given` may be added to the gallery at that path, of its `own`."""
    if own is None and given is not None:
        raise InvalidInput("it does not say what made its embeddings", path=gallery, expected="a known source")
    if own is None:
        return
    if given is None:
        problem = "one model made its embeddings, and nothing says what made these"
        raise InvalidInput(problem, path=gallery, hint="give their source; gallery.source if it is the same")
    if differences := own.differences(given):
        raise InvalidInput(
            f"embeddings of different models are not comparable (the gallery has {'; '.join(differences)})",
            path=gallery, expected="embeddings of the source that made the gallery",
        )  # fmt: skip
