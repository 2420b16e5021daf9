"""Plant each fault of the list and see whether the suite notices: python -m tests.mutants [--only ID ...] [--tree DIR]

Each is planted in a copy of the tree, where the tests that are named beside it run; where these pass, all of `make
test` does. Verdicts are kept at once: the same command goes on after an interruption, and runs anew what has changed.
Exit code 1 if a fault lives, 2 if the list itself is wrong.
"""

from __future__ import annotations

import argparse
import queue
import signal
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

from tests.mutants.copies import Copy, Outcome, state_of, tier_of
from tests.mutants.planted import Fault, mistakes, nearest, read_faults
from tests.mutants.results import BY_TIER, HANG, KILLED, OPEN, SURVIVED, Results, table

T = TypeVar("T")

ROOT = Path(__file__).resolve().parents[2]
TIER_LIMIT_S = 3600.0
NOTHING = Outcome(0, 0.0, "", "")


class ListError(Exception):
    """A fault, or what is named beside it, cannot be judged."""


def verdict(fault: Fault, outcome: Outcome) -> str:
    """What the exit code of its killers says, which pass without it. Raises ListError if it says nothing of it."""
    if outcome.code is None:
        return HANG
    if outcome.code == 0:
        return OPEN
    if outcome.code in (1, 2) or outcome.code < 0:  # failed, not even imported, crashed
        return KILLED
    raise ListError(f"{fault.id}: pytest ended with {outcome.code}: {outcome.last}")


class Judge:
    """Runs killers in several copies at once, and the tier, where they pass, in one."""

    def __init__(self, copies: Sequence[Copy], results: Results, more: Sequence[str], limit: float) -> None:
        self._copies, self._results, self._more, self._limit = copies, results, (*tier_of(copies[0].tree), *more), limit
        self._free: queue.SimpleQueue[Copy] = queue.SimpleQueue()
        for copy in copies:
            self._free.put(copy)
        self._red_anyhow: list[str] = []

    def judge(self, faults: Sequence[Fault], *, tier: bool = True) -> Iterator[str]:
        """All of `faults` that have no verdict; without the `tier`, by their killers alone. What cannot be judged comes
        back, a line each.

        Raises ListError if killers fail without any fault.
        """
        waiting = {fault: self._killers(fault) for fault in faults if not self._results.of(fault)}
        self._refuse_red(sorted({killer for killers in waiting.values() for killer in killers}))
        yield from filter(None, self._at_once(self._killed, waiting, waiting.values()))
        for fault in faults:
            if tier and self._results.of(fault).get("verdict") == OPEN:
                yield from filter(None, [self._killed_by_tier(fault)])

    def _at_once(self, work: Callable[..., T], *arguments: Iterable[Any]) -> Iterator[T]:
        """As map, in as many threads as there are copies; an interrupt ends what runs in these."""
        with ThreadPoolExecutor(len(self._copies)) as pool:
            try:
                yield from pool.map(work, *arguments)
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                for copy in self._copies:
                    copy.end()
                raise

    def _killers(self, fault: Fault) -> tuple[str, ...]:
        """Those that are in the tree; none: the tier is to say."""
        return tuple(dict.fromkeys(filter(None, (nearest(killer, self._copies[0].tree) for killer in fault.killers))))

    def _refuse_red(self, killers: Sequence[str]) -> None:
        whole = {killer for killer in killers if "::" not in killer}
        by_file: dict[str, list[str]] = {}
        for killer in killers:
            file = killer.partition("::")[0]
            if killer in whole or file not in whole:
                by_file.setdefault(file, []).append(killer)
        print(f"{len(by_file)} files of killers without any fault", flush=True)
        shares = [list(by_file.values())[n :: len(self._copies)] for n in range(len(self._copies))]

        def red(copy: Copy, share: list[list[str]]) -> str:
            outcome = copy.pytest(*chain(*share), *self._more, limit=TIER_LIMIT_S) if share else NOTHING
            return "" if outcome.code == 0 else outcome.failed or f"exit code {outcome.code}: {outcome.last}"

        for found in self._at_once(red, self._copies, shares):
            if found:
                raise ListError(f"without any fault killers are not green: {found}")

    def _killed(self, fault: Fault, killers: tuple[str, ...]) -> str:
        copy = self._free.get()
        try:
            outcome = NOTHING
            if killers:
                with copy.planted(fault):
                    outcome = copy.pytest(*killers, *self._more, limit=self._limit)
            self._results.keep(fault, verdict(fault, outcome), outcome)
        except (ListError, ValueError) as error:
            return str(error)
        finally:
            self._free.put(copy)
        return ""

    def _killed_by_tier(self, fault: Fault) -> str:
        copy = self._copies[0]
        while True:
            with copy.planted(fault):
                parallel = ("-n", str(len(self._copies)), "--dist", "loadfile")
                outcome = copy.pytest(*parallel, *self._red_anyhow, *self._more, limit=TIER_LIMIT_S)
            if outcome.code == 0:
                self._results.keep(fault, SURVIVED, outcome)
                return ""
            if not outcome.failed:
                return f"{fault.id}: the tier did not end well: {outcome.last}"
            if copy.pytest(outcome.failed, *self._more, limit=self._limit).code == 0:
                self._results.keep(fault, BY_TIER, outcome)
                return ""
            print(f"not of the fault, and left out: {outcome.failed} fails without it too", flush=True)
            self._red_anyhow.append(f"--deselect={outcome.failed}")


def main(args: Sequence[str] | None = None) -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(prog="tests.mutants", description="Plant faults, and see whether tests notice.")
    parser.add_argument("--only", nargs="+", metavar="ID", help="these faults, or all of these areas")
    parser.add_argument("--again", action="store_true", help="forget what was found before")
    parser.add_argument("--tree", type=Path, default=ROOT, help="plant in this checkout, and run its tests")
    parser.add_argument("--jobs", type=int, default=2, help="how many at once")
    parser.add_argument("--limit", type=float, default=300.0, help="seconds after which killers hang")
    parser.add_argument("--results", type=Path, default=ROOT / "runs/mutants/results.jsonl", help="where they are kept")
    parser.add_argument("--list", type=Path, help="folder of another list")
    parser.add_argument("--no-tier", action="store_true", help="leave open what its killers do not kill")
    parser.add_argument("--pytest", default="", help="more arguments for pytest")
    given = parser.parse_args(args)
    every = read_faults(given.list) if given.list else read_faults()
    faults = [fault for fault in every if given.only is None or {fault.id, fault.area} & set(given.only)]
    tree = given.tree.resolve()
    wrong = list(mistakes(faults, tree, killers=tree == ROOT)) or ["there is no such fault"] * (not faults)
    if not wrong:
        results = Results(given.results, state_of(tree), again=given.again)
        with tempfile.TemporaryDirectory(prefix="mutants-") as home:
            copies = [Copy(tree, Path(home) / f"copy{number}") for number in range(given.jobs)]
            try:
                wrong += Judge(copies, results, given.pytest.split(), given.limit).judge(faults, tier=not given.no_tier)
            except ListError as error:
                wrong.append(str(error))
            except KeyboardInterrupt:
                wrong.append("interrupted; the same command goes on")
        print("\n".join(table(faults, results)))
    print("\n".join(f"error: {line}" for line in wrong), file=sys.stderr, end="\n" * bool(wrong))
    return 2 if wrong else int(any(results.of(fault)["verdict"] in (OPEN, SURVIVED) for fault in faults))


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # what runs in the copies ends too
    sys.exit(main())
