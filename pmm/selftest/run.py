"""Selftests of artifacts: run here, or judged by what a client elsewhere computed. Loads no torch for an ONNX file or
an engine."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pmm.runtime.base import Embeddings
from pmm.runtime.open import open_runner
from pmm.selftest.client_file import read_client_embeddings
from pmm.selftest.judge import SelftestVerdict, judge
from pmm.selftest.vectors import PRECISIONS, Selftest, read_selftest
from pmm.utils.errors import CannotWrite, InvalidFile, InvalidInput, InvalidValue
from pmm.utils.files import existing_file, make_folder, sha256, write_file


def open_selftest(artifact: str | Path) -> Selftest:
    """The selftest beside `artifact`. Raises InvalidFile if the file or its selftest is missing or damaged, or they are
    not of each other."""
    if Path(artifact).is_dir():
        problem = "it is a folder, without the bundle.json of pmm ship"
        raise InvalidFile(problem, path=artifact, expected="an exported file", hint="name the file in it")
    path = existing_file(artifact, "an exported file")
    if path.suffix == ".pth":
        hint = f"export it, which writes its selftest: pmm export onnx {path}"
        raise InvalidFile("it is a checkpoint", path=path, expected="an exported file", hint=hint)
    return read_selftest(path, sha256(path))


def run_selftest(
    artifact: str | Path, backend: str = "auto", *, device: str = "auto", threads: int = 0, precision: str = ""
) -> SelftestVerdict:
    """Run `artifact` here on the crops of its selftest, which are resized as its contract says, and judge it.

    Args:
        artifact: an exported file, its selftest beside it.
        backend: as `pmm.open_runner` takes it.
        device: as `pmm.open_runner`.
        threads: as `pmm.open_runner`.
        precision: as `pmm.open_runner`.

    Raises:
        InvalidFile: no selftest, or one of another file; and as `pmm.open_runner`.

    Examples:
        >>> verdict = pmm.run_selftest("best.onnx", device="cpu")
        >>> verdict.passed, verdict.mistakes
        (True, ())
    """
    selftest = open_selftest(artifact)
    with open_runner(artifact, backend, device=device, threads=threads, precision=precision) as runner:
        embeddings: Embeddings = runner(selftest.vectors.images)
        ran_in = runner.info.precision
    return judge_embeddings(artifact, embeddings, precision=coarser(selftest.precision, ran_in), selftest=selftest)


def judge_embeddings(
    artifact: str | Path,
    embeddings: str | Path | npt.NDArray[Any],
    *,
    precision: str = "",
    selftest: Selftest | None = None,
) -> SelftestVerdict:
    """Judge what a client, in whatever language, computed with `artifact` of the crops of its selftest.

    Args:
        embeddings: [N, D] in the order of the crops, or a .csv or .npy file of them.
        precision: that the client computed in (default: that of the artifact).
        selftest: that of the artifact, if it is open already.

    Raises:
        InvalidFile: no selftest, or one of another file; no embeddings in the file.
        InvalidInput: another number of rows or of dimensions, NaN or Inf.
        InvalidValue: an unknown precision.

    Examples:
        >>> with pmm.open_runner("best.onnx") as runner:
        ...     crops = [np.load("best.onnx.selftest.npz")[f"crop_{k}"] for k in range(4)]
        ...     theirs = runner([crop[..., ::-1] for crop in crops])  # in the order of OpenCV
        >>> pmm.judge_embeddings("best.onnx", theirs).mistakes
        ('bgr',)
    """
    selftest = selftest or open_selftest(artifact)
    if precision and precision not in selftest.tolerances:
        raise InvalidValue("precision", precision, choices=selftest.tolerances)
    path = Path(embeddings) if isinstance(embeddings, (str, Path)) else None
    given = read_client_embeddings(path) if path else np.asarray(embeddings)
    check_embeddings(selftest, given, path)
    return judge(selftest, given, precision)


def check_embeddings(selftest: Selftest, given: npt.NDArray[Any], path: Path | None = None) -> None:
    """Raises InvalidInput unless `given` are embeddings as many and as long as the expected ones, and finite."""
    rows, dim = selftest.vectors.expected.shape
    if given.ndim != 2 or given.dtype.kind not in "fiu":
        raise InvalidInput(
            f"the embeddings are {given.dtype} {list(given.shape)}", path=path, expected=f"[{rows}, {dim}]"
        )
    if len(given) != rows:
        crops = ", ".join(crop.name for crop in selftest.vectors.crops)
        problem = f"{len(given)} embeddings, and the selftest has {rows} crops"
        raise InvalidInput(problem, path=path, expected=f"one for each of {crops}")
    if given.shape[1] != dim:
        problem = f"embeddings of {given.shape[1]} numbers, and the file gives {dim}"
        raise InvalidInput(problem, path=path, expected=f"[{rows}, {dim}]", hint="take its output as it is")
    finite = np.isfinite(given).all(1)
    if not finite.all():
        row = int(finite.argmin())
        hint = "in half precision, pixels of 0..255 that are not normalised overflow"
        raise InvalidInput(f"row {row} holds NaN or Inf", index=row, path=path, expected="finite numbers", hint=hint)
    too_large = (np.abs(given.astype(np.float64)) > np.finfo(np.float32).max).any(1)
    if too_large.any():
        row = int(too_large.argmax())
        problem = f"row {row} holds numbers beyond those of float32"
        raise InvalidInput(problem, index=row, path=path, expected="embeddings as the file gives them")


def coarser(*precisions: str) -> str:
    """Of several precisions the one with the least digits."""
    return max(precisions, key=PRECISIONS.index)


def write_images(selftest: Selftest, folder: Path) -> list[Path]:
    """Write the crops into `folder` as PNG files; the sorted names are the order of the rows.

    Raises CannotWrite if the folder holds other files.
    """
    from PIL import Image

    names = [crop.name for crop in selftest.vectors.crops]
    if folder.is_dir() and (others := sorted({path.name for path in folder.iterdir()} - set(names))):
        hint = "name a new folder: a client would embed them too"
        raise CannotWrite(f"it holds {others[0]}", path=folder, expected="a new or empty folder", hint=hint)
    make_folder(folder)
    paths = [folder / name for name in names]
    for path, image in zip(paths, selftest.vectors.images, strict=True):
        content = io.BytesIO()
        Image.fromarray(image).save(content, "png")
        write_file(path, content.getvalue())
    return paths
