"""Data sets laid out as Market-1501: three folders, identity and camera in the file names. Loads no torch."""

from __future__ import annotations

import re
from pathlib import Path

from pmm.data.dataset_specs import DatasetSpec
from pmm.data.samples import JUNK, Sample
from pmm.data.scan import Scan, check_unique_stems, images_in

_NAME = re.compile(r"(-1|\d{1,9})_c(\d{1,4})(?!\d)", re.ASCII)


def parse_name(name: str) -> tuple[int, int] | None:
    """Identity (-1: junk) and zero-based camera in a file name as 0002_c1s1_000451_03.jpg; None if there are none."""
    match = _NAME.match(name)
    if match is None or int(match[2]) < 1:
        return None
    return int(match[1]), int(match[2]) - 1


def scan_market(spec: DatasetSpec, folder: Path) -> Scan:
    """The crops in the three folders, sorted by name."""
    scan = Scan(spec, folder, f"folders {', '.join(spec.folders)}")
    scan.train, scan.query, scan.gallery = (_scan_part(folder / part, scan) for part in spec.folders)
    return scan


def _scan_part(folder: Path, scan: Scan) -> tuple[Sample, ...]:
    names = images_in(folder, scan)
    check_unique_stems(names, folder, scan)
    samples = []
    expected = f"expected names like {scan.spec.example}"
    for name in names:
        parsed = parse_name(name)
        if parsed is None:
            scan.add_problem("no identity and camera in the name", expected, folder / name)
        else:
            samples.append(Sample(folder / name, *parsed))
    if all(sample.pid == JUNK for sample in samples):
        scan.add_problem("holds no usable image", expected, folder)
    return tuple(samples)
