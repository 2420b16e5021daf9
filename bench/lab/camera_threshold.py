"""Whether thresholds without identity labels keep their promise: on synthetic sites whose false match rates are known.

python -m bench.lab.camera_threshold [--sites 1000] [--out FILE.json]

A site shows some people of one of three populations, 24-dimensional: `even`; `groups`, where three in ten dress like
many others do; `bland`, where one in fifty resembles everybody. In each, whom a camera sees at once is random. A
threshold holds if, in the whole population, its false match rate is at most the target.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt

from pmm.config import fast_mode
from pmm.evaluation.camera_threshold import SeenAtOnce, camera_threshold, pairs_seen_at_once
from pmm.utils import command_line
from pmm.utils.arguments import Arg
from pmm.utils.environment import report_header
from pmm.utils.files import output_file, write_file

SCHEMA = "pmm-camera-threshold-1"
PEOPLE = (20, 50, 100, 500)
TARGETS = (1e-2, 1e-3)
CONFIDENCE = 0.95
LATENT, NOISE = 24, 0.6
"""Dimensions of the embeddings, and the noise of a crop beside people of variance 1 in each."""
MOMENTS = 4
"""At which a camera sees two people together."""
MEETS = 40
"""Others that a person is seen with, where that many are there."""
TOGETHER = 5
"""People in a stretch of time, where they are not known."""
GROUPS = 200

Doubles = npt.NDArray[np.float64]
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


POPULATIONS: dict[str, Callable[[Rng, int], Doubles]] = {"even": even, "groups": groups, "bland": bland}


def true_rates(population: Callable[[Rng, int], Doubles], pairs: int) -> Doubles:
    """Distances of so many pairs of two people, each pair of its own, ascending: how many lie below a threshold is its
    false match rate."""
    rng = np.random.default_rng(2)
    found = []
    for start in range(0, pairs, 1 << 16):
        count = min(1 << 16, pairs - start)
        noise = NOISE * rng.standard_normal((2, count, LATENT))
        found.append(np.linalg.norm(population(rng, count) - population(rng, count) + noise[0] - noise[1], axis=1))
    return np.sort(np.concatenate(found))


def site(rng: Rng, centres: Doubles, *, known: bool) -> tuple[Doubles, SeenAtOnce]:
    """Distances of the crops that a site shows at once. Where people are `known`, each meets those who come a little
    before and after; where not, they come in parties, one in each stretch of time."""
    people = len(centres)
    if known:
        first, second = np.triu_indices(people, 1)
        near = np.minimum(second - first, people - (second - first)) <= MEETS // 2
        pairs = np.stack([first[near], second[near]], 1)
        parties = pairs.repeat(MOMENTS, 0)
        crops = centres[:, None] + NOISE * rng.standard_normal((people, MOMENTS, LATENT))
        rows = parties * MOMENTS + np.tile(np.arange(MOMENTS), len(pairs))[:, None]
        points = crops.reshape(-1, LATENT)
        distances = np.linalg.norm(points[rows[:, 0]] - points[rows[:, 1]], axis=1)
        sizes = np.full(len(rows), 1 / MOMENTS)
        group = np.arange(len(pairs)).repeat(MOMENTS)
        return distances, SeenAtOnce(rows[:, 0], rows[:, 1], sizes, group, parties[:, 0], parties[:, 1], people)
    person = np.tile(np.arange(people), MOMENTS)
    moment = np.arange(MOMENTS).repeat(people)
    points = centres[person] + NOISE * rng.standard_normal((len(person), LATENT))
    seen = pairs_seen_at_once(np.zeros(len(person)), 1000.0 * (person // TOGETHER) + moment)
    return np.linalg.norm(points[seen.first] - points[seen.second], axis=1), seen


def simulate(
    sites: int, *, people: tuple[int, ...] = PEOPLE, targets: tuple[float, ...] = TARGETS, pairs: int = 4_000_000
) -> list[dict[str, Any]]:
    """Of each population, number of people and target: how many of `sites` abstained, and in how many of the others the
    threshold holds; `ratio` is the true rate as a share of the target there, its 5, 50 and 95 % quantiles."""
    rows = []
    for name, population in POPULATIONS.items():
        truth = true_rates(population, pairs)
        for known in (True, False):
            for count in people:
                found: dict[float, list[float]] = {target: [] for target in targets}
                for number in range(sites):
                    rng = np.random.default_rng([number, count, known])
                    distances, seen = site(rng, population(rng, count), known=known)
                    for target in targets:
                        threshold = camera_threshold(distances, seen, target, confidence=CONFIDENCE).distance
                        if threshold is not None:
                            rate = np.searchsorted(truth, threshold, "right") / len(truth)
                            found[target].append(float(rate / target))
                for target, ratios in found.items():
                    rows.append(
                        {
                            "population": name, "people_known": known, "people": count, "target": target,
                            "sites": sites, "abstained": sites - len(ratios),
                            "held": sum(ratio <= 1 for ratio in ratios),
                            "ratio": np.quantile(ratios, [0.05, 0.5, 0.95]).tolist() if ratios else None,
                        }
                    )  # fmt: skip
    return rows


def markdown(rows: list[dict[str, Any]]) -> str:
    """As a table."""
    lines = [
        "| population | people | known | target | abstained | held of the others | true rate / target, 5-50-95 % |"
    ]
    lines += ["|---|--:|---|--:|--:|--:|---|"]
    for row in rows:
        given = row["sites"] - row["abstained"]
        held = f"{row['held'] / given:.1%} of {given}" if given else "-"
        ratio = " - ".join(f"{each:.2f}" for each in row["ratio"]) if given else "-"
        known = "yes" if row["people_known"] else "no"
        share = f"{row['abstained'] / row['sites']:.0%}"
        lines.append(
            f"| {row['population']} | {row['people']} | {known} | {row['target']:g} | {share} | {held} | {ratio} |"
        )
    return "\n".join(lines)


PROG = "bench.lab.camera_threshold"


@dataclass(frozen=True, kw_only=True)
class CameraThresholdBench:
    """`python -m bench.lab.camera_threshold ...`"""

    sites: Annotated[int, Arg(least=1)] = 1000
    """Of each population and number of people."""
    out: Path = Path("runs/camera-threshold/camera-threshold.json")
    """JSON file to write."""


def main(prog: str) -> None:
    """Entry point."""
    command = command_line.parse(CameraThresholdBench, prog=prog, description=__doc__ or "")
    out = output_file(command.out)
    less: dict[str, Any] = {"people": (20, 50), "pairs": 100_000} if fast_mode() else {}
    rows = simulate(command.sites, **less)
    plan = {"confidence": CONFIDENCE, "moments": MOMENTS, "meets": MEETS, "together": TOGETHER}
    write_file(out, json.dumps({**report_header(SCHEMA), "plan": plan, "rows": rows}, indent=1) + "\n")
    print(markdown(rows))
    print(f"report: {out}")


if __name__ == "__main__":
    command_line.run(main, prog=PROG)
