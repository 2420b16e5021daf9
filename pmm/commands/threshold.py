"""Give a gallery the distance up to which two crops count as one person; pmm search --threshold auto uses it.

pmm threshold GALLERY --negatives-from-cameras --stretch SECONDS [--fmr 1e-2] [--people COLUMN]
pmm threshold GALLERY --from report.json
pmm threshold GALLERY --set T [--fmr RATE]
pmm threshold GALLERY --remove [--fmr RATE]

--negatives-from-cameras needs no identity labels: people whom one camera sees at one time are different people. What
is promised is the false match rate of such pairs, each stretch of time counting alike, with a confidence that counts
stretches, not pairs, whatever people look like. It is the rate within one camera; searches run across cameras, too,
where it is not measured. A rate of 1e-3 takes some 3,300 stretches; if there are fewer, no threshold is written.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pmm.evaluation.camera_threshold import WINDOW
from pmm.gallery.camera_negatives import put_thresholds, threshold_from_cameras
from pmm.gallery.gallery import Gallery
from pmm.gallery.storage.thresholds import Threshold
from pmm.utils import command_line
from pmm.utils.arguments import Arg
from pmm.utils.errors import ConflictingOptions, InvalidFile, InvalidInput, InvalidValue
from pmm.utils.files import existing_file

FMR = 1e-3


@dataclass(frozen=True, kw_only=True)
class ThresholdCommand:
    """`pmm threshold GALLERY --negatives-from-cameras | --from REPORT.json | --set T | --remove`"""

    gallery: Annotated[Path, Arg("GALLERY", positional=True)]
    """Gallery written by pmm embed."""
    negatives_from_cameras: bool = False
    """Find the distance from people whom one camera sees at one time, by the gallery's columns camera and time."""
    report: Annotated[Path | None, Arg("REPORT.json", flag="--from")] = None
    """Take the thresholds that pmm bench measured for the gallery's model, in the precision that it ran in."""
    distance: Annotated[float | None, Arg("T", flag="--set")] = None
    """Take this distance: Euclidean or, where the gallery compares by cosine, 1 - cosine similarity."""
    remove: bool = False
    """Remove the gallery's thresholds, or with --fmr the one for that rate."""
    fmr: Annotated[float | None, Arg("RATE")] = None
    """False match rate: the share of pairs of different people that may be taken for one. Default: 1e-3 for people seen
    at once, with --from all that were measured, with --set none, and --threshold auto takes that one."""
    confidence: Annotated[float | None, Arg("SHARE", group="people seen at once")] = None
    """How sure it must be that the rate is kept, above 0.5 (default: 0.95)."""
    stretch: Annotated[float | None, Arg("SECONDS", group="people seen at once")] = None
    """No person is seen over a longer time than this, from first to last, by all cameras: the longest visit or, where
    the same people come again, as long as they do. Must be given: it is what the promise rests on. In the unit of the
    column time: frames, where file names count frames."""
    same_time: Annotated[float | None, Arg("SECONDS", group="people seen at once", least=0)] = None
    """Crops of one camera whose times differ by no more are seen at once (default: 0). In the same unit; without
    --people less than the time between two frames."""
    people: Annotated[str, Arg("COLUMN", group="people seen at once")] = ""
    """Column that names the person or the track of each crop, if there is one: pairs of one are left out, and who is
    seen for longer than --stretch under one name, as staff, counts in one stretch alone."""

    def __post_init__(self) -> None:
        given = [
            flag for flag, there in (
                ("--negatives-from-cameras", self.negatives_from_cameras), ("--from", self.report is not None),
                ("--set", self.distance is not None), ("--remove", self.remove),
            ) if there
        ]  # fmt: skip
        if len(given) != 1:
            problem = f"{' and '.join(given)} exclude each other" if given else "nothing says where it comes from"
            raise ConflictingOptions(
                problem,
                *given,
                hint="give one of --negatives-from-cameras, --from REPORT.json, --set T and --remove",
            )
        if not self.negatives_from_cameras and (surplus := list(self.camera_options)):
            flag = f"--{surplus[0].replace('_', '-')}"
            problem = f"{flag} is about people whom one camera sees at once, not {given[0]}"
            raise ConflictingOptions(problem, flag, given[0], hint=f"leave {flag} out")
        for flag, share, least in (("--fmr", self.fmr, 0.0), ("--confidence", self.confidence, 0.5)):
            if share is not None and not least < share < 1:
                raise InvalidValue(flag, share, f"more than {least:g} and less than 1")
        if self.negatives_from_cameras and self.stretch is None:
            raise ConflictingOptions(
                "nothing says for how long a person may be seen", "--negatives-from-cameras",
                hint="give --stretch SECONDS, the longest time from someone's first crop to the last",
            )  # fmt: skip
        if self.stretch is not None and not self.stretch > 0:
            raise InvalidValue("--stretch", self.stretch, "more than 0 seconds")
        if self.stretch is not None and self.same_time is not None and self.same_time > WINDOW * self.stretch:
            raise InvalidValue("--same-time", self.same_time, f"at most {WINDOW:g} of --stretch")
        if self.distance is not None and not (math.isfinite(self.distance) and self.distance >= 0):
            raise InvalidValue("--set", self.distance, "a distance of 0 or more")

    @property
    def camera_options(self) -> dict[str, Any]:
        """Those that are given of the options about people seen at once."""
        values = {name: getattr(self, name) for name in ("confidence", "same_time", "people", "stretch")}
        return {name: value for name, value in values.items() if value not in (None, "")}


