"""Draw a reproducible data set of synthetic people in Market-1501 layout."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from pmm.config import DataConfig, fast_mode
from pmm.data.synthetic.dataset import draw_dataset
from pmm.utils import command_line

PROG = "pmm synthetic"
FAST_IDS = 12


@dataclass(frozen=True, kw_only=True)
class Command:
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


def draw(out: Path, *, ids: int, seed: int, cameras: int = 6, workers: int = 0) -> None:
    """Draw with a progress bar; at most a few identities if PMM_FAST=1."""
    from tqdm import tqdm

    if fast_mode():
        ids = min(ids, FAST_IDS)
    with tqdm(desc=f"drawing synthetic people into {out}", unit="img", leave=False, disable=None) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        drawn = draw_dataset(out, ids=ids, seed=seed, cameras=cameras, workers=workers or None, progress=progress)
    counts = ", ".join(f"{count} {name}" for name, count in drawn["counts"].items())
    print(f"{out}: {ids} + {ids} synthetic identities, seed {seed} ({counts})")


def main() -> None:
    """Entry point."""
    command = command_line.parse(Command, prog=PROG, description=__doc__ or "")
    draw(command.out, ids=command.ids, seed=command.seed, cameras=command.cameras, workers=command.workers)


if __name__ == "__main__":
    command_line.run(main, prog=PROG)
