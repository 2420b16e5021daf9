"""What may be wrong with a data set: problems, warnings and notes, each with the files it is about. Loads no torch."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from pmm.data.counts import has_distractors, matching_counts, published_figures
from pmm.data.images import ImageFacts
from pmm.data.left_out import by_reason
from pmm.data.samples import DISTRACTOR, Sample
from pmm.data.scan import Problem, Scan, image_advice
from pmm.data.splits import matchable, unrankable
from pmm.utils.errors import printable

MIN_SIDE, MAX_SIDE, MAX_WIDTH = 8, 4096, 2.0
"""Shortest and longest side in pixels, and width per height, beyond which an image is hardly a crop of a person."""


@dataclass(frozen=True)
class Finding:
    """Its level, a stable name for programs, a text, how often it occurs, and the files (mostly) it is about.

    A problem makes the data set unusable; a warning may make figures misleading.
    """

    level: Literal["problem", "warning", "note"]
    kind: str
    text: str
    count: int
    about: tuple[str, ...] = ()


class _Copy(NamedTuple):
    part: str
    sample: Sample


def find(scan: Scan, facts: Mapping[Path, ImageFacts]) -> list[Finding]:
    """The findings on `scan` and on `facts`, those of its files but for junk: problems, warnings, notes."""
    good = {path: fact for path, fact in facts.items() if not fact.fault}
    findings = [
        *_refused(scan),
        *_unreadable(scan, facts),
        *_queries(scan),
        *_copies(scan, good),
        *_overlap(scan),
        *_train(scan),
        *_zeros(scan),
        *_published(scan),
        *_sizes(scan, good),
        *_pixels(scan, good),
        *_assumed(scan),
    ]
    order = ("problem", "warning", "note")
    return sorted((f for f in findings if f.count), key=lambda finding: order.index(finding.level))


def _refused(scan: Scan) -> Iterator[Finding]:
    kinds: dict[str, list[Problem]] = defaultdict(list)
    for problem in scan.problems:
        kinds[problem.kind].append(problem)
    for kind, problems in kinds.items():
        places = [_inside(scan, p.path) + (f":{p.line}" if p.line else "") for p in problems]
        if len({problem.detail for problem in problems}) == 1:
            yield Finding("problem", "refused", f"{kind}; {problems[0].detail}", len(places), tuple(places))
        else:
            about = tuple(f"{place} ({problem.detail})" for place, problem in zip(places, problems, strict=True))
            yield Finding("problem", "refused", kind, len(places), about)


def _unreadable(scan: Scan, facts: Mapping[Path, ImageFacts]) -> Iterator[Finding]:
    bad = [f"{_inside(scan, path)} ({fact.fault})" for path, fact in facts.items() if fact.fault]
    yield Finding("problem", "unreadable", f"image that cannot be read; {image_advice()}", len(bad), tuple(bad))


def _queries(scan: Scan) -> Iterator[Finding]:
    parts = scan.without_junk()
    query = parts["query"]
    fine = matchable(query, parts["gallery"])
    skipped = [sample for sample, match in zip(query, fine, strict=True) if not match]
    match = "gallery crop of its identity" + (" from another camera" if scan.cameras_known else "")
    if query and len(skipped) == len(query):
        text = f"query without a {match}, which is every one; nothing can be evaluated"
        yield _about("problem", "no-match", text, scan, skipped)
    else:
        text = f"query of {len(query):,} without a {match}; evaluation skips it"
        yield _about("warning", "no-match", text, scan, skipped)
        if query and (why := unrankable(query, parts["gallery"])):
            yield Finding("problem", "one-identity-test", why, 1)


def _copies(scan: Scan, facts: Mapping[Path, ImageFacts]) -> Iterator[Finding]:
    """Files of the same content; each set of them counts once, as the worst thing it is."""
    copies: dict[bytes, list[_Copy]] = defaultdict(list)
    for part, samples in scan.without_junk().items():
        for sample in samples:
            if sample.path in facts:
                copies[facts[sample.path].digest].append(_Copy(part, sample))
    kinds: dict[str, list[str]] = defaultdict(list)
    for same in copies.values():
        paths = dict.fromkeys(copy.sample.path for copy in same)  # one file may be in train and in test
        if len(paths) > 1:
            kinds[_kind_of(same, scan)].append(" = ".join(_inside(scan, path) for path in paths))
    texts = {
        "copies-train-test": "image in train and, byte for byte, in test; a model is tested on what it was trained on",
        "copies-identities": "image under different identities; at most one can be right",
        "copies-query-gallery": "image in query and, of another camera, in gallery; a match without any skill",
        "copies": "image more than once, under one identity",
    }
    for kind, text in texts.items():
        yield Finding("warning", kind, text, len(kinds[kind]), tuple(kinds[kind]))


def _kind_of(same: list[_Copy], scan: Scan) -> str:
    parts = {copy.part for copy in same}
    # where train and test share identities by construction, they share files
    if "train" in parts and len(parts) > 1 and not scan.parts_share_identities:
        return "copies-train-test"
    if len({copy.sample.pid for copy in same}) > 1:
        return "copies-identities"
    query, gallery = ({copy.sample.camid for copy in same if copy.part == part} for part in ("query", "gallery"))
    crossed = any(a != b for a in query for b in gallery)  # evaluation removes those of the query's camera
    return "copies-query-gallery" if crossed else "copies"


def _overlap(scan: Scan) -> Iterator[Finding]:
    if scan.spec.layout == "msmt17" or scan.parts_share_identities:  # numbered anew in test, or the same on purpose
        return
    parts = scan.without_junk()
    test = {sample.pid for part in ("query", "gallery") for sample in parts[part]}
    first = {sample.pid: sample for sample in reversed(parts["train"]) if sample.pid in test}
    if has_distractors(scan):
        first.pop(DISTRACTOR, None)
    text = "identity in train and in test; figures on identities trained on are too high"
    yield _about("warning", "overlap", text, scan, [first[pid] for pid in sorted(first)])


def _train(scan: Scan) -> Iterator[Finding]:
    train = scan.without_junk()["train"]
    images = Counter(sample.pid for sample in train)
    cameras: dict[int, set[int]] = defaultdict(set)
    for sample in train:
        cameras[sample.pid].add(sample.camid)
    first = {sample.pid: sample for sample in reversed(train)}
    if len(images) == 1:
        yield _about("warning", "one-identity", "identity in train; training needs two", scan, first.values())
    alone = [first[pid] for pid in sorted(images) if images[pid] == 1]
    yield _about(
        "warning", "single-image", "identity with a single image in train, so without a positive pair", scan, alone
    )
    if scan.cameras_known:
        still = [first[pid] for pid in sorted(images) if images[pid] > 1 and len(cameras[pid]) == 1]
        text = "identity with a single camera in train, so without a pair across cameras"
        yield _about("warning", "single-camera", text, scan, still)


def _zeros(scan: Scan) -> Iterator[Finding]:
    for part in ("train", "query") if has_distractors(scan) else ():
        zeros = [sample for sample in scan.without_junk()[part] if sample.pid == DISTRACTOR]
        text = f"distractor (identity 0) in {part}, where it counts as one identity"
        yield _about("warning", "distractors", text, scan, zeros)


def _published(scan: Scan) -> Iterator[Finding]:
    figures = published_figures(scan)
    off = tuple(f"{f.words} {f.found:,} ({f.published:,})" for f in figures if f.found != f.published)
    others = " and ".join(matching_counts(scan))
    text = "count that differs from the published one" + (f"; these are the counts of {others}" if others else "")
    yield Finding("warning", "published", text, len(off), off)


def _sizes(scan: Scan, facts: Mapping[Path, ImageFacts]) -> Iterator[Finding]:
    odd = tuple(
        f"{_inside(scan, path)} ({fact.width}x{fact.height})"
        for path, fact in facts.items()
        if min(fact.width, fact.height) < MIN_SIDE
        or max(fact.width, fact.height) > MAX_SIDE
        or fact.width > MAX_WIDTH * fact.height
    )
    text = f"image that is hardly a crop of a person (a side below {MIN_SIDE} or above {MAX_SIDE:,} pixels, or"
    yield Finding("warning", "size", f"{text} more than twice as wide as high)", len(odd), odd)


def _pixels(scan: Scan, facts: Mapping[Path, ImageFacts]) -> Iterator[Finding]:
    modes: dict[str, list[Path]] = defaultdict(list)
    for path, fact in facts.items():
        if fact.mode:
            modes[fact.mode].append(path)
    for mode, paths in sorted(modes.items()):
        yield _about("note", "mode", f"image whose pixels are not 8-bit RGB but {mode}; converted", scan, paths)
    rotated = [path for path, fact in facts.items() if fact.rotated]
    yield _about("note", "rotated", "image that EXIF says to rotate; done before it is resized", scan, rotated)


def _assumed(scan: Scan) -> Iterator[Finding]:
    for note in scan.notes:
        yield Finding("note", "assumed", note, 1)
    for reason, paths in by_reason(scan.skipped).items():
        yield _about(
            "note", "skipped", "; ".join(filter(None, (f"{reason.one}, left out", reason.advice))), scan, paths
        )


def _about(
    level: Literal["problem", "warning", "note"], kind: str, text: str, scan: Scan, items: Iterable[Sample | Path]
) -> Finding:
    about = tuple(_inside(scan, item.path if isinstance(item, Sample) else item) for item in items)
    return Finding(level, kind, text, len(about), about)


def _inside(scan: Scan, path: Path) -> str:
    return printable(path.relative_to(scan.folder))
