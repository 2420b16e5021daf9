"""Adopt a network that other code made, so that every other command takes it: evaluate, export, bench, ...

pmm adopt SOURCE -o OUT.pth [--weights FILE] --height H --width W [--mean R G B --std R G B] ...

The factory, a callable that returns an nn.Module for images [N, 3, H, W], is found in the current folder or on
PYTHONPATH and runs here, and never again: OUT.pth holds the network itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pmm.adoption.factory import Factory
from pmm.config import IMAGENET_MEAN, IMAGENET_STD, MAX_SIDE
from pmm.data.preprocessing import Preprocessing
from pmm.utils import command_line
from pmm.utils.arguments import Arg
from pmm.utils.files import output_file


@dataclass(frozen=True, kw_only=True)
class AdoptCommand:
    """`pmm adopt SOURCE -o OUT.pth`"""

    source: Annotated[str, Arg("SOURCE", positional=True)]
    """MODULE:FACTORY, or MODULE:FACTORY(ARGUMENTS) with literals as arguments."""
    out: Annotated[Path, Arg("OUT.pth", short="-o")]
    """File to write (.pth)."""
    height: Annotated[int, Arg(least=1, most=MAX_SIDE)]
    """Height in pixels of the images that it takes."""
    width: Annotated[int, Arg(least=1, most=MAX_SIDE)]
    """Width in pixels of the images that it takes."""


def main(prog: str) -> None:
    """Entry point."""
    command = command_line.parse(AdoptCommand, prog=prog, description=__doc__ or "")
    factory = Factory.parse(command.source)
    output_file(command.out, suffixes=(".pth",))
    size = Preprocessing(height=command.height, width=command.width, mean=IMAGENET_MEAN, std=IMAGENET_STD)

    from pmm.adoption.program import network_of
    from pmm.artifacts.adopted_file import Adopted, save_adopted
    from pmm.artifacts.checkpoint import versions

    with factory.importable():
        network = network_of(factory(), size)
    save_adopted(command.out, Adopted(model=network, preprocessing=size, source={"factory": factory.text}), versions())
    print(f"{command.out} is written: {network.embedding_dim} dimensions")
