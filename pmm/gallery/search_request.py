"""A search as the command line asks for it: refused before a model is loaded, answered with all facts. Loads no
torch."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pmm.gallery.crop_files import first_look, images_below, refuse_bad_images
from pmm.gallery.crop_metadata import columns_of_names, name_pattern
from pmm.gallery.embed_job import FILE_COLUMNS
from pmm.gallery.gallery import Gallery
from pmm.gallery.matches import Matches
from pmm.gallery.model_of import model_of
from pmm.gallery.search import embed_queries, opened_gallery
from pmm.gallery.search_options import camera_of, check_threshold, row_filter, threshold_of
from pmm.gallery.search_results import FoundCrop, QueryResult, SearchResults
from pmm.gallery.unfinished import JOB_FILE
from pmm.utils.errors import InvalidFile, InvalidValue
from pmm.utils.files import existing_file


@dataclass(frozen=True, kw_only=True)
class SearchAnswer:
    """What was found for each query, among so many `candidates`; `folder` is what the gallery's paths are relative
    to."""

    queries: tuple[Path, ...]
    results: SearchResults
    candidates: int
    folder: Path

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
    cameras: tuple[str, ...] = ()
    since: str = ""
    until: str = ""
    where: tuple[str, ...] = ()
    not_same_camera: bool = False
    query_camera: str = ""
    names: str = ""

    def run(self, gallery: Path, *, backend: str = "auto", device: str = "auto") -> SearchAnswer:
        """Search the gallery at a path.

        Raises InvalidFile, InvalidValue and InvalidInput for what does not fit the gallery, all but a model of another
        precision before a model is loaded.
        """
        files = self._queries()
        if (gallery / JOB_FILE).is_file():
            logging.getLogger("pmm").warning("%s: pmm embed has not finished it: crops are missing", gallery)
        with opened_gallery(gallery) as opened:
            if not len(opened):
                raise InvalidFile("it holds no crops", path=gallery, hint="add some with pmm embed --append")
            where = row_filter(opened, cameras=self.cameras, since=self.since, until=self.until, where=self.where)
            candidates = len(opened.rows_where(where)) if where else len(opened)
            distance, threshold = threshold_of(opened, self.threshold, self.fmr) if self.threshold else (None, None)
            not_camera = self._not_camera(opened, files)
            model = model_of(opened.path, opened.source, self.model)
            embeddings, source = embed_queries(opened, model, files, backend=backend, device=device)
            check_threshold(threshold, source.precision, model)
            matches = opened.search(embeddings, self.top, where=where, not_camera=not_camera)
            results = SearchResults(
                gallery=str(gallery),
                metric=opened.metric,
                results=tuple(_results(opened, self._named(files), matches)),
                threshold=distance,
                origin=threshold,
            )
            return SearchAnswer(
                queries=tuple(files), results=results, candidates=candidates, folder=Path(opened.folder)
            )

    def _queries(self) -> list[Path]:
        if not self.query.is_dir():
            return [existing_file(self.query, "an image to look for, or a folder of them")]
        files = images_below(self.query)
        refuse_bad_images(first_look(files), self.query, hint="replace or remove them")
        return files

    def _named(self, files: Sequence[Path]) -> list[str]:
        if not self.query.is_dir():
            return [str(file) for file in files]
        return [file.relative_to(self.query).as_posix() for file in files]

    def _not_camera(self, gallery: Gallery, files: Sequence[Path]) -> Any:
        """The camera of each query, if its crops do not count."""
        if not self.not_same_camera:
            return None
        if self.query_camera:
            return camera_of(gallery, "--query-camera", self.query_camera)
        pattern = name_pattern(self.names)
        if "camera" not in pattern.groupindex:
            raise InvalidValue("--names", self.names, "an expression with a group camera")
        cameras = columns_of_names(pattern, [file.name for file in files], files[0].parent)["camera"]
        return [camera_of(gallery, "--names", camera) for camera in cameras]


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
