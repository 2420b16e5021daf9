"""Search: the crops of a gallery that are most like an image. Loads no torch for an ONNX file or an engine."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pmm.data.bad_images import MEND, naming_all
from pmm.embedding.embed import embed_files
from pmm.gallery.crop_files import images_below
from pmm.gallery.filters import RowFilter
from pmm.gallery.gallery import Gallery
from pmm.gallery.matches import Matches
from pmm.gallery.model_of import model_of, source_of
from pmm.gallery.npz_index import import_npz
from pmm.gallery.storage.source import EmbeddingSource, check_comparable
from pmm.runtime.base import Runner
from pmm.runtime.open import open_runner
from pmm.utils.errors import InvalidFile


def search(
    gallery: Gallery | str | Path,
    query: str | Path | Sequence[str | Path],
    artifact: str | Path | None = None,
    *,
    k: int = 10,
    where: RowFilter | None = None,
    not_camera: Any = None,
    backend: str = "auto",
    device: str = "auto",
) -> Matches:
    """The crops of a gallery that are most like an image, nearest first.

    Args:
        gallery: an opened one, its folder, or an index (.npz) of an earlier version.
        query: an image file, several of them, or a folder, whose images are used in the order of their paths.
        artifact: the file that embeds the query (default: the one that made the gallery, if it is still there); another
            one of the same checkpoint will do. If it rounds differently, one line (logger "pmm") says so.
        k: how many crops per query, or all if there are fewer.
        where: which rows to search.
        not_camera: a camera, or one per query, whose crops are left out.
        backend: as `pmm.open_runner`.
        device: as `pmm.open_runner`.

    Returns:
        Ids and distances: [K] each for one image, [Q, K] for several.

    Raises:
        InvalidFile: an artifact of another model than the gallery's, or one that is gone; bad images, all of them
            named; or as `Gallery.open`.
        InvalidValue, InvalidInput: as `Gallery.search`.
        UserError: as `pmm.open_runner`.

    Examples:
        >>> gallery = pmm.embed("best.onnx", "crops", "people")
        >>> ids, distances = pmm.search("people", "query.jpg", k=3)
        >>> len(ids), bool(distances[0] <= distances[1] <= distances[2])
        (3, True)
    """
    single = isinstance(query, str | Path) and not Path(query).is_dir()
    if isinstance(query, str | Path):
        files = [Path(query)] if single else images_below(Path(query))
    else:
        files = [Path(each) for each in query]
    with opened_gallery(gallery) as found:
        model = model_of(found.path, found.source, None if artifact is None else Path(artifact))
        with query_runner(found, model, backend=backend, device=device) as (runner, _):
            try:
                embeddings = embed_files(runner, files)
            except InvalidFile as error:
                raise naming_all(error, files, hint=MEND) from error
        return found.search(embeddings[0] if single else embeddings, k, where=where, not_camera=not_camera)


@contextlib.contextmanager
def opened_gallery(gallery: Gallery | str | Path) -> Iterator[Gallery]:
    """The opened gallery; an index of an earlier version is converted to a temporary one."""
    if isinstance(gallery, Gallery):
        yield gallery
    elif Path(gallery).is_file():
        with tempfile.TemporaryDirectory(prefix="pmm-gallery-") as folder:
            yield import_npz(Path(gallery), Path(folder) / Path(gallery).name)  # the name that messages have
    else:
        yield Gallery.open(gallery)


@contextlib.contextmanager
def query_runner(
    gallery: Gallery, model: Path, *, backend: str = "auto", device: str = "auto", threads: int = 0
) -> Iterator[tuple[Runner, EmbeddingSource]]:
    """An open runner for queries, checked with `check_comparable`, and the source of its embeddings."""
    with open_runner(model, backend, device=device, threads=threads) as runner:
        source = source_of(model, runner)
        assert gallery.source is not None
        check_comparable(gallery.source, source, model)
        yield runner, source
