"""Train the rows of the paper's tables on its data sets, and set the figures beside the paper's.

pmm reproduce --dataset market1501 --root DIR [--rows pmm,bdb] [--seeds 5] [--devices cuda:0,cuda:1] ...

Each row has its method's own recipe, one run at a time on each GPU. Both definitions of average precision are
evaluated: the standard one and that of the paper's code. table.md and table.json in --out are rewritten after each run;
after an interruption, the same command continues.
"""

from __future__ import annotations

import json
import shlex
import signal
import sys
from dataclasses import dataclass, field

from pmm.ablation.report import progress
from pmm.ablation.runs import RunOutcome
from pmm.reproduction.report import make_report, markdown
from pmm.reproduction.study import Reproduction, ReproductionOptions
from pmm.utils import command_line
from pmm.utils.errors import UserError
from pmm.utils.extras import check_installed
from pmm.utils.files import claimed, write_file


@dataclass(frozen=True, kw_only=True)
class ReproduceCommand:
    """`pmm reproduce ...`"""

    options: ReproductionOptions = field(default_factory=ReproductionOptions)


def main(prog: str) -> int:
    """Entry point; 1 if a run failed."""
    command = command_line.parse(ReproduceCommand, prog=prog, description=__doc__ or "")
    check_installed("torch")
    reproduction = Reproduction(command.options)
    ended: dict[str, RunOutcome] = {}

    def write() -> str:
        report = make_report(
            reproduction, reproduction.outcomes(ended), shlex.join(["pmm", "reproduce", *sys.argv[1:]])
        )
        write_file(out / "table.json", json.dumps(report, indent=1) + "\n")
        write_file(out / "table.md", (table := markdown(report)) + "\n")
        return table

    def finished(outcome: RunOutcome, left: int, seconds: float) -> None:
        ended[outcome.run.name] = outcome
        write()
        print(progress(outcome, left, seconds), flush=True)

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a job that is ended is interrupted: its runs end too
    out = reproduction.options.runs
    with claimed(out):
        reproduction.check_models()
        reproduction.check_overwrite()
        print(reproduction.describe(), flush=True)
        try:
            outcomes = reproduction.measure(finished)
        except KeyboardInterrupt:
            print(f"\n{prog}: interrupted; {reproduction.finished_runs()}; the same command continues", file=sys.stderr)
            return command_line.INTERRUPTED
        print(f"\n{write()}\nreport: {out / 'table.md'}")
    if failed := [outcome.run.name for outcome in outcomes if outcome.figures is None]:
        problem = f"{len(failed)} of {len(outcomes)} runs failed: {'; '.join(failed)}"
        raise UserError(problem, hint="the same command runs them again")
    return 0
