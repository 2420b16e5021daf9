"""Where runs lie, and what a command that was given nothing falls back to."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from pmm.config import Config
from pmm.utils.errors import UserError

RUNS = Path("runs")


def newest_run(name: str = "best.pth") -> Path:
    """The newest file `name` in a run under runs/. Raises UserError if there is none."""
    found = sorted(RUNS.glob(f"*/{name}"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise UserError(f"no {name} under {RUNS}/; train first (python -m pmm.train), or give a file")
    return found[-1]


def with_resolved_data_root(config: Config, checkpoint: Path) -> Config:
    """`config` of `checkpoint`, its data folder as `resolve_data_root` finds it."""
    root = resolve_data_root(config.data.root, checkpoint)
    return dataclasses.replace(config, data=dataclasses.replace(config.data, root=root))


def resolve_data_root(root: str, checkpoint: Path) -> str:
    """The data folder that a checkpoint names; if that is relative to where it was trained, seen from the checkpoint.

    `root` as it is if it cannot be found.
    """
    if root and not Path(root).is_absolute() and not Path(root).is_dir():
        for folder in Path(checkpoint).resolve().parents:
            if (folder / root).is_dir():
                return str(folder / root)
    return root
