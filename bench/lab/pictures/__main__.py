"""Draw the pictures of the README and the documentation from a run and its bench.

python -m bench.lab.pictures [RUN] [--browser chromium] [--out docs/pictures]

RUN is what `make demo` writes: best.pth, and the bench's report in report/. The report's first screen is drawn by a
browser, Chromium or Chrome.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from PIL import Image

from bench.lab.pictures.overview import CROP, overview
from pmm.bench.schema import read_report
from pmm.data.crops import load_crops
from pmm.utils import command_line
from pmm.utils.arguments import Arg
from pmm.utils.errors import UserError
from pmm.utils.files import existing_file, make_folder, write_file
from pmm.visualize.cam import stage_cams, to_model
from pmm.visualize.checkpoint_data import pick
from pmm.visualize.heat import heated, resized
from pmm.visualize.pictures import PictureOptions, Pictures, Subject

ROOT = Path(__file__).parents[3]
NAMES = {"cam": "where-it-looks", "mix": "hard-mix", "lists": "ranked-lists"}
"""Picture of `pmm visualize` -> its file."""
PEOPLE = 3
"""Crops of the overview."""
SCREEN = (1280, 800)
"""Width and height in pixels of the report's first screen."""
COLOURS = 256
"""Of a PNG file: drawn pictures look the same with a palette, in a third of the bytes."""


@dataclass(frozen=True, kw_only=True)
class PicturesCommand:
    """The command line."""

    run: Annotated[Path, Arg("RUN", positional=True)] = ROOT / "runs/demo"
    """Folder of the run."""
    browser: str = "chromium"
    """Program that draws the report."""
    out: Annotated[Path, Arg("DIR", short="-o")] = ROOT / "docs/pictures"
    """Folder of the pictures."""
    seed: Annotated[int, Arg(least=0)] = 0
    """Seed of the choice of crops."""


def main(prog: str) -> int:
    """Write them."""
    command = command_line.parse(PicturesCommand, prog=prog, description=__doc__ or "")
    checkpoint = existing_file(command.run / "best.pth", "a checkpoint")
    page = existing_file(command.run / "report/report.html", "a report of the bench")
    browser = shutil.which(command.browser)
    if browser is None:
        raise UserError(
            f"{command.browser} is not installed", expected="Chromium or Chrome", hint="give --browser NAME"
        )
    make_folder(command.out)
    pictures = Pictures(checkpoint, None, PictureOptions(crops=3, seed=command.seed))
    for kind, name in NAMES.items():
        _save(pictures.draw(kind), command.out / f"{name}.png")
    (subject,) = pictures.subjects
    write_file(command.out / "overview.svg", _overview(subject, page.with_suffix(".json"), command.seed))
    with tempfile.TemporaryDirectory() as scratch:
        _save(_found(subject, Path(scratch), command.seed), command.out / "search.png")
        _save(_screen(browser, page, Path(scratch)), command.out / "report.png")
    return 0


def _save(picture: Image.Image, file: Path) -> None:
    picture.convert("RGB").quantize(COLOURS, dither=Image.Dither.NONE).save(file, optimize=True)
    print(f"{file}  {picture.width}x{picture.height}")


def _overview(subject: Subject, report: Path, seed: int) -> str:
    samples = pick(subject.data.dataset.query, PEOPLE, seed)
    size, model = subject.runner.preprocessing, subject.runner.model
    crops = load_crops([sample.path for sample in samples], size)
    stages = stage_cams(model, to_model(model, crops[-1:], size))
    (embedding,) = subject.runner(crops[-1:])
    heats = [heated(crops[-1], stage.cam[0], stage.stride, CROP) for stage in stages]
    return overview([resized(crop, CROP) for crop in crops], heats, embedding, read_report(report))


def _found(subject: Subject, scratch: Path, seed: int) -> Image.Image:
    """A search, as a user makes it."""
    dataset = subject.data.dataset
    (query,) = pick(dataset.query, 1, seed + 1)
    gallery, picture = scratch / "gallery", scratch / "found.png"
    folder = dataset.gallery[0].path.parent
    for words in (
        ["embed", subject.path, folder, "-o", gallery, "--names", "market1501"],
        ["search", gallery, "--query", query.path, "--top", "9", "--picture", picture],
    ):
        subprocess.run([sys.executable, "-m", "pmm", *map(str, words)], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    with Image.open(picture) as drawn:
        return drawn.convert("RGB")


def _screen(browser: str, page: Path, scratch: Path) -> Image.Image:
    """The first screen of a page."""
    file = scratch / "screen.png"
    flags = ["--headless", "--no-sandbox", "--hide-scrollbars", f"--window-size={SCREEN[0]},{SCREEN[1]}"]
    words = [browser, *flags, f"--user-data-dir={scratch}/browser", f"--screenshot={file}", page.resolve().as_uri()]
    subprocess.run(words, check=True, capture_output=True, timeout=120)
    with Image.open(file) as drawn:
        return drawn.convert("RGB")


if __name__ == "__main__":
    sys.exit(command_line.run(main, prog="python -m bench.lab.pictures"))
