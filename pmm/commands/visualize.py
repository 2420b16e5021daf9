"""Draw what a trained model does, as PNG files.

pmm visualize CKPT.pth [--what cam,mix,lists,curves] [--against OTHER.pth] [--out DIR] [--crops N] ...

cam: where each stage looks (Grad-CAM). mix: the blocks that Hard-Mix ranks first, before and after. lists: queries and
what the gallery gives, right and wrong. curves: how the run went.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from pmm.artifacts.runs import newest_run
from pmm.utils import command_line
from pmm.utils.errors import UserError
from pmm.utils.files import existing_file, output_file, replacing
from pmm.utils.hardware import cuda_index
from pmm.visualize.curves import read_run
from pmm.visualize.pictures import PICTURES, NotThere, PictureOptions, Pictures
from pmm.visualize.sheet import HEIGHT

CROPS, HEIGHTS = (1, 100), (64, 1024)
"""Within these, a picture can be read and be held in memory."""


@dataclass(frozen=True, kw_only=True)
class VisualizeCommand:
    """`pmm visualize CKPT.pth`"""

    checkpoint: tyro.conf.Positional[Path | None] = None
    """Checkpoint (.pth); without one, best.pth of the newest run under runs/."""
    what: str = ",".join(PICTURES)
    """Pictures to draw, with commas between: cam, mix, lists, curves."""
    against: Path | None = None
    """Another checkpoint, a baseline say: cam, lists and curves show it at the left of CKPT."""
    out: Annotated[Path | None, tyro.conf.arg(aliases=["-o"])] = None
    """Folder of the pictures (default: pictures/ beside CKPT; with --against, pictures-against-NAME/)."""
    crops: int = 5
    """Rows of cam, mix and lists: crops, or queries."""
    split: Literal["test", "train"] = "test"
    """Whose crops cam shows: test people, new to the classifier, each stage's own answer explained; or train, the true
    identity explained."""
    root: Path | None = None
    """Folder of the data set, if it is not where it was in training."""
    runs: tuple[Path, ...] = ()
    """More runs for curves (their folders)."""
    seed: int = 0
    """Draws crops and partners: another one, other crops."""
    height: int = HEIGHT
    """Height of a crop in cam and mix, in pixels."""
    device: str = "auto"
    """Where to run: auto, cpu, cuda, or cuda:N for the GPU of that number."""
    batch_size: Annotated[int, tyro.conf.arg(aliases=["-b"])] = 64
    """Images at once."""


def main(prog: str) -> None:
    """Entry point."""
    command = command_line.parse(VisualizeCommand, prog=prog, description=__doc__ or "")
    wanted = _checked(command)
    checkpoint = existing_file(command.checkpoint or newest_run(), "a checkpoint (.pth)")
    out = command.out or checkpoint.parent / "pictures"
    if command.against:
        existing_file(command.against, "a checkpoint (.pth) to compare with")
        if command.against.resolve() == checkpoint.resolve():
            raise UserError(f"--against {command.against} is the checkpoint itself; give another one")
        out = command.out or checkpoint.parent / f"pictures-against-{command.against.resolve().parent.name}"
    more_runs = [read_run(folder) for folder in command.runs]
    files = {name: output_file(out / f"{name}.png") for name in wanted}
    given = command_line.given_flags()
    options = PictureOptions(
        crops=command.crops,
        exactly="--crops" in given,
        split=command.split,
        root=command.root,
        seed=command.seed,
        height=command.height,
        device=command.device,
        batch_size=command.batch_size,
    )
    pictures = Pictures(checkpoint, command.against, options, more_runs)
    drawn = 0
    for name, file in files.items():
        try:
            picture = pictures.draw(name)
        except NotThere as reason:
            if "--what" in given:
                raise
            print(f"{prog}: note: no {file.name}: {reason}", file=sys.stderr)
            continue
        with replacing(file) as temporary:
            picture.save(temporary, optimize=True)
        drawn += 1
        print(f"{file}  {picture.width}x{picture.height}  {PICTURES[name]}", flush=True)
    if not drawn:
        raise UserError("nothing was drawn")


def _checked(command: VisualizeCommand) -> list[str]:
    """The names of the pictures. Raises UserError for values that no file is needed to see the fault of."""
    wanted = command_line.names(command.what, flag="--what")
    unknown = [name for name in wanted if name not in PICTURES]
    if unknown:
        raise UserError(f"--what: unknown picture {', '.join(map(repr, unknown))}; known: {', '.join(PICTURES)}")
    for flag, value, (low, high) in (("--crops", command.crops, CROPS), ("--height", command.height, HEIGHTS)):
        if not low <= value <= high:
            raise UserError(f"{flag} is {value}; it must be in {low}..{high}")
    for flag, value, least in (("--batch-size", command.batch_size, 1), ("--seed", command.seed, 0)):
        if value < least:
            raise UserError(f"{flag} is {value}; it must be at least {least}")
    cuda_index(command.device)
    return wanted
