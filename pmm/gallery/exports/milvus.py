"""A gallery to a collection of Milvus: a file here (milvus-lite), or a server or cluster elsewhere, by one client.

LanceDB was weighed: its open part runs in the process of its user, and a cluster of it is a product to buy; what runs
here on a file of Milvus runs unchanged against a cluster of it. Loads no torch.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from pmm.gallery.exports.batches import RowBatch, longest_text, row_batches
from pmm.gallery.gallery import Gallery
from pmm.utils.errors import CannotWrite, InvalidInput, InvalidValue, reason_of
from pmm.utils.extras import check_installed, import_library

ID, EMBEDDING = "id", "embedding"
MAX_TEXT = 65_535
"""Bytes of a text in Milvus."""


def is_server(target: str) -> bool:
    """Whether `target` is the address of a server, not a file."""
    return "://" in target


def export_milvus(gallery: Gallery, target: str, collection: str = "crops") -> None:
    """Write a new collection with the ids as its primary key, the columns beside, and an exact index (FLAT).

    Milvus gives squared distances (L2), or of a cosine gallery the similarity, 1 - distance. What was written before a
    failure is removed again.

    Args:
        target: a file to make (.db), or a server's address as http://HOST:19530.

    Raises MissingLibrary without pymilvus or, for a file, milvus-lite; CannotWrite if the file or the collection exists
    or Milvus refuses; InvalidFile for an empty gallery; InvalidInput for texts that are too long for it or no UTF-8,
    InvalidValue for a name that no collection can have.
    """
    if not collection.isidentifier() or not collection.isascii():
        raise InvalidValue("--collection", collection, "letters, digits and _, and no digit first")
    server = is_server(target)
    path = None if server else Path(target)
    if path is not None:
        check_installed("milvus_lite")
        if path.suffix != ".db":
            raise CannotWrite("Milvus takes a file for an address", path=path, expected="a name that ends in .db")
        if path.exists():
            raise CannotWrite("it exists already", path=path, hint="give another name, or remove it")
    pymilvus = import_library("pymilvus")
    fields, batches = _fields(gallery), row_batches(gallery, unit=True)
    try:
        with _removed_if_it_fails(path), contextlib.closing(pymilvus.MilvusClient(target)) as client:
            if client.has_collection(collection):
                problem = f"{target} has a collection {collection} already"
                raise CannotWrite(problem, path=path, hint="give another --collection, or drop it")
            try:
                _write(pymilvus, client, gallery, collection, fields, batches)
            except BaseException:
                with contextlib.suppress(Exception):  # what went wrong is told already
                    client.drop_collection(collection)
                raise
    except (pymilvus.MilvusException, OSError, RuntimeError) as error:
        raise CannotWrite(f"Milvus at {target}: {reason_of(error)}", path=path) from error


@contextlib.contextmanager
def _removed_if_it_fails(path: Path | None) -> Iterator[None]:
    """Remove what was made at `path`, which was not there before."""
    try:
        yield
    except BaseException:
        if path is not None and path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        elif path is not None:
            path.unlink(missing_ok=True)
        raise


def _fields(gallery: Gallery) -> dict[str, tuple[str, dict[str, Any]]]:
    """Column -> its type in Milvus, and what that needs."""
    kinds = {ID: gallery.manifest.ids, **gallery.manifest.columns}
    fields: dict[str, tuple[str, dict[str, Any]]] = {}
    for name, kind in kinds.items():
        if name == EMBEDDING:
            raise InvalidInput(f"a column is called {EMBEDDING}, as the vectors are in Milvus", path=gallery.path)
        if kind != "text":
            fields[name] = ("INT64", {}) if kind == "int64" else ("DOUBLE", {})
            continue
        longest = longest_text(gallery, name)
        if longest > MAX_TEXT:
            problem = f"the longest text of {name} has {longest:,} bytes"
            raise InvalidInput(problem, path=gallery.path, expected=f"{MAX_TEXT:,} at most, for Milvus")
        fields[name] = "VARCHAR", {"max_length": max(64, longest)}
    return fields


def _write(
    pymilvus: Any,
    client: Any,
    gallery: Gallery,
    collection: str,
    fields: dict[str, tuple[str, dict[str, Any]]],
    batches: Iterator[RowBatch],
) -> None:
    schema = client.create_schema(auto_id=False, enable_dynamic_field=False)
    for name, (kind, options) in fields.items():
        key = {"is_primary": True} if name == ID else {"nullable": True} if kind == "DOUBLE" else {}
        schema.add_field(name, getattr(pymilvus.DataType, kind), **key, **options)
    schema.add_field(EMBEDDING, pymilvus.DataType.FLOAT_VECTOR, dim=gallery.dim)
    index = client.prepare_index_params()
    metric = "COSINE" if gallery.metric == "cosine" else "L2"
    index.add_index(EMBEDDING, index_type="FLAT", metric_type=metric)
    client.create_collection(collection, schema=schema, index_params=index)
    for batch in batches:
        columns = {
            # Milvus has no NaN, but numbers that are not there
            name: [None if value != value else value for value in values.tolist()]
            for name, values in batch.columns.items()
        }
        columns[EMBEDDING] = list(np.ascontiguousarray(batch.embeddings))
        client.insert(collection, [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)])
    client.flush(collection)
    client.load_collection(collection)
