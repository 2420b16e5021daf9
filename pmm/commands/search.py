"""Find the crops of a gallery that are most like an image, or like each of a folder. Loads no torch for an ONNX file or
an engine.

pmm search GALLERY --query IMAGE|FOLDER [--top 10] [--threshold auto] [--json]
pmm search GALLERY --query IMAGE --camera 2 3 --time-from 2026-05-01T08:00 [--picture OUT.png]

Distances are exact: Euclidean or, for a model that compares by cosine, 1 - cosine similarity.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from pmm.data.bad_images import BadImageOptions, bad_image_lines
from pmm.gallery.search_options import SearchFilterFlags
from pmm.gallery.search_request import SearchAnswer, SearchRequest
from pmm.runtime.runner_flags import BatchRunnerFlags
from pmm.utils import command_line
from pmm.utils.arguments import Arg
from pmm.utils.errors import ConflictingOptions
from pmm.utils.facts import how_many
from pmm.utils.files import output_file, replacing


@dataclass(frozen=True, kw_only=True)
class SearchCommand:
    """`pmm search GALLERY --query IMAGE|FOLDER`"""

    gallery: Annotated[Path, Arg("GALLERY", positional=True)]
    """Gallery written by pmm embed, or an index (.npz) of an earlier version."""
    query: Annotated[Path, Arg("IMAGE|FOLDER")]
    """Image to look for, or a folder of them."""
    model: Annotated[Path | None, Arg("FILE")] = None
    """Model that embeds the query: another file of the same checkpoint (default: the one that made the gallery)."""
    top: Annotated[int, Arg(least=1)] = 10
    """How many crops to list."""
    threshold: Annotated[str, Arg("auto|T")] = ""
    """Mark what is at most this distance away as a match; auto takes the gallery's threshold."""
    fmr: Annotated[float | None, Arg("RATE")] = None
    """With --threshold auto: the false match rate whose threshold is taken, if the gallery has several."""
    rows: Annotated[SearchFilterFlags, Arg(group="crops to look at")] = field(default_factory=SearchFilterFlags)
    bad_images: Annotated[BadImageOptions, Arg(group="options")] = field(default_factory=BadImageOptions)
    json: Annotated[bool, Arg(group="output")] = False
    """Print JSON, with all columns of the gallery. Bytes of names that are no UTF-8 are as Python reads them: a byte FF
    is \\udcff."""
    csv: Annotated[bool, Arg(group="output")] = False
    """Print CSV, with all columns of the gallery. Names are printed byte by byte as files have them, UTF-8 or not."""
    picture: Annotated[Path | None, Arg("OUT.png", group="output")] = None
    """Also draw the first results (20 at most of each of 20 queries) to this file (.png)."""
    folder: Annotated[Path | None, Arg("FOLDER", group="output")] = None
    """For --picture: folder of the gallery's crops (default: the one that was embedded)."""
    running: BatchRunnerFlags = field(default_factory=BatchRunnerFlags)

    def __post_init__(self) -> None:
        if self.json and self.csv:
            raise ConflictingOptions("--json and --csv exclude each other", "--json", "--csv", hint="leave one out")
        if self.fmr is not None and self.threshold != "auto":
            raise ConflictingOptions("--fmr needs --threshold auto", "--fmr", "--threshold")
        if self.folder and not self.picture:
            raise ConflictingOptions("--folder needs --picture", "--folder", "--picture")


def main(prog: str) -> None:
    """Entry point."""
    command = command_line.parse(SearchCommand, prog=prog, description=__doc__ or "")
    if command.picture:
        keep = [each for each in (command.query, command.gallery, command.model) if each]
        output_file(command.picture, *keep, suffixes=(".png",))
    search = SearchRequest(
        query=command.query, model=command.model, top=command.top, threshold=command.threshold, fmr=command.fmr,
        rows=command.rows, skip_bad_images=command.bad_images.skip_bad_images, batch_size=command.running.batch_size,
    )  # fmt: skip
    running = command.running
    answer = search.run(command.gallery, backend=running.backend, device=running.device, threads=running.threads)
    results = answer.results
    for line in bad_image_lines(answer.bad):
        command_line.note(prog, line)
    if command.top > answer.candidates:
        crops = f"{'is' if answer.candidates == 1 else 'are'} {how_many(answer.candidates, 'crop')}"
        some = " for some queries" * (len(answer.queries) > 1 and command.rows.not_same_camera)
        command_line.note(prog, f"there {crops} to look at{some}, and all are listed")
    print(results.as_json() if command.json else results.as_csv() if command.csv else results.as_table(), flush=True)
    if command.picture:  # last: a crop that is gone takes nothing from what was found
        _draw(command.picture, answer, command.folder, prog)


def _draw(out: Path, answer: SearchAnswer, folder: Path | None, prog: str) -> None:
    from pmm.visualize.ranked import MAX_FOUND, MAX_QUERIES, found_picture

    shown = answer.results.results[:MAX_QUERIES]
    rows = [[answer.file_of(crop, folder) for crop in result.found] for result in shown]
    picture = found_picture(
        answer.queries[:MAX_QUERIES], rows, [[crop.distance for crop in result.found] for result in shown]
    )
    with replacing(out) as temporary:
        picture.save(temporary)
    if max(map(len, rows)) > MAX_FOUND or len(answer.queries) > MAX_QUERIES:
        limits = f"the first {MAX_FOUND} crops of each of the first {MAX_QUERIES} queries"
        command_line.note(prog, f"{out} shows {limits}")
