"""A search with the options of the command line, checked before a model is loaded. Loads no torch."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from pmm.embedding.embed import embed_files
from pmm.gallery.crop_files import walk_images
from pmm.gallery.crop_metadata import columns_of_names, name_pattern
from pmm.gallery.embed_job import FILE_COLUMNS, CropTable, embedded_chunks
from pmm.gallery.gallery import Gallery
from pmm.gallery.matches import Matches
from pmm.gallery.model_of import model_of
from pmm.gallery.search import opened_gallery, query_runner
from pmm.gallery.search_options import SearchFilterFlags, camera_of, check_threshold, threshold_of
from pmm.gallery.search_results import FoundCrop, QueryResult, SearchResults
from pmm.gallery.storage.snapshot import Rows
from pmm.gallery.unfinished import JOB_FILE
from pmm.runtime.base import Embeddings, Runner
from pmm.utils.errors import InvalidFile, InvalidInput, InvalidValue, printable
from pmm.utils.facts import how_many
from pmm.utils.files import existing_file


@dataclass(frozen=True, kw_only=True)
class SearchAnswer:
    """What was found for each query, among at least so many `candidates`; `folder` is what the gallery's paths are
    relative to, and `bad` are images that were left out, and why."""

    queries: tuple[Path, ...]
    results: SearchResults
    candidates: int
    folder: Path
    bad: Mapping[Path, str]

    def file_of(self, crop: FoundCrop, folder: Path | None = None) -> Path:
        """Where the crop's image is, if the crops of the gallery are in `folder`."""
        return (folder or self.folder) / str(crop.columns.get("path", crop.id))


@dataclass(frozen=True, kw_only=True)
class SearchRequest:
    """The flags of `pmm search`."""

    query: Path
    model: Path | None = None
    top: int = 10
    threshold: str = ""
    fmr: float | None = None
    rows: SearchFilterFlags = field(default_factory=SearchFilterFlags)
    skip_bad_images: bool = False
    batch_size: int = 64

    def run(self, gallery: Path, *, backend: str = "auto", device: str = "auto", threads: int = 0) -> SearchAnswer:
        """Search the gallery at a path.

        Raises InvalidFile, InvalidValue and InvalidInput for options that do not fit the gallery; all but a model of
        another precision are noticed before a model is loaded.
        """
        files, bad = self._queries()
        if (gallery / JOB_FILE).is_file():
            logging.getLogger("pmm").warning("%s: pmm embed has not finished it: crops are missing", gallery)
        with opened_gallery(gallery) as opened:
            if not len(opened):
                raise InvalidFile("it holds no crops", path=gallery, hint="add some with pmm embed --append")
            where = self.rows.row_filter(opened)
            rows = opened.rows_where(where) if where else opened.rows
            distance, threshold = threshold_of(opened, self.threshold, self.fmr) if self.threshold else (None, None)
            cameras = self._not_camera(opened, files)
            candidates = _candidates(opened, rows, cameras)
            model = model_of(opened.path, opened.source, self.model)
            with query_runner(opened, model, backend=backend, device=device, threads=threads) as (runner, source):
                check_threshold(threshold, source.precision, model)
                files, embeddings = self._embedded(runner, files, bad)
            not_camera = [cameras[file] for file in files] if cameras else None
            matches = opened.search(embeddings, self.top, where=where, not_camera=not_camera)
            results = SearchResults(
                gallery=str(gallery),
                metric=opened.metric,
                results=tuple(_results(opened, self._named(files), matches)),
                threshold=distance,
                origin=threshold,
            )
            return SearchAnswer(
                queries=tuple(files), results=results, candidates=candidates, folder=Path(opened.folder), bad=bad
            )

    def _queries(self) -> tuple[list[Path], dict[Path, str]]:
        """Images to look for, and those that cannot be read and are left out."""
        if not self.query.is_dir():
            return [existing_file(self.query, "an image to look for, or a folder of them")], {}
        walked = walk_images(self.query)
        for line in walked.lines:
            logging.getLogger("pmm").warning("%s: %s", printable(self.query), line)
        return walked.readable(skip_bad_images=self.skip_bad_images)

    def _embedded(self, runner: Runner, files: list[Path], bad: dict[Path, str]) -> tuple[list[Path], Embeddings]:
        """Those that can be read, and their embeddings [Q, D]; the others are put into `bad`."""
        if not self.query.is_dir():
            return files, embed_files(runner, files)
        table = CropTable(ids=[str(file) for file in files], files=files)
        chunks = list(
            embedded_chunks(
                runner, table, bad, folder=self.query, skip_bad_images=self.skip_bad_images, batch_size=self.batch_size
            )
        )
        if not chunks:
            raise InvalidFile(f"none of its {len(bad)} images can be read", path=self.query)
        return [file for crops, _ in chunks for file in crops.files], np.concatenate([each for _, each in chunks])

    def _named(self, files: Sequence[Path]) -> list[str]:
        if not self.query.is_dir():
            return [str(file) for file in files]
        return [file.relative_to(self.query).as_posix() for file in files]

    def _not_camera(self, gallery: Gallery, files: Sequence[Path]) -> dict[Path, str | int]:
        """The camera of each query, if its crops do not count; else empty."""
        if not self.rows.not_same_camera:
            return {}
        if self.rows.query_camera:
            return dict.fromkeys(files, camera_of(gallery, "--query-camera", self.rows.query_camera))
        pattern = name_pattern(self.rows.names)
        if "camera" not in pattern.groupindex:
            raise InvalidValue("--names", self.rows.names, "an expression with a group camera")
        cameras = columns_of_names(pattern, [file.name for file in files], files[0].parent)["camera"]
        return {file: camera_of(gallery, "--names", camera) for file, camera in zip(files, cameras, strict=True)}


