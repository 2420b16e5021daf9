"""What is inside image files, as training will meet it. Loads no torch."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from pmm.data.crops import load_crop
from pmm.utils.errors import UserError
from pmm.utils.files import sha256

EXIF_ORIENTATION = 0x0112
AT_ONCE = 1024
_SMALL = (64, 32)
"""Height and width that crops are resized to here: the decoder is what counts."""
_MODES = {"L": "grey", "1": "black and white", "CMYK": "CMYK", "P": "palette", "RGBA": "alpha", "LA": "grey with alpha"}


class Facts(NamedTuple):
    """One image file: the reason if it cannot be read, else its size in pixels, oddities and sha256 of its content."""

    fault: str = ""
    width: int = 0
    height: int = 0
    mode: str = ""
    """What is unusual about its pixels; empty for 8-bit RGB."""
    rotated: bool = False
    digest: bytes = b""


def examine(path: Path) -> Facts:
    """Open `path` with the decoder of training."""
    try:
        load_crop(path, *_SMALL)
        with Image.open(path) as image:  # the header alone
            mode, (width, height) = image.mode, image.size
            rotated = image.getexif().get(EXIF_ORIENTATION, 1) != 1
        digest = bytes.fromhex(sha256(path))
    except UserError as error:
        return Facts(fault=_fault(path, error))
    except OSError as error:  # gone or changed since it was decoded
        return Facts(fault=str(error.strerror or error))
    odd = "" if mode == "RGB" else "16-bit" if mode.startswith("I;16") else _MODES.get(mode, f"mode {mode}")
    return Facts(width=width, height=height, mode=odd, rotated=rotated, digest=digest)


def examine_all(paths: Sequence[Path], threads: int, progress: Callable[[int], object]) -> list[Facts]:
    """`examine` each of `paths`; `progress` hears how many more are done. Pixels of `threads` files are in memory."""
    facts: list[Facts] = []
    with ThreadPoolExecutor(threads) as pool, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of huge images and odd EXIF: the report says what matters of it
        for start in range(0, len(paths), AT_ONCE):
            for fact in pool.map(examine, paths[start : start + AT_ONCE]):
                facts.append(fact)
                progress(1)
    return facts


def _fault(path: Path, error: UserError) -> str:
    try:
        if path.stat().st_size == 0:
            return "0 bytes"
    except OSError:
        pass
    cause = error.__cause__
    return getattr(cause, "strerror", None) or str(cause) or type(cause).__name__
