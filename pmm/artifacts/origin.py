"""Where a file comes from: its manifest, the checkpoint it was exported from, and the data that one was trained on."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

from pmm.artifacts.checkpoint import load
from pmm.artifacts.kinds import NAMES, RUNNABLE, kind_of, kind_of_content
from pmm.artifacts.manifest import EngineContract, Manifest, PackageContract
from pmm.artifacts.native_file import read_native
from pmm.artifacts.onnx_file import read_onnx
from pmm.artifacts.runs import RUNS, resolve_data_root
from pmm.config import Config
from pmm.data.layouts import dataset_spec
from pmm.utils.errors import UserError
from pmm.utils.files import sha256

ADVICE = "give --dataset NAME and --root DIR"


class DataSet(NamedTuple):
    """A data set on disk."""

    name: str
    """Its layout, as pmm check lists them, or a folder."""
    root: str


def manifest_of(path: Path) -> Manifest:
    """Of an exported file. Raises UserError if it is not ours or was changed."""
    kind = kind_of(path, *RUNNABLE)
    if kind == "onnx":
        return read_onnx(path).manifest
    if kind == "engine":
        return read_native(path, EngineContract).manifest
    if kind == "package":
        return read_native(path, PackageContract).manifest
    raise UserError(f"{path} is {NAMES[kind]}; expected a file that was exported from a checkpoint")


def checkpoint_of(artifact: Path, manifest: Manifest) -> Path | None:
    """The checkpoint that an exported file came from: beside it, one folder up, or in a run. None if it is nowhere."""
    beside = artifact.resolve().parent
    for path in dict.fromkeys([*beside.glob("*"), *beside.parent.glob("*"), *RUNS.glob("*/*")]):
        usable = path.is_file() and os.access(path, os.R_OK) and kind_of_content(path) == "checkpoint"
        if usable and sha256(path) == manifest.checkpoint_sha256:
            return path
    return None


def data_set_for(path: Path, name: str = "", root: str = "") -> DataSet:
    """The data set to judge a checkpoint or an exported file on: the one that was asked for by `name` and `root`; what
    is empty is as the checkpoint says.

    Raises UserError for an unknown name, or if what the checkpoint says is of no help.
    """
    if name and root:
        return DataSet(name, root)
    if name:
        dataset_spec(name)
    return instead_of(trained_on(path), path, name, root)


def instead_of(found: DataSet, path: Path, name: str, root: str) -> DataSet:
    """The data set `name` at `root`, where each that is empty is as of the one `found` that `path` was trained on.

    Raises UserError for another data set without a root, or if the one that was found is gone or nowhere.
    """
    if name and root:
        return DataSet(name, root)
    if name and dataset_spec(name) != dataset_spec(found.name):
        raise UserError(
            f"--dataset {name} without --root: {path} was trained on {found.name}; give the folder, --root DIR"
        )
    if not (root or found.root):
        raise UserError(f"{path} does not say where its data are; give --root DIR")
    if not root and not Path(found.root).exists():
        raise UserError(f"{path} was trained on {found.name} in {found.root}, which is gone; give --root DIR")
    return DataSet(found.name, root or found.root)


def trained_on(path: Path) -> DataSet:
    """The data set that a checkpoint, or the one that an exported file came from, was trained on; without a root if it
    does not say where that is.

    Raises UserError if nothing says what it was.
    """
    checkpoint = path if kind_of(path, *RUNNABLE) in ("checkpoint", "torch") else checkpoint_of(path, manifest_of(path))
    if checkpoint is None:
        raise UserError(
            f"{path}: the checkpoint that it came from, which names a data set, is neither beside it nor under "
            f"{RUNS}/; {ADVICE}"
        )
    try:
        data = Config.from_dict(load(checkpoint)["config"]).data
    except ImportError as error:
        raise UserError(f"{checkpoint} names a data set, and torch is needed to read it; {ADVICE}") from error
    return DataSet(data.dataset, resolve_data_root(data.root, checkpoint))
