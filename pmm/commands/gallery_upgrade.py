"""Embed the crops of a gallery again with another model; the old gallery is searched meanwhile.

pmm gallery upgrade GALLERY --to MODEL [-o NEW]
pmm gallery upgrade GALLERY --abort

At the end the new embeddings take the place of the old ones from one moment to the next, or lie in a gallery of their
own. What is added to the old gallery meanwhile, or removed from it, is so in the new one. After an interruption the
same command goes on where it was.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from pmm.data.bad_images import BadImageOptions, bad_image_lines
from pmm.gallery.describe import unfinished_commands
from pmm.gallery.gallery import Gallery
from pmm.gallery.unfinished import give_up_unfinished
from pmm.gallery.upgrade import GalleryUpgrade
from pmm.runtime.runner_flags import BatchRunnerFlags
from pmm.utils import command_line
from pmm.utils.arguments import Arg
from pmm.utils.errors import ConflictingOptions
from pmm.utils.facts import how_many


@dataclass(frozen=True, kw_only=True)
class GalleryUpgradeCommand:
    """`pmm gallery upgrade GALLERY --to MODEL`"""

    gallery: Annotated[Path, Arg("GALLERY", positional=True)]
    """Gallery written by pmm embed."""
    to: Annotated[Path | None, Arg("MODEL")] = None
    """Model to embed with: checkpoint, ONNX file, AOTInductor package or engine."""
    out: Annotated[Path | None, Arg("NEW", short="-o")] = None
    """Folder of a new gallery (default: the old one is replaced at the end)."""
    folder: Annotated[Path | None, Arg("FOLDER")] = None
    """Folder of the crops, if they were moved (default: the one that was embedded)."""
    abort: bool = False
    """Cancel what was interrupted: remove the crops that an upgrade has embedded so far, and no longer say that
    pmm embed has not finished the gallery."""
    bad_images: Annotated[BadImageOptions, Arg(group="options")] = field(default_factory=BadImageOptions)
    running: BatchRunnerFlags = field(default_factory=BatchRunnerFlags)

    def __post_init__(self) -> None:
        if not self.abort and self.to is None:
            hint = "give --to MODEL, or --abort to cancel an upgrade that was interrupted"
            raise ConflictingOptions("nothing says which model to upgrade to", "--to", "--abort", hint=hint)
        flags = {"--to": self.to, "--out": self.out, "--folder": self.folder}
        if self.abort and (given := [flag for flag, value in flags.items() if value]):
            problem = f"--abort embeds nothing, so {' and '.join(given)} would change nothing"
            raise ConflictingOptions(problem, "--abort", *given, hint="leave it out")


def main(prog: str) -> None:
    """Entry point."""
    command = command_line.parse(GalleryUpgradeCommand, prog=prog, description=__doc__ or "")
    if command.to is None:
        _abort(command.gallery)
        return
    upgrade = GalleryUpgrade(
        gallery=command.gallery, artifact=command.to, out=command.out, folder=command.folder,
        skip_bad_images=command.bad_images.skip_bad_images,
    )  # fmt: skip
    upgrade.check()  # before a model is loaded for nothing
    with command.running.open(command.to) as runner:
        try:
            gallery, report = upgrade.run(runner, batch_size=command.running.batch_size, label=prog)
        except KeyboardInterrupt:
            kept = "the gallery is as it was; the same command goes on"
            abort = f", and pmm gallery upgrade {command.gallery} --abort cancels it" * (command.out is None)
            command_line.note(prog, kept + abort)
            raise
    for line in bad_image_lines(report.bad):
        command_line.note(prog, line)
    if report.lost_thresholds:
        lost = f"{how_many(report.lost_thresholds, 'threshold')} of the old embeddings are not those of the new ones"
        again = f"pmm threshold {gallery.path} finds others"
        command_line.note(prog, f"{lost}; {again}")
    counts = [f"{how_many(report.added, 'crop')} embedded"]
    counts += [f"{report.known:,} were there"] * bool(report.known)
    counts += [f"{len(report.bad):,} left out"] * bool(report.bad)
    rate = f"{report.added / report.seconds:.0f} images/s with reading, " if report.added else ""
    info = runner.info
    print(
        f"{gallery.path}: {', '.join(counts)}; {how_many(len(gallery), 'crop')}, {gallery.dim} dimensions; {rate}"
        f"{info.backend} in {info.precision} on {info.device} ({info.provider})"
    )


def _abort(path: Path) -> None:
    gallery = Gallery.open(path)
    with gallery.writer():
        unfinished = unfinished_commands(path)
        give_up_unfinished(path)
    done = f"{' and '.join(unfinished)} cancelled" if unfinished else "nothing to cancel"
    print(f"{path}: {done}; {how_many(len(gallery), 'crop')}")
