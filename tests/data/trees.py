"""Small data sets on disk, with the names and quirks of the real ones."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image

MARKET = {
    "bounding_box_train": ["0002_c1s1_000451_03.jpg", "0002_c3s1_000551_00.jpg", "0007_c6s2_000001_01.jpg"],
    "query": ["0001_c1s1_001051_00.jpg"],
    "bounding_box_test": [
        "-1_c1s1_000401_00.jpg",
        "0000_c2s1_000401_00.jpg",
        "0001_c2s1_000401_00.jpg",
        "0001_c1s1_000401_00.jpg",
        "Thumbs.db",
    ],
}
DUKE = {
    "bounding_box_train": ["0001_c2_f0046182.jpg", "0001_c8_f0046302.jpg", "0003_c1_f0044158.jpg"],
    "query": ["0005_c2_f0046985.jpg"],
    "bounding_box_test": ["0005_c5_f0051341.jpg", "0002_c1_f0044158.jpg"],
}
CUHK = {
    "bounding_box_train": ["0001_c1_1.png", "0001_c2_6.png", "0002_c1_11.png"],
    "query": ["0003_c1_21.png"],
    "bounding_box_test": ["0003_c2_26.png", "0004_c1_31.png"],
}
MSMT17 = {
    "train": ["0000/0000_000_01_0303morning_0015_0.jpg", "0001/0001_002_15_0303noon_0044_1.jpg"],
    "val": ["0000/0000_001_03_0303morning_0032_0_ex.jpg"],
    "query": ["0000/0000_000_05_0302morning_0092_1.jpg", "0001/0001_000_07_0303evening_0047_0.jpg"],
    "gallery": ["0000/0000_001_06_0302morning_0093_1.jpg", "0001/0001_003_07_0303evening_0048_0.jpg"],
}
MSMT17_FOLDERS = {"msmt17-v1": ("train", "test"), "msmt17-v2": ("mask_train_v2", "mask_test_v2")}


def draw(path: Path, size: tuple[int, int] = (16, 32), mode: str = "RGB", **options: object) -> Path:
    """An image of its own: what it shows follows from its path. `size` is width, height."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(list(str(path).encode())).integers(0, 256, (size[1], size[0], 3), np.uint8)
    image = Image.fromarray(pixels).convert(mode)
    formats = {".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP", ".tif": "TIFF", ".tiff": "TIFF"}
    image.save(path, format=formats.get(path.suffix.lower(), "PNG"), **options)
    return path


def three_folders(root: Path, names: dict[str, list[str]] = MARKET) -> Path:
    """Market-1501, DukeMTMC-reID or CUHK03-NP at `root`."""
    for part, files in names.items():
        for name in files:
            draw(root / part / name)
    return root


def msmt17(root: Path, version: str = "msmt17-v1") -> Path:
    """MSMT17 at `root`."""
    train, test = MSMT17_FOLDERS[version]
    for part, files in MSMT17.items():
        for name in files:
            draw(root / (train if part in ("train", "val") else test) / name)
        lines = [f"{name} {int(name[:4])}\n" for name in files]
        (root / f"list_{part}.txt").write_text("".join(lines))
    return root


def folders(root: Path, paths: Iterable[str]) -> Path:
    """One image at each of `paths` below `root`."""
    for path in paths:
        draw(root / path)
    return root
