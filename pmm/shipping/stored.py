"""A finished bench that is judged again, by other gates or for another target, without measuring anything."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from pathlib import Path

from pmm.artifacts.dataset_location import DatasetLocation
from pmm.artifacts.origin import override_dataset
from pmm.bench.accuracy import crops_digest
from pmm.bench.gates import failures
from pmm.bench.pages.queries import reference_of
from pmm.bench.result_schema import Result
from pmm.bench.schema import BenchReport, Gates, read_report
from pmm.data.bad_images import unreadable_images
from pmm.data.dataset_specs import dataset_spec
from pmm.data.readers import read_dataset
from pmm.data.splits import without_images
from pmm.utils.errors import InvalidFile, InvalidValue
from pmm.utils.files import sha256

REPORT, ARTIFACTS = "report.json", "artifacts"
ANEW = "leave --report out, which measures it"


def judged_again(folder: Path, checkpoint: Path, gates: Gates, backends: Collection[str]) -> BenchReport:
    """The report of a finished bench in `folder`, with the failures of these `gates` in place of its own.

    The chain to an index is left out: its gates are not asked for here.

    Args:
        checkpoint: the model that it must be of.
        backends: those that are to run here; one of them that could not be measured is a failure.

    Raises:
        InvalidFile: there is no report, or it is of another model or another version.
    """
    path = folder / REPORT
    if not path.is_file():
        raise InvalidFile(f"it holds no {REPORT}", path=folder, expected="the folder of a finished bench", hint=ANEW)
    report = _moved(read_report(path), folder)
    if (found := sha256(checkpoint)) != report.checkpoint.sha256:
        of = report.checkpoint.sha256
        problem = f"it is of another model (SHA-256 {of[:12]}..., and {checkpoint} has {found[:12]}...)"
        raise InvalidFile(problem, path=path, hint=ANEW)
    gates = dataclasses.replace(gates, max_fmr_factor=None, max_tpr_drop=None)
    reference = reference_of(report)
    queries = 0 if reference is None else report.dataset.queries - (reference.skipped_queries or 0)
    if queries < 1:
        raise InvalidFile("its reference was not measured", path=path, hint=ANEW)
    broken = failures(
        report.results,
        gates,
        reference=report.reference,
        queries=queries,
        required=[name for name in backends if any(result.backend == name for result in report.results)],
    )
    return dataclasses.replace(report, gates=dataclasses.replace(gates, failures=tuple(broken)), chain=None)


def check_same_data(report: BenchReport, checkpoint: Path, name: str, root: str) -> None:
    """Raises InvalidValue or InvalidFile if the data set `name` in `root`, each that is empty as in the `report`, is
    not the one that was measured, crop by crop."""
    measured = report.dataset
    if name and dataset_spec(name) != dataset_spec(measured.name):
        raise InvalidValue("--dataset", name, f"{measured.name}, which the report was measured on", hint=ANEW)
    if not root:
        return
    data = override_dataset(DatasetLocation(measured.name, measured.root), checkpoint, name, root)
    split = read_dataset(data.name, data.root)
    if measured.unreadable:
        split = without_images(split, unreadable_images([sample.path for sample in (*split.query, *split.gallery)]))
    if crops_digest((*split.query, *split.gallery)) != measured.digest:
        raise InvalidFile("its crops are not those that the report was measured on", path=root, hint=ANEW)


def _moved(report: BenchReport, folder: Path) -> BenchReport:
    """`report`, whose exported files are named where they lie: the `folder` of the bench may have been moved."""

    def found(result: Result) -> Result:
        path = Path(result.artifact or "")
        moved = folder / ARTIFACTS / path.name
        here = result.artifact and not path.is_file() and moved.is_file()
        return dataclasses.replace(result, artifact=str(moved)) if here else result

    return dataclasses.replace(report, results=tuple(map(found, report.results)))
