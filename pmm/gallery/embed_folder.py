"""Embed a folder of crops into a new or an existing gallery. Loads no torch for an ONNX file or an engine."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import numpy as np
import numpy.typing as npt

from pmm.gallery.crop_files import walk_images
from pmm.gallery.crop_metadata import crop_columns, name_pattern
from pmm.gallery.embed_job import FILE_COLUMNS, CropTable, EmbedReport, embedded_chunks, file_columns
from pmm.gallery.gallery import Gallery
from pmm.gallery.known_crops import KnownCrops, gone_crops, home_moved, known_crops, record_places
from pmm.gallery.model_of import check_artifact, check_gallery_precision, source_of, thresholds_of_manifest
from pmm.gallery.storage.manifest import StoredPrecision, is_gallery, read_gallery_manifest
from pmm.gallery.storage.source import EmbeddingSource, check_comparable
from pmm.gallery.storage.writer import GalleryChange
from pmm.gallery.unfinished import JOB_FILE, begun_job, check_new_gallery, facts_of_begun
from pmm.runtime.base import Runner
from pmm.runtime.open import open_runner
from pmm.utils.errors import CannotWrite, ConflictingOptions, InvalidFile, InvalidValue
from pmm.utils.files import existing_file, sha256


def embed(
    artifact: str | Path,
    folder: str | Path,
    out: str | Path,
    *,
    append: bool = False,
    names: str = "",
    metadata: str | Path | None = None,
    prefix: str = "",
    store: StoredPrecision | None = None,
    skip_bad_images: bool = False,
    prune: bool = False,
    backend: str = "auto",
    device: str = "auto",
    batch_size: int = 64,
    threads: int = 0,
) -> Gallery:
    """Embed every image in `folder` and below it into a gallery, for `pmm.search`.

    Embeddings are written every 4,096 crops or 30 seconds; after an interruption, the same call continues. Thresholds
    that the bench measured for the artifact are copied into the gallery if it stores fp32, as the bench did.

    Args:
        artifact: checkpoint, ONNX file, AOTInductor package or engine.
        out: folder of the gallery. A crop's id is the `prefix` and its path in `folder`.
        append: add to an existing gallery: files that it has are skipped, or embedded again if they have changed. Crops
            that were removed from it come back.
        names: `market1501`, `dukemtmc-reid`, or a regular expression whose named groups (camera, time, others) become
            columns.
        metadata: a CSV table with the columns path, camera, time, and others.
        store: precision in which embeddings are stored (default: fp32, or that of the gallery to add to).
        skip_bad_images: leave out images that cannot be read; one line (logger "pmm") counts them.
        prune: remove crops of `folder` whose file is gone or can no longer be read.
        backend: as `pmm.open_runner`.
        device: as `pmm.open_runner`.
        threads: as `pmm.open_runner`.
        batch_size: images per call of the runner.

    Raises:
        InvalidFile: a folder without images, bad images, a table that does not fit, a gallery of another model.
        InvalidInput: NaN or Inf among the embeddings.
        CannotWrite: the gallery exists and `append` is not set, or it cannot be written.
        UserError: as `pmm.open_runner`.

    Examples:
        >>> gallery = pmm.embed("best.onnx", "crops", "gallery", names="market1501")
        >>> gallery.embeddings().shape == (len(gallery), gallery.dim), gallery.columns[:2]
        (True, ('path', 'pid'))
    """
    table = Path(metadata) if metadata is not None else None
    job = FolderJob(
        artifact=Path(artifact), folder=Path(folder), out=Path(out), append=append, names=names, metadata=table,
        prefix=prefix, store=store, skip_bad_images=skip_bad_images, prune=prune,
    )  # fmt: skip
    prepared = job.prepare()
    with open_runner(artifact, backend, device=device, threads=threads) as runner:
        gallery, report = prepared.run(runner, batch_size=batch_size)
    log = logging.getLogger("pmm")
    for line in prepared.left_out:
        log.warning("%s: %s", folder, line)
    if report.bad:
        first, reason = next(iter(report.bad.items()))
        log.warning("%s: %d images were left out, the first is %s (%s)", folder, len(report.bad), first, reason)
    return gallery


@dataclass(frozen=True, kw_only=True)
class FolderJob:
    """What to embed, and where to; see `embed`."""

    artifact: Path
    folder: Path
    out: Path
    append: bool = False
    names: str = ""
    metadata: Path | None = None
    prefix: str = ""
    store: StoredPrecision | None = None
    skip_bad_images: bool = False
    prune: bool = False

    def prepare(self) -> PreparedJob:
        """Check everything that can be checked before a model is loaded. Raises as `embed`."""
        if self.store not in (None, *get_args(StoredPrecision)):
            raise InvalidValue("store", self.store, choices=get_args(StoredPrecision))
        if self.prune and not self.append:
            raise ConflictingOptions("--prune needs --append", "--prune", "--append")
        pattern = name_pattern(self.names) if self.names else None
        existing_file(self.artifact, "a model")
        walked = walk_images(self.folder)
        files, bad = walked.readable(skip_bad_images=self.skip_bad_images)
        gallery = self._existing()
        kinds = gallery.manifest.columns if gallery else {}
        within = [file.relative_to(self.folder).as_posix() for file in files]
        columns = crop_columns(self.folder, within, names=pattern, table=self.metadata, kinds=kinds)
        ids = [self.prefix + path for path in within]
        moved = gallery is not None and home_moved(gallery, ids, within)
        paths = np.array(within if gallery is None or moved else self._paths(within, gallery), object)
        all_columns = {"path": paths, **columns, **file_columns(files)}
        if gallery:
            self._check_columns(gallery, set(columns))
            all_columns = {name: values for name, values in all_columns.items() if name in gallery.columns}
        table = CropTable(ids=ids, files=files, columns=all_columns)
        return PreparedJob(
            job=self, table=table, bad=bad, left_out=walked.lines, gallery=gallery, home_moved=moved
        )  # fmt: skip

    @property
    def stored(self) -> StoredPrecision:
        """Precision that embeddings are stored in."""
        if self.store is None and self.append and is_gallery(self.out):
            return read_gallery_manifest(self.out).precision
        return self.store or "fp32"

    @property
    def facts(self) -> dict[str, str]:
        """What has to be the same for a run to continue an interrupted one."""
        return {
            "model": sha256(self.artifact),
            "folder": str(self.folder.resolve()),
            "--names": self.names,
            "--metadata": sha256(self.metadata) if self.metadata else "",
            "--prefix": self.prefix,
            "--store": self.stored,
        }

    def _existing(self) -> Gallery | None:
        """The gallery to add to, if there is to be one. Raises CannotWrite if one is in the way, or anything else."""
        if not is_gallery(self.out):
            if self.append:
                raise InvalidFile("it is no gallery", path=self.out, hint="leave --append out to make one")
            check_new_gallery(self.out)
            return None
        gallery = Gallery.open(self.out)
        if not self.append:
            self._check_interrupted()
        elif self.store not in (None, gallery.precision):
            problem = f"--store is {self.store}, and the gallery stores {gallery.precision}"
            raise ConflictingOptions(problem, "--store", "--append", hint="leave --store out")
        if gallery.source is None:
            problem = "it does not say what made its embeddings, so none of a model are added"
            raise InvalidFile(problem, path=self.out, hint="embed into a gallery of its own")
        if gallery.manifest.ids != "text":
            raise InvalidFile("its ids are whole numbers", path=self.out, expected="paths as ids, as pmm embed writes")
        check_artifact(gallery.source, self.artifact)
        return gallery

    def _check_interrupted(self) -> None:
        """Raise CannotWrite unless what is there is this job, interrupted."""
        begun, facts = facts_of_begun(self.out), self.facts
        if begun is None:
            hint = "give --append to add to it, or another name"
            raise CannotWrite("it is a gallery already", path=self.out, hint=hint)
        if other := [name for name in facts if begun.get(name) != facts[name]]:
            raise CannotWrite(
                f"it was begun by an interrupted pmm embed with another {', '.join(other)}", path=self.out,
                hint="repeat that command to finish it, or give --append to add to what is there",
            )  # fmt: skip

    def _check_columns(self, gallery: Gallery, columns: set[str]) -> None:
        own = {"path", *FILE_COLUMNS}
        if missing := [name for name in gallery.columns if name not in own | columns]:
            problem = f"its crops have {', '.join(missing)}, of which nothing is said for the new ones"
            raise InvalidFile(problem, path=self.out, hint="give --names or --metadata with these columns")
        if surplus := sorted(columns - set(gallery.columns)):
            problem = f"it has no column {', '.join(surplus)}"
            raise InvalidFile(problem, path=self.out, hint="leave it out, or embed into a gallery of its own")

    def _paths(self, within: Sequence[str], gallery: Gallery) -> list[str]:
        """Paths as the gallery has them: relative to its own folder, or absolute if they are elsewhere."""
        folder, home = self.folder.resolve(), Path(gallery.folder)
        if gallery.folder and folder.is_relative_to(home):
            folder = folder.relative_to(home)
        return [(folder / path).as_posix() for path in within]


@dataclass(frozen=True, kw_only=True)
class PreparedJob:
    """A job that has passed all checks that need no model."""

    job: FolderJob
    table: CropTable
    bad: dict[Path, str]
    left_out: list[str]
    """What else is in the folder, in words."""
    gallery: Gallery | None
    home_moved: bool = False
    """The gallery's folder is where the job's is now."""

    def run(self, runner: Runner, *, batch_size: int = 64, label: str = "") -> tuple[Gallery, EmbedReport]:
        """Embed crops that the gallery does not have yet; with a `label`, show a progress bar. Raises as `embed`."""
        job, gallery = self.job, self.gallery
        source, report = source_of(job.artifact, runner), EmbedReport(bad=dict(self.bad))
        begin = time.perf_counter()
        with contextlib.ExitStack() as held:
            if gallery is not None:
                assert gallery.source is not None
                check_comparable(gallery.source, source, job.artifact)
                check_gallery_precision(gallery.source, source, job.artifact)
                if self.home_moved:
                    with gallery.writer(), GalleryChange(gallery.path, gallery.manifest) as change:
                        change.commit(folder=str(job.folder.resolve()))
                held.enter_context(gallery.writer())
            todo, changed = self._todo(gallery, report)
            for crops, embeddings in embedded_chunks(
                runner, todo, report.bad, folder=job.folder, skip_bad_images=job.skip_bad_images,
                batch_size=batch_size, label=label,
            ):  # fmt: skip
                if gallery is None:
                    gallery = self._create(crops, embeddings, source)
                    held.enter_context(gallery.writer())
                else:
                    again = [each for each in crops.ids if each in changed]
                    if again:
                        gallery.remove(again)
                    report.changed += len(again)
                    gallery.add(embeddings, crops.ids, crops.columns, source=source)
                report.added += len(crops)
            if gallery is None:
                raise InvalidFile(f"none of its {len(self.table)} images can be read", path=job.folder)
            if self.gallery is not None:
                self._prune(gallery, report)
            if facts_of_begun(job.out) == job.facts:  # another run's crops are still missing
                (job.out / JOB_FILE).unlink()
        report.seconds = time.perf_counter() - begin
        return gallery, report

    def _create(self, crops: CropTable, embeddings: npt.NDArray[np.float32], source: EmbeddingSource) -> Gallery:
        job = self.job
        with begun_job(job.out, job.facts):
            gallery = Gallery.create(
                job.out, embeddings, crops.ids, source=source, columns=crops.columns, precision=job.stored,
                folder=str(job.folder.resolve()),
            )  # fmt: skip
        if thresholds := thresholds_of_manifest(job.artifact, source, job.stored):
            gallery.set_thresholds(thresholds)
        return gallery

    def _todo(self, gallery: Gallery | None, report: EmbedReport) -> tuple[CropTable, set[str]]:
        """The crops that are not in the gallery as they are on disk, and the ids of those that have changed; where
        moved ones are is recorded.

        Raises InvalidInput for an id that is another crop's.
        """
        if gallery is None:
            return self.table, set()
        known: KnownCrops = known_crops(gallery, self.table)
        record_places(gallery, self.table.take(known.moved))
        report.known, report.moved = len(self.table) - len(known.todo), len(known.moved)
        return self.table.take(known.todo), known.changed

    def _prune(self, gallery: Gallery, report: EmbedReport) -> None:
        """Count crops whose file is gone or no longer readable, or remove them."""
        here = {str(id_) for id_, file in zip(self.table.ids, self.table.files, strict=True) if file not in report.bad}
        gone = gone_crops(gallery, self.job.folder, here, self.job.prefix)
        if self.job.prune and gone:
            report.pruned = gallery.remove(gone)
        else:
            report.gone = len(gone)
