"""Artifacts -> a model repository for Triton Inference Server: one folder per model, ready for the server.

Rules are those of Triton's model repository guide; each model's configuration: `pmm.export.triton_config`.
"""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

from pmm.artifacts.artifact import SELFTEST_SUFFIXES, Artifact, manifest_path, selftest_paths
from pmm.artifacts.kinds import KIND_NAMES, kind_of
from pmm.artifacts.manifest import Manifest
from pmm.artifacts.native_contracts import EngineContract
from pmm.artifacts.native_file import read_native
from pmm.artifacts.onnx_file import read_onnx
from pmm.export.triton_config import Serving, model_config
from pmm.export.triton_ensemble import EMBEDDINGS, ENSEMBLE, FILES, MODEL, OPENCV, PREPROCESS, ensemble_folders
from pmm.selftest.vectors import read_selftest, selftest_files
from pmm.utils.errors import CannotWrite, ConflictingOptions, InvalidFile, InvalidValue
from pmm.utils.files import cannot_write, make_folder

CONFIG, VERSION = "config.pbtxt", "1"
WEIGHTS = {"onnxruntime": "model.onnx", "tensorrt": "model.plan"}
SUFFIXES = {"onnxruntime": "-onnx", "tensorrt": "-trt"}
# All files of a model folder that was written here; a folder with others is not replaced.
ENDS = ("", ".json", *SELFTEST_SUFFIXES)
MODEL_FILES = {CONFIG, VERSION} | {f"{VERSION}/{file}{end}" for file in WEIGHTS.values() for end in ENDS}
MODEL_FILES |= {f"{VERSION}/{MODEL}", f"{VERSION}/{OPENCV}"}
ONNX_MOST = 64
NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")


@dataclass(frozen=True)
class TritonModel:
    """One model as the server will see it, and the bytes that were hashed."""

    source: Path
    name: str
    backend: str
    """onnxruntime or tensorrt."""
    content: bytes
    manifest: Manifest
    most: int
    """Largest batch."""
    config: str
    """Text of config.pbtxt."""
    selftest: tuple[bytes, bytes] | None = None
    """Content of the two files beside `source`; None without them."""
    beside: dict[str, dict[str, bytes]] = field(default_factory=dict)
    """Folders of the models that let it take image files, the ensemble last: see `ensemble_folders`."""

    @property
    def folders(self) -> dict[str, dict[str, bytes]]:
        """Name of each folder to write -> place of each file in it -> content."""
        file = Path(VERSION, WEIGHTS[self.backend])
        files = {file: self.content, manifest_path(file): self.manifest.to_json().encode()}
        files |= dict(zip(selftest_paths(file), self.selftest or (), strict=False))
        own = {path.as_posix(): content for path, content in files.items()} | {CONFIG: self.config.encode()}
        return {self.name: own, **self.beside}

    def describe(self, folder: Path) -> list[str]:
        """A line for the model in `folder`: backend, max batch, input, output; and one for an ensemble beside it."""
        size, embedding = self.manifest.preprocessing, self.manifest.embedding
        shape = ", ".join(map(str, self.manifest.input.shape(size)))
        given = f"{embedding.dtype} [batch, {embedding.dim}]"
        lines = [
            f"{folder}: {self.backend}, {self.manifest.precision_found}, max batch {self.most}, "
            f"input {self.manifest.input.name} {self.manifest.input.dtype} [batch, {shape}], "
            f"output {embedding.name} {given}"
        ]
        if self.beside:
            lines.append(
                f"{folder}{ENSEMBLE}: {self.name}{PREPROCESS}, then {self.name}; max batch {self.most}, input {FILES} "
                f"BYTES [batch, 1], an image file each, output {EMBEDDINGS} {given}"
            )
        return lines


