"""Embed every image of a folder into a gallery, for `pmm search`. Loads no torch for an ONNX file or an engine.

pmm embed MODEL FOLDER -o GALLERY [--append] [--names market1501] [--metadata FILE.csv]

What is embedded is saved every 4,096 crops or 30 seconds: after an interruption the same command goes on where it was.
A file that has another size or date than when it was embedded is embedded again.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from pmm.data.bad_images import BadImageOptions, bad_image_lines
from pmm.gallery.embed_folder import FolderJob
from pmm.gallery.storage.manifest import is_gallery
from pmm.runtime.runner_flags import BatchRunnerFlags
from pmm.utils import command_line
from pmm.utils.arguments import Arg
from pmm.utils.errors import UserError
from pmm.utils.facts import how_many


@dataclass(frozen=True, kw_only=True)
class EmbedCommand:
    """`pmm embed MODEL FOLDER -o GALLERY`"""

    model: Annotated[Path, Arg("MODEL", positional=True)]
    """Checkpoint, ONNX file, AOTInductor package or engine."""
    folder: Annotated[Path, Arg("FOLDER", positional=True)]
    """Folder of crops: every image in it and in its subfolders, hidden and linked ones apart; notes say what is left
    out."""
    out: Annotated[Path, Arg("GALLERY", short="-o")]
    """Folder to write the gallery to."""
    append: bool = False
    """Add to a gallery that exists, made by the same model; files that are in it already are passed over. Crops that
    were removed from it come back if their files are still in FOLDER."""
    prune: bool = False
    """With --append: remove crops of FOLDER whose file is gone or can no longer be read."""
    names: Annotated[str, Arg("NAME|REGEX", group="crops")] = ""
    """Take camera and time from the file names: market1501, dukemtmc-reid, or a regular expression with the named
    groups camera, time, and any others, which become columns."""
    metadata: Annotated[Path | None, Arg("FILE.csv", group="crops")] = None
    """Take them from a table with the columns path (relative to FOLDER), camera, time, and any others; times are
    seconds, or dates as 2026-05-01T14:30:00."""
    prefix: Annotated[str, Arg("TEXT", group="crops")] = ""
    """Goes before the path of a crop in FOLDER to make its id in the gallery, as site2/."""
    bad_images: Annotated[BadImageOptions, Arg(group="crops")] = field(default_factory=BadImageOptions)
    store: Annotated[Literal["fp32", "fp16"] | None, Arg(group="gallery")] = None
    """Precision that embeddings are stored in: fp32, or fp16, which takes half the disk (default: fp32, or that of the
    gallery to add to)."""
    running: BatchRunnerFlags = field(default_factory=BatchRunnerFlags)


def main(prog: str) -> None:
    """Entry point."""
    command = command_line.parse(EmbedCommand, prog=prog, description=__doc__ or "")
    job = FolderJob(
        artifact=command.model, folder=command.folder, out=command.out, append=command.append, names=command.names,
        metadata=command.metadata, prefix=command.prefix, store=command.store, prune=command.prune,
        skip_bad_images=command.bad_images.skip_bad_images,
    )  # fmt: skip
    prepared = job.prepare()  # before a model is loaded for nothing
    with command.running.open(command.model) as runner:
        try:
            gallery, report = prepared.run(runner, batch_size=command.running.batch_size, label=prog)
        except (KeyboardInterrupt, UserError):
            if is_gallery(command.out):
                command_line.note(prog, "what is written stays; the same command goes on")
            raise
    for line in (*prepared.left_out, *bad_image_lines(report.bad)):
        command_line.note(prog, line)
    counts = [f"{how_many(report.added, 'image')} added"]
    counts += [f"{report.changed:,} of them again, as their files had changed"] * bool(report.changed)
    counts += [f"{report.known:,} were there"] * bool(report.known)
    counts += [f"{report.moved:,} of them at another place, which is recorded"] * bool(report.moved)
    counts += [f"{report.pruned:,} removed whose files are gone"] * bool(report.pruned)
    counts += [f"{len(report.bad):,} left out"] * bool(report.bad)
    if report.gone:
        gone = f"{how_many(report.gone, 'crop')} of the gallery can no longer be read in {command.folder}"
        command_line.note(prog, f"{gone}; --prune removes such")
    rate = f"{report.added / report.seconds:.0f} images/s with reading, " if report.added else ""
    info = runner.info
    print(
        f"{command.out}: {', '.join(counts)}; {how_many(len(gallery), 'crop')}, {gallery.dim} dimensions, stored in "
        f"{gallery.precision}; {rate}{info.backend} in {info.precision} on {info.device} ({info.provider})"
    )