def _candidates(gallery: Gallery, rows: Rows, cameras: Mapping[Path, str | int]) -> int:
    """How many of the rows count for every query, at least. Raises InvalidInput if none counts for any."""
    if not cameras:
        return len(rows)
    there = sorted(set(gallery.column("camera").tolist()))
    if strange := sorted({str(camera) for camera in cameras.values() if camera not in there}):
        listed, own = (", ".join(map(str, names[:5])) + ", ..." * (len(names) > 5) for names in (there, strange))
        note = f"no crop is of camera {own}, so none is left out for it; there are {listed}"
        logging.getLogger("pmm").warning("%s: %s", gallery.path, printable(note))
    seen = Counter(gallery.column("camera", rows).tolist())
    counts = {file: len(rows) - seen[camera] for file, camera in cameras.items()}
    if not any(counts.values()):
        file = next(iter(counts))
        raise InvalidInput(
            f"all {how_many(len(rows), 'crop')} to look at are of camera {cameras[file]}, the query's own", path=file,
            hint="leave --not-same-camera out",
        )  # fmt: skip
    return min(counts.values())


def _results(gallery: Gallery, queries: Sequence[str], matches: Matches) -> list[QueryResult]:
    names = [name for name in gallery.columns if name not in FILE_COLUMNS]
    there = matches.rows >= 0
    columns = {name: gallery.column(name, matches.rows[there]).tolist() for name in names}
    ends = np.cumsum(there.sum(1)).tolist()
    found = [
        FoundCrop(id=id_, distance=distance, columns={name: _plain(columns[name][place]) for name in names})
        for place, (id_, distance) in enumerate(
            zip(matches.ids[there].tolist(), matches.distances[there].tolist(), strict=True)
        )
    ]
    return [
        QueryResult(query=query, found=tuple(found[start:end]))
        for query, start, end in zip(queries, [0, *ends], ends, strict=False)
    ]


def _plain(value: Any) -> Any:
    return None if isinstance(value, float) and math.isnan(value) else value
