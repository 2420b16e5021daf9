"""A folder that another team can run, check and trust: the bench's choice, with all that belongs to it."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pmm.artifacts.artifact import manifest_path, selftest_paths, write_thresholds
from pmm.artifacts.bundle import SEAL, Bundle, only_sealed, seal
from pmm.artifacts.client_contract import client_contract
from pmm.artifacts.manifest import Manifest
from pmm.artifacts.measured_thresholds import MeasuredThresholds
from pmm.bench.chain_run import thresholds_for_manifest
from pmm.bench.result_schema import Result
from pmm.bench.schema import BenchReport
from pmm.selftest.judge import SelftestVerdict
from pmm.selftest.run import open_selftest, run_selftest
from pmm.shipping.card import model_card
from pmm.shipping.choice import NothingShips
from pmm.shipping.pages import write_pages
from pmm.utils.errors import CannotWrite, InvalidFile
from pmm.utils.files import cannot_write, make_folder, output_file, sha256, write_file

CARD, THRESHOLDS, REPORT = "README.md", "thresholds.json", "report"


@dataclass(frozen=True)
class Shipped:
    """What was handed over."""

    folder: Path
    bundle: Bundle
    result: Result
    verdict: SelftestVerdict
    """Of the selftest, run in the new folder."""


def check_place(folder: Path, *, overwrite: bool = False) -> None:
    """Raises CannotWrite where `folder` is no place for a new one: it is a file, a link, cannot be written, or holds
    something.

    A folder of pmm ship to which nothing was added may be written again with `overwrite`.
    """
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise CannotWrite("it is a link or a file", path=folder, expected="a folder to make")
    if folder.is_dir() and any(folder.iterdir()):
        if not only_sealed(folder):
            raise CannotWrite("it holds files that pmm ship did not write", path=folder, hint="give another -o")
        if not overwrite:
            raise CannotWrite("it is of an earlier pmm ship", path=folder, hint="give --overwrite, or another -o")
    output_file(folder / SEAL)


def write_shipment(
    folder: Path, report: BenchReport, report_folder: Path, result: Result, *, pictures: bool = True
) -> Shipped:
    """Make `folder` from the `result` of a `report`, whose pages lie in `report_folder`: complete or not at all. With
    `pictures` the pages in it show people of the data set.

    Raises:
        InvalidFile: the exported file is another than the bench measured, or has no selftest.
        NothingShips: it does not pass its selftest.
        CannotWrite: `folder` cannot be written.
    """
    with _new_folder(folder) as new:
        artifact = _copy_artifact(result, new)
        measured = thresholds_for_manifest(report, result)
        if measured:
            write_thresholds(artifact, measured)
        manifest = Manifest.from_json(manifest_path(artifact).read_text(), artifact)
        if measured:
            write_file(new / THRESHOLDS, _thresholds(measured, manifest))
        write_pages(report, report_folder, make_folder(new / REPORT), pictures=pictures)
        write_file(new / CARD, model_card(report, result, manifest, artifact, pictures=pictures))
        verdict = run_selftest(artifact, result.backend, precision=result.precision)
        if not verdict.passed:
            raise NothingShips(
                f"{result.name} may ship, but does not pass its own selftest (worst cosine {verdict.min_cosine:.6f})",
                path=result.artifact,
                hint="export the file again, and run pmm ship again",
            )
        bundle = seal(new, artifact=artifact.name, backend=result.backend, precision=result.precision)
    return Shipped(folder, bundle, result, verdict)


def _copy_artifact(result: Result, folder: Path) -> Path:
    """The exported file as model.onnx or model.plan, with its manifest and selftest."""
    source = Path(result.artifact or "")
    artifact = folder / f"model{source.suffix}"
    try:
        shutil.copyfile(source, artifact)
    except FileNotFoundError as error:
        raise InvalidFile("it is gone since the bench", path=source, hint="run pmm ship again") from error
    if sha256(artifact) != result.artifact_sha256:
        raise InvalidFile("it was changed since the bench measured it", path=source, hint="run pmm ship again")
    open_selftest(source)  # whole, and of this file
    for beside, copy in zip(
        (manifest_path(source), *selftest_paths(source)),
        (manifest_path(artifact), *selftest_paths(artifact)),
        strict=True,
    ):
        shutil.copyfile(beside, copy)
    return artifact


def _thresholds(measured: MeasuredThresholds, manifest: Manifest) -> str:
    rule = f"one person if {client_contract(manifest)['compare']['distance']} is at most distance"
    return json.dumps({"rule": rule, **dataclasses.asdict(measured)}, indent=2) + "\n"


@contextlib.contextmanager
def _new_folder(folder: Path) -> Iterator[Path]:
    """A folder to fill, which gets its name when all is in it, and takes the place of what has that name."""
    make_folder(folder.parent)
    try:
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as scratch:
            new, old = Path(scratch) / "new", Path(scratch) / "old"
            new.mkdir()
            yield new
            if folder.exists():
                folder.rename(old)
            new.rename(folder)
    except OSError as error:
        raise cannot_write(folder, error) from error
