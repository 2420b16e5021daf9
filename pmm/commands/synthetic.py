"""Draw a reproducible data set of synthetic identities, in the layout of Market-1501.

pmm synthetic --out DIR [--ids N] [--cameras N] [--seed N]
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pmm.config import DataConfig
from pmm.data.synthetic.dataset import MAX_CAMERAS, MAX_IDS, draw_people
from pmm.utils import command_line
from pmm.utils.arguments import Arg


@dataclass(frozen=True, kw_only=True)
class SyntheticCommand:
    """`pmm synthetic --out DIR --ids N --seed S`"""

    out: Annotated[Path, Arg("DIR", short="-o")]
    """Folder to write; it must be new or empty."""
    ids: Annotated[int, Arg(least=2, most=MAX_IDS)] = DataConfig.synthetic_ids
    """Identities of the training split, and as many other ones for the test split."""
    seed: Annotated[int, Arg(least=0)] = DataConfig.synthetic_seed
    """Seed of the drawing."""
    cameras: Annotated[int, Arg(least=2, most=MAX_CAMERAS)] = 6
    """Cameras that see the identities."""
    workers: Annotated[int, Arg(least=0)] = 0
    """Processes that draw (default: one per core); the result does not depend on their number."""


def main(prog: str) -> None:
    """Entry point."""
    command = command_line.parse(SyntheticCommand, prog=prog, description=__doc__ or "")
    draw_people(command.out, ids=command.ids, seed=command.seed, cameras=command.cameras, workers=command.workers)
