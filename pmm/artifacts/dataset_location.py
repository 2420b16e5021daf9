"""Where the data set that a checkpoint was trained on is. Loads no torch."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import NamedTuple

from pmm.config import Config


class DatasetLocation(NamedTuple):
    """A data set on disk."""

    name: str
    """As pmm check lists them, or a folder."""
    root: str


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
