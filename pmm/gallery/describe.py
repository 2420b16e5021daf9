"""What pmm info prints of a gallery, and of an index of an earlier version: no folders, which name people. Loads no
torch."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from pmm.gallery.gallery import Gallery
from pmm.gallery.npz_index import read_npz_index
from pmm.gallery.storage.manifest import is_gallery
from pmm.gallery.storage.source import EmbeddingSource
from pmm.gallery.unfinished import JOB_FILE, WORK_FOLDER
from pmm.utils.files import sha256


def describe_gallery(path: Path) -> dict[str, Any]:
    """What the gallery at `path` holds, as plain values. Raises InvalidFile as `Gallery.open`."""
    gallery = Gallery.open(path)
    manifest = gallery.manifest
    size = sum(file.size for folder in manifest.folders().values() for file in folder.files.values())
    return {
        "kind": "gallery",
        "format": manifest.format,
        "generation": manifest.generation,
        "size_mb": round(size / 1e6, 3),
        "crops": len(gallery),
        "removed": manifest.stored_rows - len(gallery),
        "chunks": len(manifest.chunks),
        "dimensions": gallery.dim,
        "metric": gallery.metric,
        "stored": gallery.precision,
        "ids": manifest.ids,
        "columns": dict(manifest.columns),
        "unfinished": unfinished_commands(path),
        "thresholds": [
            {name: value for name, value in dataclasses.asdict(each).items() if value not in (None, "")}
            for each in gallery.thresholds
        ],
        "made_by": _source(gallery.source) if gallery.source else None,
    }


def unfinished_commands(path: Path) -> list[str]:
    """The commands that began to fill or to upgrade the gallery at `path`, and have not finished."""
    begun = {"pmm embed": (path / JOB_FILE).exists(), "pmm gallery upgrade": is_gallery(path / WORK_FOLDER)}
    return [command for command, is_begun in begun.items() if is_begun]


def describe_npz(path: Path) -> dict[str, Any]:
    """What the index at `path` holds, as plain values. Raises InvalidFile as `read_npz_index`."""
    index = read_npz_index(path)
    facts = {"kind": "index", "sha256": sha256(path), "images": len(index.paths)}
    return {**facts, "dimensions": index.embeddings.shape[1], **_source(index.source)}


def _source(source: EmbeddingSource) -> dict[str, Any]:
    return {
        **dataclasses.asdict(source),
        "artifact": Path(source.artifact).name,
        "preprocessing": source.preprocessing.facts(),
    }