def write_model_repository(
    artifacts: Sequence[Path],
    repository: Path,
    *,
    name: str = "",
    serving: Serving | None = None,
    image_files: bool = False,
    overwrite: bool = False,
) -> list[tuple[Artifact, TritonModel]]:
    """Write `repository`/<name>/config.pbtxt, 1/model.onnx or 1/model.plan, and 1/<model>.json, for each artifact.

    All artifacts are checked before anything is written. The folders of a model are put together outside the
    repository, where no server looks, and renamed into place: they are complete or missing, and what they replace stays
    until then.

    Args:
        artifacts: ONNX files and TensorRT engines of ours.
        name: the model's name (default: from the file's name); several models of one name get -onnx and -trt.
        image_files: write <name>-preprocess and the ensemble <name>-jpeg, too, which takes image files.
        overwrite: replace model folders that this function wrote.

    Returns:
        The copies, and the models as written, in the order of `artifacts`.

    Raises:
        InvalidFile: an artifact that is not ours, was changed or cannot be served.
        InvalidValue, ConflictingOptions: no artifact, a name that is none, or that several models would have.
        CannotWrite: a folder that exists, an ensemble of the model's that would stay as it was, or no space.
    """
    serving = serving or Serving()
    if not artifacts:
        raise InvalidValue("artifacts", [], "ONNX files (.onnx) or TensorRT engines (.plan)")
    if name and not NAME.fullmatch(name):
        raise InvalidValue("--name", name, "letters, digits, '_', '-' and '.', beginning with none of '-.'")
    opened = [(Path(path), *_open(Path(path))) for path in artifacts]
    names = _names([(path, backend) for path, backend, *_ in opened], name)
    models = []
    for model_name, (path, backend, content, manifest) in zip(names, opened, strict=True):
        if manifest.input.batch:
            raise InvalidFile(
                f"its batch is static ({manifest.input.batch})",
                path=path,
                expected="a dynamic one, as a server gathers batches of many sizes",
                hint="export it without --static-batch",
            )
        most = _largest_batch(path, manifest, serving.max_batch)
        try:
            config = model_config(model_name, backend, manifest, most, serving)
        except InvalidFile as error:
            error.path = path
            raise
        selftest = _selftest(path, manifest.sha256)
        beside = ensemble_folders(model_name, manifest, most, serving, version=VERSION) if image_files else {}
        models.append(TritonModel(path, model_name, backend, content, manifest, most, config, selftest, beside))
    _check_unique([folder for model in models for folder in model.folders])
    for model in models:
        for folder in model.folders:
            _check_place(repository / folder, overwrite)
        if not image_files and os.path.lexists(left := repository / f"{model.name}{ENSEMBLE}"):
            problem = f"it would send the images of an earlier export to the new {model.name}"
            raise CannotWrite(problem, path=left, hint="give --input jpeg to replace it, too, or remove it")
    make_folder(repository)
    return [(_write(model, repository.resolve(), repository / model.name), model) for model in models]


def _open(path: Path) -> tuple[str, bytes, Manifest]:
    """Backend, content, and a manifest that holds the content's hash. Raises InvalidFile."""
    kind = kind_of(path, "onnx", "engine")
    if kind == "onnx":
        file = read_onnx(path)
        # the copy inside the file cannot contain the file's hash
        return "onnxruntime", file.content, dataclasses.replace(file.manifest, sha256=file.sha256)
    if kind != "engine":
        hint = "export the checkpoint with pmm export onnx or pmm export trt"
        raise InvalidFile(
            f"it is {KIND_NAMES[kind]}", path=path, expected="an ONNX file or a TensorRT engine", hint=hint
        )
    engine = read_native(path, EngineContract)
    if engine.contract.flavor != "tensorrt":
        problem = "a TensorRT-RTX engine, which Triton's tensorrt backend cannot load"
        hint = "give the ONNX file instead, or build one with pmm export trt --flavor tensorrt"
        raise InvalidFile(problem, path=path, hint=hint)
    batch = engine.contract.batch
    if batch.least > 1:
        problem = f"it takes batches of {batch.least} to {batch.most}"
        hint = f"build it again with --batch 1 {batch.best} {batch.most}"
        raise InvalidFile(problem, path=path, expected="batches from 1, as a request can have one image", hint=hint)
    for before, after in pairwise(batch.profiles):
        if after.least > before.most + 1:
            problem = f"no profile takes {before.most + 1} images, and a server pads no batch"
            hint = f"build it again with --batch {before} --batch {before.most + 1} {after.best} {after.most}"
            raise InvalidFile(problem, path=path, hint=hint)
    return "tensorrt", engine.content, engine.manifest


def _selftest(path: Path, digest: str) -> tuple[bytes, bytes] | None:
    """Of the file at `path`, if the selftest beside it is whole, and of that file."""
    try:
        return selftest_files(read_selftest(path, digest))
    except InvalidFile:
        return None