def main(prog: str) -> None:
    """Entry point."""
    command = command_line.parse(ThresholdCommand, prog=prog, description=__doc__ or "")
    gallery = Gallery.open(command.gallery)
    if command.remove:
        gone = _removed(gallery, command.fmr)
        print(f"{command.gallery}: {', '.join(map(str, gone))} removed, {len(gallery.thresholds)} left")
        return
    if command.report is not None:
        thresholds = _of_report(command.report, gallery, command.fmr)
        lines = [str(each) for each in thresholds]
    elif command.distance is not None:
        thresholds = [_given(gallery, command.distance, command.fmr)]
        lines = [f"{thresholds[0]}, as given"]
    else:
        threshold, line = _of_cameras(gallery, command)
        thresholds, lines = [threshold], [line]
    replaced = put_thresholds(gallery, thresholds)
    for line in lines:
        print(f"{command.gallery}: {line}")
    for each in replaced:
        origin = {"bench": "measured", "cameras": "from people seen at once", "given": "as given"}[each.kind]
        command_line.note(prog, f"it replaces the {each} ({origin})")


def _removed(gallery: Gallery, fmr: float | None) -> list[Threshold]:
    """Raises InvalidValue if there is none for the rate, InvalidFile if there is none at all."""
    with gallery.writer():
        gone = [each for each in gallery.thresholds if fmr is None or each.is_for(fmr)]
        if not gallery.thresholds:
            raise InvalidFile("it has no threshold", path=gallery.path)
        if not gone:
            raise InvalidValue("--fmr", fmr, "the rate of a threshold; pmm gallery info lists them")
        gallery.set_thresholds([each for each in gallery.thresholds if each not in gone])
    return gone


def _given(gallery: Gallery, distance: float, fmr: float | None) -> Threshold:
    """Raises InvalidValue for a distance that no two embeddings of norm 1 have."""
    normalised = gallery.metric == "cosine" or (gallery.source is not None and gallery.source.embedding.normalised)
    if normalised and distance > 2:
        raise InvalidValue("--set", distance, "at most 2, as far as embeddings of norm 1 can be apart")
    return Threshold.of_source(gallery.source, gallery.precision, "given", fmr=fmr, distance=distance)


def _of_cameras(gallery: Gallery, command: ThresholdCommand) -> tuple[Threshold, str]:
    """Raises InvalidInput where too few stretches of time show people at once."""
    found = threshold_from_cameras(gallery, command.fmr or FMR, **command.camera_options)
    seen = f"{found.stretches:,} stretches of time, {found.pairs:,} pairs of crops that one camera saw at once"
    if found.distance is None:
        wanted = f"a false match rate of {found.fmr:g} at a confidence of {found.confidence:g}"
        if found.stretches_needed is None:
            raise InvalidInput(
                f"{seen}: {found.estimate:.2g} of them are at distance 0, too many for {wanted}", path=gallery.path,
                hint="embed each crop once, or name a column of people or tracks (--people)",
            )  # fmt: skip
        raise InvalidInput(
            f"{seen}: too few for {wanted}", path=gallery.path, expected=f"{found.stretches_needed:,} stretches",
            hint="embed more hours, or ask for a higher --fmr",
        )  # fmt: skip
    threshold = Threshold.of_source(
        gallery.source, gallery.precision, "cameras",
        fmr=found.fmr, distance=found.distance, upper=found.upper, data=seen,
    )  # fmt: skip
    return threshold, (
        f"{threshold}: {found.estimate:.2g} measured within cameras in {seen}; at most {found.upper:.2g} at a "
        f"confidence of {found.confidence:g}, no distribution assumed, if nobody is seen for longer than "
        f"{command.stretch:g}; across cameras it is not measured"
    )


def _of_report(path: Path, gallery: Gallery, fmr: float | None) -> list[Threshold]:
    """Raises InvalidFile for a report of another model, or without a threshold for `fmr`."""
    from pmm.bench.schema import read_report

    report, source = read_report(existing_file(path, "a report.json of pmm bench")), gallery.source
    if source is None:
        raise InvalidFile("it does not say what made its embeddings", path=gallery.path, hint="give --set T")
    if gallery.precision != "fp32":
        problem = f"it stores {gallery.precision}, and a report's thresholds are measured on embeddings in fp32"
        raise InvalidFile(problem, path=gallery.path, hint="find one with --negatives-from-cameras, or give --set T")
    results = [
        result for result in report.results
        if result.thresholds and result.precision == source.precision
        and (result.artifact_sha256 == source.artifact_sha256 or report.checkpoint.sha256 == source.checkpoint_sha256)
    ]  # fmt: skip
    if not results:
        problem = f"it has no thresholds of the gallery's model, in {source.precision}"
        raise InvalidFile(problem, path=path, hint="run pmm bench on that model")
    results.sort(key=lambda result: result.artifact_sha256 != source.artifact_sha256)
    assert results[0].thresholds is not None
    thresholds = [
        Threshold.of_source(
            source, gallery.precision, "bench",
            fmr=point.fmr, distance=point.distance, tpr=point.tpr, data=report.dataset.name,
        )
        for point in results[0].thresholds.measured(gallery.metric)
        if fmr is None or math.isclose(point.fmr, fmr)
    ]  # fmt: skip
    if not thresholds:
        raise InvalidFile(f"it has no threshold for a false match rate of {fmr:g}" if fmr else "it has no threshold",
                          path=path, hint="measure on more people")  # fmt: skip
    return thresholds
