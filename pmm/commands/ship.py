"""One folder to hand over: the fastest exported file that keeps the gates, with its proof and its acceptance test.

pmm ship CKPT --target cpu|gpu [-o DIR] [--prefer fastest|smallest] [--no-pictures] ...
pmm ship CKPT --target cpu|gpu --report DIR [--max-map-drop X] ...

Runs the bench on what serves on the target without torch, and writes the file that may ship with its manifest, its
selftest, its thresholds, the report and a model card. With --report it chooses again from a finished bench, by other
gates or for another target, and measures nothing. On the target, `pmm selftest DIR` accepts the folder or says why not.
The exit code is 1 if no file keeps the gates.

The report has all figures, the machine's CPU, GPUs and versions, and pictures of people of the data set with the names
of their files: give those to nobody who may not see them, or leave them out with --no-pictures. Folders of this machine
are never in it.
"""

from __future__ import annotations

import os
import shlex
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from pmm.artifacts.artifact import manifest_path
from pmm.artifacts.kinds import require_kind
from pmm.bench.gates import GateFlags
from pmm.bench.request import Options, make_request
from pmm.bench.resume_store import FOLDER
from pmm.bench.run import run_bench
from pmm.bench.schema import BenchReport
from pmm.selftest.judge import describe_verdict
from pmm.selftest.run import open_selftest
from pmm.shipping.choice import ALL_SERVING, TARGETS, NothingShips, Prefer, backends_of, chosen
from pmm.shipping.ship import check_place, write_shipment
from pmm.shipping.stored import REPORT, check_same_data, judged_again
from pmm.utils import command_line
from pmm.utils.arguments import Arg
from pmm.utils.errors import ConflictingOptions, InvalidFile, one_of, printable
from pmm.utils.extras import check_installed

MEASURED = ("precisions", "batches", "device", "samples", "seconds", "resume")
"""Options of the bench alone."""
TARGET_HELP = f"Where it will run: {one_of((*TARGETS, *ALL_SERVING))}."


@dataclass(frozen=True, kw_only=True)
class ShipCommand:
    """`pmm ship CKPT`"""

    checkpoint: Annotated[Path, Arg("CKPT", positional=True)]
    """A checkpoint, or an adopted ONNX file."""
    target: Annotated[str, Arg("NAME", help=TARGET_HELP)]
    prefer: Prefer = "fastest"
    """Of those that keep the gates: the fastest at the smallest batch, or the smallest file."""
    out: Annotated[Path | None, Arg("DIR", short="-o")] = None
    """Folder to make (default: ship-TARGET/ beside the checkpoint); the bench's own files go to DIR-bench/."""
    overwrite: bool = False
    """Replace a folder of an earlier pmm ship."""
    no_pictures: bool = False
    """Leave the pictures of people, and the names of their files, out of the report."""
    report: Annotated[Path | None, Arg("DIR")] = None
    """Choose again from the finished bench of this model in DIR, a folder of pmm bench or the DIR-bench/ of an earlier
    pmm ship, and measure nothing; --dataset and --root then say what it must have been measured on."""
    precisions: Annotated[str, Arg("NAMES", group="bench")] = ""
    """As pmm bench has it (default: auto)."""
    batches: Annotated[str, Arg("N,N", group="bench")] = "1,8"
    """Batch sizes to time, with commas between."""
    dataset: Annotated[str, Arg("NAME", group="bench")] = ""
    """Data set (default: the one that the model was trained on, or that was named when it was adopted)."""
    root: Annotated[str, Arg("DIR", group="bench")] = ""
    """Folder of the data set (default: as for --dataset)."""
    device: Annotated[str, Arg(group="bench")] = "auto"
    """As pmm bench has it."""
    samples: Annotated[int, Arg(group="bench")] = 400
    """Most latency samples of a backend at one batch size."""
    seconds: Annotated[float, Arg(group="bench")] = 10.0
    """Longest time in seconds for these samples."""
    resume: Annotated[bool, Arg(group="bench")] = False
    """Continue an interrupted run: finished measurements are kept."""
    gates: Annotated[GateFlags, Arg(group="gates (a number, or off)")] = field(default_factory=GateFlags)

    def __post_init__(self) -> None:
        unused = [name for name in ("max_fmr_factor", "max_tpr_drop")
                  if getattr(self.gates, name) != getattr(GateFlags, name)]  # fmt: skip
        if unused:
            flags = [f"--{name.replace('_', '-')}" for name in unused]
            problem = f"{' and '.join(flags)}: a gate of pmm bench --gallery, which is no part of this"
            raise ConflictingOptions(problem, *flags, hint="leave it out")
        changed = [name for name in MEASURED if getattr(self, name) != getattr(ShipCommand, name)]
        if self.report and changed:
            flags = [f"--{name}" for name in changed]
            problem = f"--report measures nothing, so {' and '.join(flags)} would change nothing"
            raise ConflictingOptions(problem, "--report", *flags, hint="leave one of them out")

    def options(self, backends: list[str], out: Path, reference: str) -> Options:
        """What the bench is to measure."""
        return Options(
            backends=",".join(dict.fromkeys([reference, *backends])),
            precisions=self.precisions,
            batches=self.batches,
            dataset=self.dataset,
            root=self.root,
            device=self.device,
            samples=self.samples,
            seconds=self.seconds,
            resume=self.resume,
            out=out,
        )


