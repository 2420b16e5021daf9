"""A gallery to a Parquet file, which pyarrow, DuckDB, Spark, LanceDB and others read. Loads no torch."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from pmm.gallery.exports.batches import longest_text, row_batches
from pmm.gallery.gallery import Gallery
from pmm.utils.errors import InvalidInput
from pmm.utils.extras import import_library
from pmm.utils.files import replacing

EMBEDDING = "embedding"
METADATA = b"pmm"
"""Key of what the file says of its embeddings."""


def export_parquet(gallery: Gallery, out: Path) -> None:
    """Write ids, columns and embeddings (lists of D float32); metric and model are in the file's metadata, as JSON.

    Raises MissingLibrary without pyarrow, InvalidFile for an empty gallery, InvalidInput for a column of its own called
    embedding, and for texts that are no UTF-8.
    """
    arrow, parquet = import_library("pyarrow"), import_library("pyarrow.parquet")
    if EMBEDDING in gallery.columns:
        raise InvalidInput(f"a column is called {EMBEDDING}, as the vectors are in the file", path=gallery.path)
    kinds = {"id": gallery.manifest.ids, **gallery.manifest.columns}
    for name in (name for name, kind in kinds.items() if kind == "text"):
        longest_text(gallery, name)
    types = {"text": arrow.string(), "int64": arrow.int64(), "float64": arrow.float64()}
    facts: dict[str, Any] = {"metric": gallery.metric, "stored": gallery.precision, "source": None}
    if gallery.source:
        facts["source"] = {**dataclasses.asdict(gallery.source), "artifact": Path(gallery.source.artifact).name}
    schema = arrow.schema(
        [
            *((name, types[kind]) for name, kind in kinds.items()),
            (EMBEDDING, arrow.list_(arrow.float32(), gallery.dim)),
        ],
        metadata={METADATA: json.dumps(facts).encode()},
    )
    with replacing(out) as temporary, parquet.ParquetWriter(temporary, schema) as writer:
        for batch in row_batches(gallery):
            vectors = arrow.FixedSizeListArray.from_arrays(arrow.array(batch.embeddings.reshape(-1)), gallery.dim)
            columns = [arrow.array(values, types[kinds[name]]) for name, values in batch.columns.items()]
            writer.write_batch(arrow.RecordBatch.from_arrays([*columns, vectors], schema=schema))
