"""Draw what a trained model does, as PNG files.

pmm visualize [CKPT] [--what cam,mix,lists,curves] [--against OTHER.pth] [--out DIR] ...

cam: where each classifier looks (class activation maps). mix: the blocks that Hard-Mix ranks first, before and after
the mix. parts: the cells of each learnt part (pcb-rpp). occlusions: what hurts when it is hidden (aos). lists: queries
and the first crops of their rankings, right or wrong. curves: loss, learning rate and mAP over the epochs.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pmm.artifacts.origin import newest_run
from pmm.utils import command_line
from pmm.utils.arguments import Arg
from pmm.utils.errors import ConflictingOptions, InvalidValue, UserError
from pmm.utils.extras import check_installed
from pmm.utils.files import existing_file, output_file, replacing
from pmm.utils.hardware import cuda_index
from pmm.visualize.curves import read_run
from pmm.visualize.pictures import OF_SOME, PICTURES, NothingToDraw, PictureOptions, Pictures
from pmm.visualize.sheet import HEIGHT


@dataclass(frozen=True, kw_only=True)
class VisualizeCommand:
    """`pmm visualize [CKPT]`"""

    checkpoint: Annotated[Path | None, Arg("CKPT", positional=True)] = None
    """Checkpoint (default: best.pth of the newest run under runs/)."""
    what: Annotated[str, Arg("NAMES")] = ",".join(PICTURES)
    """Pictures to draw, with commas between."""
    against: Annotated[Path | None, Arg("CKPT")] = None
    """Another checkpoint, such as a baseline, for comparison: cam, lists and curves show it to the left of CKPT."""
    out: Annotated[Path | None, Arg("DIR", short="-o")] = None
    """Folder of the pictures (default: pictures/ beside CKPT, or pictures-against-NAME/ with --against)."""
    crops: Annotated[int, Arg(least=1, most=100)] = 5
    """Rows of cam, mix and lists."""
    split: Literal["test", "train"] = "test"
    """Crops that cam shows: of test identities, which the classifier does not know (the map explains what each stage
    predicts), or of training identities (the map explains the true one)."""
    root: Annotated[Path | None, Arg("DIR")] = None
    """Folder of the data set (default: the one that the checkpoint was trained on)."""
    runs: Annotated[tuple[Path, ...], Arg("DIR ...")] = ()
    """Folders of more runs for curves."""
    seed: Annotated[int, Arg(least=0)] = 0
    """Seed of the choice of crops and partners."""
    height: Annotated[int, Arg(least=64, most=1024)] = HEIGHT
    """Height in pixels of a crop in cam and mix."""
    device: str = "auto"
    """Where to run: auto, cpu, cuda, or cuda:N for the GPU of that number."""
    batch_size: Annotated[int, Arg(short="-b", least=1)] = 64
    """Images per call."""

    def __post_init__(self) -> None:
        cuda_index(self.device)


def main(prog: str) -> None:
    """Entry point."""
    command = command_line.parse(VisualizeCommand, prog=prog, description=__doc__ or "")
    names = command_line.names(command.what, flag="--what")
    for name in names:
        if name not in PICTURES:
            raise InvalidValue("--what", name, choices=PICTURES)
    if command.runs and "curves" not in names:
        raise ConflictingOptions("--runs needs curves in --what", "--runs", "--what")
    check_installed(*(["torch"] if names != ["curves"] else []), "matplotlib")
    checkpoint = existing_file(command.checkpoint or newest_run(), "a checkpoint (.pth)")
    out = command.out or checkpoint.parent / "pictures"
    if command.against:
        existing_file(command.against, "a checkpoint (.pth) to compare with")
        if command.against.resolve() == checkpoint.resolve():
            raise ConflictingOptions(
                f"--against {command.against} is CKPT itself", "--against", expected="another checkpoint"
            )
        out = command.out or checkpoint.parent / f"pictures-against-{command.against.resolve().parent.name}"
    more_runs = [read_run(folder) for folder in command.runs]
    files = {name: output_file(out / f"{name}.png") for name in names}
    flags = command_line.flags_in()
    options = PictureOptions(
        crops=command.crops,
        exactly="--crops" in flags,
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
        except NothingToDraw as reason:
            if "--what" in flags:
                raise
            if name not in OF_SOME:
                command_line.note(prog, f"no {file.name}: {reason}")
            continue
        with replacing(file) as temporary:
            picture.save(temporary, optimize=True)
        drawn += 1
        print(f"{file}  {picture.width}x{picture.height}  {PICTURES[name]}", flush=True)
    if not drawn:
        raise UserError("no picture could be drawn", hint="see the notes above")