def _largest_batch(path: Path, manifest: Manifest, limit: int | None) -> int:
    if manifest.engine is None:
        return ONNX_MOST if limit is None else limit
    most = manifest.engine.batch.most
    if limit is not None and limit > most:
        hint = f"or build the engine again with --batch 1 {manifest.engine.batch.best} {limit}"
        raise InvalidValue("--max-batch", limit, f"at most {most}, for which {path} is built", hint=hint)
    return most if limit is None else limit


def _names(files: Sequence[tuple[Path, str]], name: str) -> list[str]:
    """One name per (file, backend): `name` or the file's, with -onnx or -trt only where two would be the same.

    Raises ConflictingOptions where two have the same name even so.
    """
    plain = [name or _clean(path.stem) for path, _ in files]
    shared = {each for each, count in Counter(plain).items() if count > 1}
    names = [
        each + SUFFIXES[backend] if each in shared else each for each, (_, backend) in zip(plain, files, strict=True)
    ]
    for each, count in Counter(names).items():
        if count > 1:
            same = ", ".join(str(path) for (path, _), model in zip(files, names, strict=True) if model == each)
            problem = f"{same} would all be model '{each}'"
            raise ConflictingOptions(problem, "--name", hint="write them one at a time, each with its own --name")
    return names


def _check_unique(folders: Sequence[str]) -> None:
    """Raises ConflictingOptions where a model has the name that another's ensemble, or the first step of it, has."""
    for each, count in Counter(folders).items():
        if count > 1:
            problem = f"'{each}' would be the name of a model and of a part of another's ensemble"
            raise ConflictingOptions(problem, "--name", hint="write them one at a time, each with its own --name")


def _clean(stem: str) -> str:
    """A file name's stem as a model name: other characters become '-', none of '-.' at an end."""
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", stem).strip("-.") or "model"


def _check_place(folder: Path, overwrite: bool) -> None:
    """Raises CannotWrite if a model cannot be put at `folder`."""
    if not os.path.lexists(folder):
        return
    if not overwrite:
        raise CannotWrite("it exists", path=folder, hint="give --overwrite to replace it, or another --name")
    if folder.is_symlink() or not folder.is_dir():
        raise CannotWrite("it is not a folder", path=folder, hint="move it away or give another --name")
    for inside in folder.rglob("*"):
        if inside.relative_to(folder).as_posix() not in MODEL_FILES:
            problem = "pmm export triton did not write all of it, and does not replace it"
            raise CannotWrite(problem, path=folder, hint=f"move {inside} away")


def _write(model: TritonModel, repository: Path, shown: Path) -> Artifact:
    """Put the folders of `model` into `repository` by renaming. Raises CannotWrite naming `shown`; the old folders are
    then in place."""
    try:
        scratch = Path(tempfile.mkdtemp(dir=_outside(repository), prefix=f".{model.name}."))
    except OSError as error:
        raise cannot_write(shown, error) from error
    new, old = scratch / "new", scratch / "old"
    try:
        old.mkdir()
        for name, files in model.folders.items():
            (new / name / VERSION).mkdir(parents=True)  # in that of an ensemble is no file
            for place, content in files.items():
                _put(new / name / place, content)
        _swap(list(model.folders), new, repository, old)
    except OSError as error:
        raise cannot_write(shown, error) from error
    finally:
        if not any(old.glob("*")) or all((repository / name).exists() for name in model.folders):
            shutil.rmtree(scratch, ignore_errors=True)  # else an old model could not be put back: do not lose it
    return Artifact(shown / VERSION / WEIGHTS[model.backend], model.manifest)


def _put(path: Path, content: bytes) -> None:
    """On the disk when it returns: the folder must not get its name before its files have their content."""
    with path.open("xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _swap(names: Sequence[str], new: Path, repository: Path, old: Path) -> None:
    """Each of `names` in `repository` goes to `old`, and that in `new` takes its place; if one fails, all go back."""
    placed = []
    try:
        for name in names:
            if (repository / name).exists():
                (repository / name).rename(old / name)
            (new / name).rename(repository / name)
            placed.append(name)
    except BaseException:  # Ctrl-C too
        for name in placed:
            (repository / name).rename(new / name)
        for folder in old.iterdir():
            if not (repository / folder.name).exists():
                folder.rename(repository / folder.name)
        raise


def _outside(repository: Path) -> Path:
    """Where to put a model together. A server takes every folder in its repository for a model, hidden ones too."""
    beside = repository.parent
    same_disk = beside.stat().st_dev == repository.stat().st_dev  # a rename cannot cross disks
    return beside if same_disk and os.access(beside, os.W_OK) else repository
