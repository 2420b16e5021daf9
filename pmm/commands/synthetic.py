"""Draw a reproducible data set of synthetic people in Market-1501 layout."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from pmm.config import DataConfig
from pmm.data.synthetic.dataset import draw_people
from pmm.utils import command_line


@dataclass(frozen=True, kw_only=True)
class SyntheticCommand:
    """`pmm synthetic --out DIR --ids N --seed S`"""

    out: Path
    """Folder to write; must not hold anything yet."""
    ids: int = DataConfig.synthetic_ids
    """Identities of the training split, and as many others for the test split."""
    seed: int = DataConfig.synthetic_seed
    """Seed of everything that is drawn."""
    cameras: int = 6
    """Cameras."""
    workers: Annotated[int, tyro.conf.arg(help_behavior_hint="(default: every core)")] = 0
    """Processes that draw (0: one per core); the result does not depend on it."""


def main(prog: str) -> None:
    """Entry point."""
    command = command_line.parse(SyntheticCommand, prog=prog, description=__doc__ or "")
    draw_people(command.out, ids=command.ids, seed=command.seed, cameras=command.cameras, workers=command.workers)
