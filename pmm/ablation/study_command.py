"""What `pmm ablation` and `pmm reproduce` share: a study runs, says how far it is, and can be interrupted."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Sequence

from pmm.ablation.report import progress
from pmm.ablation.runs import RunOutcome
from pmm.ablation.study import Ablation
from pmm.utils.command_line import INTERRUPTED
from pmm.utils.errors import UserError
from pmm.utils.files import claimed


def run_study(
    study: Ablation,
    write: Callable[[Sequence[RunOutcome]], str],
    *,
    prog: str,
    after_each: Callable[[RunOutcome], object] = lambda outcome: None,
) -> int:
    """Do the runs of `study` that are not finished, with a line for each, and print what `write` returns for all.

    `after_each` is called with each run that ended. Returns the exit code: 0, or 130 where the user, or SIGTERM,
    interrupted it. Raises UserError for runs that failed, once all is written.
    """

    def finished(outcome: RunOutcome, left: int, seconds: float) -> None:
        after_each(outcome)
        print(progress(outcome, left, seconds), flush=True)

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a job that is ended is interrupted: its runs end too
    with claimed(study.options.runs):
        study.check_models()
        study.check_overwrite()
        print(study.describe(), flush=True)
        try:
            outcomes = study.measure(finished)
        except KeyboardInterrupt:
            print(f"\n{prog}: interrupted; {study.finished_runs()}; the same command continues", file=sys.stderr)
            return INTERRUPTED
        print(f"\n{write(outcomes)}")
    if failed := [outcome.run.name for outcome in outcomes if outcome.figures is None]:
        problem = f"{len(failed)} of {len(outcomes)} runs failed: {'; '.join(failed)}"
        raise UserError(problem, hint="the same command runs them again")
    return 0
