"""Embed a gallery's crops again with another model, while the old gallery is searched. Loads no torch for an ONNX file
or an engine."""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
import time
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pmm.data.bad_images import first_look, refuse_bad_images
from pmm.gallery.embed_job import FILE_COLUMNS, CropTable, EmbeddedCrops, EmbedReport, embedded_chunks
from pmm.gallery.gallery import Gallery
from pmm.gallery.model_of import source_of, thresholds_of_manifest
from pmm.gallery.storage.changes import compact
from pmm.gallery.storage.manifest import is_gallery
from pmm.gallery.storage.snapshot import GallerySnapshot, Rows
from pmm.gallery.storage.source import EmbeddingSource
from pmm.gallery.storage.thresholds import Threshold
from pmm.gallery.storage.writer import GalleryChange
from pmm.gallery.unfinished import JOB_FILE, WORK_FOLDER, begun_job, check_new_gallery, facts_of_begun
from pmm.runtime.base import Runner
from pmm.utils.errors import CannotWrite, InvalidFile, InvalidInput
from pmm.utils.files import existing_file, sha256

HINT = "give --folder FOLDER if they were moved, or --skip-bad-images to leave them out"
ELSEWHERE = "if they were moved, pmm embed --append records where they are; or give --skip-bad-images"


@dataclass(frozen=True, kw_only=True)
class GalleryUpgrade:
    """Embeds the crops of `gallery` again with `artifact`: into `out`, or to take its place at the end.

    Args:
        folder: of the crops, if they were moved.
        skip_bad_images: leave out crops that are gone or cannot be read.
    """

    gallery: Path
    artifact: Path
    out: Path | None = None
    folder: Path | None = None
    skip_bad_images: bool = False

    def check(self) -> None:
        """Check everything that can be checked before a model is loaded.

        Raises InvalidFile for crops that are gone, a gallery that does not say where they are, and one that this
        artifact made; CannotWrite if `out` is something else.
        """
        old = Gallery.open(self.gallery)
        existing_file(self.artifact, "a model")
        if old.source and old.source.artifact_sha256 == sha256(self.artifact):
            shutil.rmtree(self.gallery / WORK_FOLDER, ignore_errors=True)  # of a run that was killed at its very end
            raise InvalidFile("this model made it", path=self.gallery, expected="another one to upgrade to")
        if "path" not in old.columns:
            problem = "it has no column path, so its crops cannot be found"
            raise InvalidFile(problem, path=self.gallery, hint="embed their folder again with pmm embed")
        bad = first_look(self._files(old, old.rows))
        if not self.skip_bad_images:
            refuse_bad_images(bad, self._home(old), hint=self._hint(bad, old))
        if len(bad) == len(old):
            file, reason = next(iter(bad.items()), (None, ""))
            problem = f"none of its {len(old)} crops can be read" + (f", as {file} ({reason})" if file else "")
            raise InvalidFile(problem, path=self.gallery, hint=self._hint(bad, old))
        if is_gallery(self._target):
            self._check_begun()
        else:
            check_new_gallery(self._target)

    def run(self, runner: Runner, *, batch_size: int = 64, label: str = "") -> tuple[Gallery, EmbedReport]:
        """Embed the crops, or those that an interrupted run left; with a `label`, show a progress bar of that name.

        Rows that others add to the old gallery or remove from it meanwhile are added to or removed from the new one
        too. Raises as `check`, `embedded_chunks` and `Gallery.add`.
        """
        source, report, begin = source_of(self.artifact, runner), EmbedReport(), time.perf_counter()
        with contextlib.ExitStack() as held:
            new = None
            if is_gallery(self._target):
                new = Gallery.open(self._target)
                held.enter_context(new.writer())
                report.known = len(new)
            while True:
                old = Gallery.open(self.gallery)
                todo = self._follow(old, new, report)
                crops = CropTable(
                    ids=old.ids_of(todo).tolist(),
                    files=self._files(old, todo),
                    columns={name: old.column(name, todo) for name in old.columns},
                )
                for chunk in embedded_chunks(
                    runner, crops, report.bad, folder=self._home(old), skip_bad_images=self.skip_bad_images,
                    batch_size=batch_size, label=label,
                ):  # fmt: skip
                    if new is None:
                        new = self._create(chunk, old, source)
                        held.enter_context(new.writer())
                    else:
                        new.add(chunk.embeddings, chunk.crops.ids, chunk.crops.columns, source=source)
                    report.added += len(chunk.crops)
                if new is None:
                    raise InvalidFile(f"none of its {len(old)} crops can be read", path=self.gallery, hint=HINT)
                if self._finished(old, new, report):
                    break
        if self.out is None:
            shutil.rmtree(self._target)
        report.seconds = time.perf_counter() - begin
        return Gallery.open(self.out or self.gallery), report

    @property
    def _target(self) -> Path:
        return self.out or self.gallery / WORK_FOLDER

    @property
    def _facts(self) -> dict[str, str]:
        """What has to be the same for a run to continue an interrupted one."""
        return {"model": sha256(self.artifact), "gallery": str(self.gallery.resolve())}

    def _home(self, old: Gallery) -> Path:
        return self.folder or Path(old.folder)

    def _hint(self, bad: Collection[Path], old: Gallery) -> str:
        """What to do about bad crops: --folder does not apply to crops of a folder that was added later."""
        below = any(file.is_relative_to(self._home(old)) for file in bad)
        return HINT if below or not bad else ELSEWHERE

    def _files(self, old: Gallery, rows: Rows) -> list[Path]:
        home = self._home(old)
        return [home / path for path in old.column("path", rows).tolist()]

    def _check_begun(self) -> None:
        """Raise CannotWrite unless what is at the target is this upgrade, interrupted; what is in the gallery itself
        and of another one is removed."""
        if facts_of_begun(self._target) == self._facts:
            return
        if self.out is not None:
            raise CannotWrite("it is a gallery already", path=self.out, expected="an empty folder, or one to make")
        shutil.rmtree(self._target)

    def _create(self, chunk: EmbeddedCrops, old: Gallery, source: EmbeddingSource) -> Gallery:
        folder = str(self.folder.resolve()) if self.folder else old.folder
        with begun_job(self._target, self._facts):
            new = Gallery.create(
                self._target, chunk.embeddings, chunk.crops.ids, source=source, columns=chunk.crops.columns,
                precision=old.precision, folder=folder,
            )  # fmt: skip
        return new

    def _follow(self, old: Gallery, new: Gallery | None, report: EmbedReport) -> Rows:
        """The rows of the old gallery that are still to be embedded; what is no longer in it goes from the new one."""
        rows, ids = old.rows, old.ids_of(old.rows)
        left = np.array([file not in report.bad for file in self._files(old, rows)], bool)
        if new is None:
            return rows[left]
        there = new.find(ids.tolist())
        same = there >= 0
        for name in set(FILE_COLUMNS) & set(old.columns):  # what was embedded again has another file
            same[same] = old.column(name, rows[same]) == new.column(name, there[same])
        kept = np.isin(new.rows, there[same])
        if not kept.all():
            new.remove(new.ids_of(new.rows[~kept]).tolist())
        return rows[left & ~same]

    def _finished(self, old: Gallery, new: Gallery, report: EmbedReport) -> bool:
        """Put the new gallery in its place, if the old one is as it was when the last crops were taken from it."""
        with old.writer() if self.out is None else contextlib.nullcontext():
            if self.out is None and len(self._follow(old, new, report)):
                return False
            self._take_thresholds(old, new, report)
            if self.out is None:
                _replace_content(old, new)
            (self._target / JOB_FILE).unlink(missing_ok=True)
        return True

    def _take_thresholds(self, old: Gallery, new: Gallery, report: EmbedReport) -> None:
        """Those of the old gallery that hold for the new embeddings too, and those measured for the new model."""
        assert new.source is not None
        held = [each for each in old.thresholds if _holds(each, old, new)]
        measured = thresholds_of_manifest(self.artifact, new.source, new.precision)
        measured = [each for each in measured if not any(own.is_for(each.fmr) for own in held)]
        report.lost_thresholds = len(old.thresholds) - len(held)
        if held or measured:
            new.set_thresholds([*held, *measured])


def _holds(threshold: Threshold, old: Gallery, new: Gallery) -> bool:
    """Whether a threshold of `old` is one of `new`: the same model and precision, prepared and compared alike."""
    if old.source is None or new.source is None or old.source.differences(new.source):
        return False
    try:
        threshold.check_fits(new.source, new.precision)
    except InvalidInput:
        return False
    return True


def _replace_content(old: Gallery, new: Gallery) -> None:
    """From one moment to the next `old`, which this process holds, has the rows and the source of `new`."""
    before = old.manifest
    manifest = dataclasses.replace(
        new.manifest, generation=before.generation, next_number=before.next_number, epoch=before.epoch, chunks=(),
        codes=None, tombstones=None,
    )  # fmt: skip
    with GalleryChange(old.path, manifest) as change:
        compact(change, GallerySnapshot.open(new.path))
