"""Writes .npz indices as versions before galleries did."""

from __future__ import annotations

import dataclasses
import io
import json
import zipfile
from pathlib import Path

import numpy as np

from pmm.artifacts.manifest import EmbeddingContract
from pmm.data.preprocessing import preprocessing_of
from pmm.gallery.storage.source import EmbeddingSource
from pmm.presets import preset


def source(dim: int, metric: str = "euclidean") -> EmbeddingSource:
    return EmbeddingSource(
        checkpoint_sha256="c" * 64,
        artifact_sha256="a" * 64,
        precision="fp32",
        embedding=EmbeddingContract(dim=dim, normalised=metric == "cosine", metric=metric),  # type: ignore[arg-type]
        preprocessing=preprocessing_of(preset("tiny")),
    )


def npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=True)
    return buffer.getvalue()


def index_members(
    embeddings: np.ndarray, paths: tuple[str, ...] = (), folder: str = "/people", metric: str = "euclidean"
) -> dict[str, bytes]:
    """Name -> content, of each file in the archive."""
    header = {"format": "pmm-index-1", "folder": folder, **dataclasses.asdict(source(embeddings.shape[1], metric))}
    del header["artifact"]
    names = paths or tuple(f"{row:03d}.jpg" for row in range(len(embeddings)))
    return {
        "contract.npy": npy(np.array(json.dumps(header, sort_keys=True))),
        "embeddings.npy": npy(embeddings.astype(np.float32)),
        "paths.npy": npy(np.array(names)),
    }


def write_index(path: Path, members: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path