def main(prog: str) -> int:
    """Entry point."""
    command = command_line.parse(ShipCommand, prog=prog, description=__doc__ or "")
    is_onnx = require_kind(command.checkpoint, "checkpoint", "onnx") == "onnx"
    check_installed(*([] if is_onnx or command.report else ["torch"]), "jinja2", "matplotlib")
    if is_onnx:
        open_selftest(command.checkpoint)  # it may be what ships: refused now, not after the bench
        if not manifest_path(command.checkpoint).is_file():
            problem = "its manifest is not beside it"
            raise InvalidFile(problem, path=command.checkpoint, hint="adopt it again: pmm adopt FILE.onnx")
    backends = backends_of(command.target)
    out = Path(os.path.abspath(command.out or command.checkpoint.parent / f"ship-{command.target}"))
    check_place(out, overwrite=command.overwrite)
    finished = command.report or out.with_name(f"{out.name}-bench")
    if command.report:
        report = judged_again(finished, command.checkpoint, command.gates.parsed(), backends)
        check_same_data(report, command.checkpoint, command.dataset, command.root)
    else:
        report = _measured(command, command.options(backends, finished, "ort-cpu" if is_onnx else "torch"), prog)
    try:
        result = chosen(report, backends, command.prefer)
    except NothingShips as error:
        error.hint += f"; its figures are kept: --report {shlex.quote(str(finished))} judges them by other gates"
        raise
    shipped = write_shipment(out, report, finished, result, pictures=not command.no_pictures)
    print(printable(f"{out}: {shipped.result.name}, {describe_verdict(shipped.verdict)}"))
    print(printable(f"accept it where it will run with: pmm selftest {out.name}"))
    return 0


def _measured(command: ShipCommand, options: Options, prog: str) -> BenchReport:
    """The report of a bench that is run now. Raises ConflictingOptions where it is to go on and is finished."""
    assert options.out is not None
    if options.resume and (options.out / REPORT).is_file() and not (options.out / FOLDER).exists():
        hint = f"choose again from it with --report {shlex.quote(str(options.out))}"
        raise ConflictingOptions("--resume: the bench is finished", "--resume", hint=hint)
    request = make_request([command.checkpoint], options, command.gates.parsed())
    try:
        report = run_bench(request, prog)
    except KeyboardInterrupt:
        print(f"{prog}: finished measurements are kept; continue with --resume", file=sys.stderr)
        raise
    print(f"report: {(request.out / 'report.html').resolve()}")
    return report
