"""Embed the crops of a gallery again with another model; the old gallery is searched meanwhile.

pmm gallery upgrade GALLERY --to MODEL [-o NEW]

At the end the new embeddings take the place of the old ones from one moment to the next, or lie in a gallery of their
own. What is added to the old gallery meanwhile, or removed from it, is so in the new one. After an interruption the
same command goes on where it was.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from pmm.data.bad_images import BadImageOptions, bad_image_lines
from pmm.gallery.upgrade import GalleryUpgrade
from pmm.runtime.open import BACKEND_HELP, check_backend, open_runner
from pmm.utils import command_line
from pmm.utils.arguments import Arg
from pmm.utils.errors import printable
from pmm.utils.facts import how_many
from pmm.utils.hardware import check_threads, cuda_index


@dataclass(frozen=True, kw_only=True)
class GalleryUpgradeCommand:
    """`pmm gallery upgrade GALLERY --to MODEL`"""

    gallery: Annotated[Path, Arg("GALLERY", positional=True)]
    """Gallery written by pmm embed."""
    to: Annotated[Path, Arg("MODEL")]
    """Model to embed with: checkpoint, ONNX file, AOTInductor package or engine."""
    out: Annotated[Path | None, Arg("NEW", short="-o")] = None
    """Folder of a new gallery (default: the old one is replaced at the end)."""
    folder: Annotated[Path | None, Arg("FOLDER")] = None
    """Folder of the crops, if they were moved (default: the one that was embedded)."""
    bad_images: Annotated[BadImageOptions, Arg(group="options")] = field(default_factory=BadImageOptions)
    backend: Annotated[str, Arg("NAME", help=BACKEND_HELP, group="running")] = "auto"
    device: Annotated[str, Arg(group="running")] = "auto"
    """Where to run: auto, cpu, cuda, or cuda:N for the GPU of that number."""
    batch_size: Annotated[int, Arg(short="-b", least=1, group="running")] = 64
    """Images per call."""
    threads: Annotated[int, Arg(group="running")] = 0
    """CPU threads of the backend (default: its own choice)."""

    def __post_init__(self) -> None:
        check_backend(self.backend)
        check_threads(self.threads)
        cuda_index(self.device)


def main(prog: str) -> None:
    """Entry point."""
    command = command_line.parse(GalleryUpgradeCommand, prog=prog, description=__doc__ or "")
    upgrade = GalleryUpgrade(
        gallery=command.gallery, artifact=command.to, out=command.out, folder=command.folder,
        skip_bad_images=command.bad_images.skip_bad_images,
    )  # fmt: skip
    upgrade.check()  # before a model is loaded for nothing
    with open_runner(command.to, command.backend, device=command.device, threads=command.threads) as runner:
        try:
            gallery, report = upgrade.run(runner, batch_size=command.batch_size, label=prog)
        except KeyboardInterrupt:
            kept = "the gallery is as it was; the same command goes on"
            give_up = f", and pmm gallery compact {command.gallery} --give-up ends it" * (command.out is None)
            print(printable(f"{prog}: note: {kept}{give_up}"), file=sys.stderr)
            raise
    for line in bad_image_lines(report.bad):
        print(printable(f"{prog}: note: {line}"), file=sys.stderr)
    if report.lost_thresholds:
        lost = f"{how_many(report.lost_thresholds, 'threshold')} of the old embeddings are not those of the new ones"
        again = f"pmm threshold {gallery.path} finds others"
        print(printable(f"{prog}: note: {lost}; {again}"), file=sys.stderr)
    counts = [f"{how_many(report.added, 'crop')} embedded"]
    counts += [f"{report.known:,} were there"] * bool(report.known)
    counts += [f"{len(report.bad):,} left out"] * bool(report.bad)
    rate = f"{report.added / report.seconds:.0f} images/s with reading, " if report.added else ""
    info = runner.info
    print(
        f"{gallery.path}: {', '.join(counts)}; {how_many(len(gallery), 'crop')}, {gallery.dim} dimensions; {rate}"
        f"{info.backend} in {info.precision} on {info.device} ({info.provider})"
    )
