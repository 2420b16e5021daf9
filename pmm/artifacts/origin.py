"""Where a file comes from: its run, its manifest, the checkpoint or adopted ONNX file that it was exported from, and
that one's data set."""

from __future__ import annotations

import os
from pathlib import Path

from pmm.artifacts.dataset_location import DatasetLocation, resolve_data_root
from pmm.artifacts.kinds import KIND_NAMES, RUNNABLE, kind_of, kind_of_content
from pmm.artifacts.manifest import Manifest
from pmm.artifacts.native_contracts import EngineContract, PackageContract
from pmm.artifacts.native_file import read_native
from pmm.artifacts.onnx_file import read_onnx
from pmm.artifacts.run_folder import BEST
from pmm.artifacts.trained_model import dataset_of
from pmm.data.dataset_specs import dataset_spec
from pmm.utils.errors import ConflictingOptions, InvalidFile
from pmm.utils.files import sha256

RUNS = Path("runs")
HINT = "give --dataset NAME and --root DIR"


def newest_run(name: str = BEST, *, hint: str = "train first (pmm train), or name a file") -> Path:
    """The newest file `name` in a run under runs/. Raises InvalidFile with `hint` if there is none."""
    files = sorted(RUNS.glob(f"*/{name}"), key=lambda path: path.stat().st_mtime)
    if not files:
        raise InvalidFile(f"it holds no run with {name}", path=RUNS, hint=hint)
    return files[-1]


def manifest_of(path: Path) -> Manifest:
    """The manifest of an exported file. Raises InvalidFile if it has none or was changed."""
    kind = kind_of(path, *RUNNABLE)
    if kind == "onnx":
        return read_onnx(path).manifest
    if kind == "engine":
        return read_native(path, EngineContract).manifest
    if kind == "package":
        return read_native(path, PackageContract).manifest
    raise InvalidFile(f"it is {KIND_NAMES[kind]}", path=path, expected="a file that was exported from a checkpoint")


def checkpoint_of(artifact: Path, manifest: Manifest) -> Path | None:
    """The checkpoint, or adopted ONNX file, that an exported file came from: beside it, one folder up, or in a run;
    else None. An adopted ONNX file comes from itself."""
    if manifest.is_adopted_itself:
        return artifact
    kind, folder = "onnx" if manifest.adopted else "checkpoint", artifact.resolve().parent
    for path in dict.fromkeys([*folder.glob("*"), *folder.parent.glob("*"), *RUNS.glob("*/*")]):
        usable = path.is_file() and os.access(path, os.R_OK) and kind_of_content(path) == kind
        if usable and sha256(path) == manifest.checkpoint_sha256:
            return path
    return None


def resolve_dataset(path: Path, name: str = "", root: str = "") -> DatasetLocation:
    """The data set to evaluate a checkpoint or an exported file on: `name` at `root`; what is empty is taken from the
    checkpoint.

    Raises InvalidValue for an unknown name, InvalidFile or ConflictingOptions if the checkpoint does not say enough.
    """
    if name and root:
        return DatasetLocation(name, root)
    if name:
        dataset_spec(name)
    return override_dataset(training_dataset(path), path, name, root)


def override_dataset(trained: DatasetLocation, path: Path, name: str, root: str) -> DatasetLocation:
    """The data set `name` at `root`; what is empty is taken from the one that `path` was `trained` on.

    Raises ConflictingOptions for another data set without a root, InvalidFile if `trained` is empty or its folder is
    unknown or gone.
    """
    if name and root:
        return DatasetLocation(name, root)
    if not trained.name:
        raise InvalidFile("it does not say which data set to judge it on", path=path, hint=HINT)
    if name and dataset_spec(name) != dataset_spec(trained.name):
        raise ConflictingOptions(
            f"--dataset {name} needs --root: {path} was trained on {trained.name}",
            "--dataset",
            "--root",
            hint="give the folder, --root DIR",
        )
    if not (root or trained.root):
        raise InvalidFile("it does not say where its data are", path=path, hint="give --root DIR")
    if not root and not Path(trained.root).exists():
        problem = f"it was trained on {trained.name} in {trained.root}, which is gone"
        raise InvalidFile(problem, path=path, hint="give --root DIR")
    return DatasetLocation(trained.name, root or trained.root)


def training_dataset(path: Path) -> DatasetLocation:
    """The data set that a checkpoint, or the one that an exported file came from, was trained on, or that was given
    with an adopted ONNX file; empty where it does not say that, without a root where it does not say where that is.

    Raises InvalidFile if the checkpoint cannot be found or read.
    """
    manifest = None if kind_of(path, *RUNNABLE) in ("checkpoint", "torch") else manifest_of(path)
    if manifest and manifest.adopted:
        return DatasetLocation(manifest.adopted.dataset, resolve_data_root(manifest.adopted.root, path))
    checkpoint = checkpoint_of(path, manifest) if manifest else path
    if checkpoint is None:
        problem = f"its checkpoint, which names a data set, is neither beside it nor under {RUNS}/"
        raise InvalidFile(problem, path=path, hint=HINT)
    try:
        return dataset_of(checkpoint)
    except ImportError as error:
        problem = "it names a data set, and torch is needed to read it"
        raise InvalidFile(problem, path=checkpoint, hint=HINT) from error
