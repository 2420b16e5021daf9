"""Whether thresholds without identity labels keep their promise: on synthetic sites whose false match rates are known.

python -m bench.lab.camera_threshold [--sites 150] [--out FILE.json]

In each stretch of time a camera sees a party of five, 24-dimensional. Strangers come from one of three populations:
`even`; `groups`, where three in ten dress like many others do; `bland`, where one in fifty resembles everybody. Other
sites: `crowds`, where one stretch in ten shows twenty people in uniform; `rare crowds`, one in 90; `staff`, with one
person in all pictures, who has a name, as all have; `regulars`, where the same five come again and again; `tracks`,
where twenty people do, each time under another name. For the last two, the longest time for which a person is seen is
the whole recording. A threshold holds if its true false match rate is at most the target.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from pmm.config import fast_mode
from pmm.evaluation.camera_threshold import SeenAtOnce, camera_threshold, pairs_seen_at_once
from pmm.utils import command_line
from pmm.utils.arguments import Arg
from pmm.utils.arrays import Doubles
from pmm.utils.environment import report_header
from pmm.utils.files import output_file, write_file

SCHEMA = "pmm-camera-threshold-2"
STRETCHES = (10, 100, 400, 1000, 4000)
TARGETS = (1e-2, 1e-3)
CONFIDENCE = 0.95
LATENT, NOISE = 24, 0.6
"""Dimensions of the embeddings, and the noise of a crop beside people of variance 1 in each."""
PARTY, CROWD = 5, 20
MOMENTS = 2
"""At which a camera sees a party."""
APART = 1000.0
"""Seconds from one party to the next."""
LOOKED_AT = 500.0
"""Seconds of a stretch."""
GROUPS = 200

Rng = np.random.Generator


def even(rng: Rng, people: int) -> Doubles:
    """Centres of people [N, 24]."""
    return rng.standard_normal((people, LATENT))


def groups(rng: Rng, people: int) -> Doubles:
    """As `even`; three in ten in groups of people that look alike, some groups larger than others."""
    centres = np.random.default_rng(1).standard_normal((GROUPS, LATENT))
    sizes = 1 / np.arange(1, GROUPS + 1)
    own = rng.standard_normal((people, LATENT))
    alike = centres[rng.choice(GROUPS, people, p=sizes / sizes.sum())] + 0.5 * own
    return np.where(rng.random((people, 1)) < 0.3, alike, own)


def bland(rng: Rng, people: int) -> Doubles:
    """As `even`; one in fifty near the middle of all."""
    return even(rng, people) * np.where(rng.random((people, 1)) < 0.02, 0.3, 1.0)


class Site(NamedTuple):
    """What the cameras of one site saw."""

    points: Doubles
    """Embeddings of crops [N, 24]."""
    time: Doubles
    """Of each crop, in seconds [N]."""
    person: npt.NDArray[np.int64] | None = None
    """Name of the person or track that each crop shows [N]."""
    stretch: float = LOOKED_AT

    def pairs(self) -> tuple[Doubles, SeenAtOnce]:
        """Distances of crops that are seen at once [P], and which they are."""
        camera = np.zeros(len(self.time))
        seen = pairs_seen_at_once(camera, self.time, stretch=self.stretch, person=self.person)
        return np.linalg.norm(self.points[seen.first] - self.points[seen.second], axis=1), seen


def _seen(rng: Rng, centres: Doubles, party: npt.NDArray[np.int64], person: npt.NDArray[np.int64]) -> Site:
    """People [N] of parties [N], each at some moments; with names."""
    points = np.tile(centres, (MOMENTS, 1)) + NOISE * rng.standard_normal((MOMENTS * len(party), LATENT))
    time = APART * np.tile(party.astype(np.float64), MOMENTS) + np.arange(MOMENTS).repeat(len(party))
    return Site(points, time, np.tile(person, MOMENTS))


def strangers(rng: Rng, stretches: int, population: Callable[[Rng, int], Doubles] = even) -> Site:
    """Others in each stretch."""
    party = np.arange(stretches).repeat(PARTY)
    return _seen(rng, population(rng, len(party)), party, np.arange(len(party)))._replace(person=None)


def crowds(rng: Rng, stretches: int, often: float) -> Site:
    """A crowd in uniform in some stretches."""
    uniform = rng.random(stretches) < often
    party = np.arange(stretches).repeat(np.where(uniform, CROWD, PARTY))
    own = rng.standard_normal((len(party), LATENT))
    centres = np.where(uniform[party][:, None], 1 + 0.1 * own, own)
    return _seen(rng, centres, party, np.arange(len(party)))._replace(person=None)


def staff(rng: Rng, stretches: int) -> Site:
    """One person near the middle of all is in each picture."""
    person = np.arange(stretches * PARTY)
    person[::PARTY] = 0
    centres = even(rng, len(person))
    centres[0] *= 0.3
    return _seen(rng, centres[person], np.arange(stretches).repeat(PARTY), person)


def regulars(rng: Rng, stretches: int) -> Site:
    """The same few in all stretches."""
    party = np.arange(stretches).repeat(PARTY)
    site = _seen(rng, np.tile(even(rng, PARTY), (stretches, 1)), party, party)
    return site._replace(person=None, stretch=APART * stretches)


def tracks(rng: Rng, stretches: int) -> Site:
    """Some of the same twenty in each stretch."""
    party = np.arange(stretches).repeat(PARTY)
    who = np.argsort(rng.random((stretches, CROWD)), axis=1)[:, :PARTY].ravel()
    return _seen(rng, even(rng, CROWD)[who], party, np.arange(len(party)))._replace(stretch=APART * stretches)


SITES: dict[str, Callable[[Rng, int], Site]] = {
    "even": strangers,
    "groups": lambda rng, stretches: strangers(rng, stretches, groups),
    "bland": lambda rng, stretches: strangers(rng, stretches, bland),
    "crowds": lambda rng, stretches: crowds(rng, stretches, 0.1),
    "rare crowds": lambda rng, stretches: crowds(rng, stretches, 1 / 90),
    "staff": staff, "regulars": regulars, "tracks": tracks,
}  # fmt: skip
OF_STRANGERS = ("staff", "regulars", "tracks")
"""Sites on which people of `even` come again: the rate is that of all people."""


def true_rate(name: str, stretches: int) -> Callable[[float], float]:
    """Of a distance on this site, from so many stretches in which nobody comes again."""
    rng, distances, weights = np.random.default_rng(2), [], []
    for start in range(0, stretches, 10_000):
        found, seen = SITES["even" if name in OF_STRANGERS else name](rng, min(10_000, stretches - start)).pairs()
        distances.append(found)
        weights.append(1 / np.bincount(seen.stretch)[seen.stretch])
    values, weight = np.concatenate(distances), np.concatenate(weights)
    order = np.argsort(values)
    values, share = values[order], np.r_[0, weight[order].cumsum() / weight.sum()]
    return lambda distance: float(share[np.searchsorted(values, distance, "right")])


def simulate(
    sites: int,
    *,
    stretches: tuple[int, ...] = STRETCHES,
    targets: tuple[float, ...] = TARGETS,
    truth: int = 400_000,
    names: Iterable[str] = tuple(SITES),
) -> list[dict[str, Any]]:
    """Of each kind of site, number of stretches and target: how many of `sites` abstained, and in how many of the
    others the threshold holds; `ratio` is the true rate as a share of the target there, its 5, 50 and 95 % quantiles.
    """
    rows = []
    for name in names:
        rate_of = true_rate(name, truth)
        for count in stretches:
            found: dict[float, list[float]] = {target: [] for target in targets}
            for number in range(sites):
                distances, seen = SITES[name](np.random.default_rng([number, count]), count).pairs()
                for target in targets:
                    distance = camera_threshold(distances, seen, target, confidence=CONFIDENCE).distance
                    if distance is not None:
                        found[target].append(rate_of(distance) / target)
            rows += [
                {
                    "site": name, "stretches": count, "target": target, "sites": sites,
                    "abstained": sites - len(ratios), "held": sum(ratio <= 1 for ratio in ratios),
                    "ratio": np.quantile(ratios, [0.05, 0.5, 0.95]).tolist() if ratios else None,
                }
                for target, ratios in found.items()
            ]  # fmt: skip
    return rows


def markdown(rows: list[dict[str, Any]]) -> str:
    """As a table."""
    lines = ["| site | stretches | target | abstained | held of the others | true rate / target, 5-50-95 % |"]
    lines += ["|---|--:|--:|--:|--:|---|"]
    for row in rows:
        given = row["sites"] - row["abstained"]
        held = f"{row['held'] / given:.1%} of {given}" if given else "-"
        ratio = " - ".join(f"{each:.2f}" for each in row["ratio"]) if given else "-"
        share = f"{row['abstained'] / row['sites']:.0%}"
        lines.append(f"| {row['site']} | {row['stretches']} | {row['target']:g} | {share} | {held} | {ratio} |")
    return "\n".join(lines)


PROG = "bench.lab.camera_threshold"


@dataclass(frozen=True, kw_only=True)
class CameraThresholdBench:
    """`python -m bench.lab.camera_threshold ...`"""

    sites: Annotated[int, Arg(least=1)] = 150
    """Of each kind and number of stretches."""
    out: Path = Path("runs/camera-threshold/camera-threshold.json")
    """JSON file to write."""


def main(prog: str) -> None:
    """Entry point."""
    command = command_line.parse(CameraThresholdBench, prog=prog, description=__doc__ or "")
    out = output_file(command.out)
    less: dict[str, Any] = {"stretches": (10, 400), "truth": 4_000} if fast_mode() else {}
    rows = simulate(command.sites, **less)
    plan = {"confidence": CONFIDENCE, "moments": MOMENTS, "party": PARTY, "crowd": CROWD}
    write_file(out, json.dumps({**report_header(SCHEMA), "plan": plan, "rows": rows}, indent=1) + "\n")
    print(markdown(rows))
    print(f"report: {out}")


if __name__ == "__main__":
    command_line.run(main, prog=PROG)
