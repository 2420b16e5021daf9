"""Files of torch.save: written whole or not at all, and read without running anything that is in them."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pmm.artifacts.kinds import KIND_NAMES, SUFFIXES, kind_of_content
from pmm.utils.errors import InvalidFile
from pmm.utils.files import existing_file, replacing

COUNTER = ".num_batches_tracked"
"""End of the names of batch-norm's counters, which older versions of torch did not write."""
REFUSED = "refused, the file holds more than plain tensors and could run code"
SHOWN = 3
_SCALAR = np.float64(0).__reduce__()[0]
_NUMPY_SCALARS: list[Any] = [
    # training scripts store a rank-1 as they computed it; numpy 2 moved the function, files know it by either name
    (_SCALAR, "numpy.core.multiarray.scalar"),
    (_SCALAR, "numpy._core.multiarray.scalar"),
    np.dtype,
    *(type(np.dtype(kind)) for kind in (np.bool_, np.int32, np.int64, np.float32, np.float64)),
]


def read_torch_file(path: str | Path, expected: str) -> Any:
    """What `torch.save` wrote to `path`, in its zip format or the older pickle, on the CPU: tensors, containers, plain
    values and numpy scalars.

    Raises InvalidFile, with what was `expected`, if the file is missing, truncated, of another kind, or asks for
    anything that could run code (naming it).
    """
    path = existing_file(path, expected)
    with path.open("rb") as file:
        start = file.read(512)
    problem = _other_kind(path, start)
    if problem:
        raise InvalidFile(problem, path=path, expected=expected)
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals(_NUMPY_SCALARS):
            warnings.simplefilter("ignore")  # torch guesses aloud at foreign formats; the lines below say it
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch reports a bad file with RuntimeError, UnpicklingError, EOFError, KeyError, ...
        problem = _refusal(str(error), start)
        hint = "save its state_dict() in the program that made it" if problem.startswith(REFUSED) else ""
        raise InvalidFile(problem, path=path, expected=expected, hint=hint) from error


def write_torch_file(path: Path, content: dict[str, Any]) -> None:
    """Write `content` whole or not at all (temporary file, fsync, rename).

    Raises CannotWrite if the disk is full or the path not writable; the old file is then intact.
    """
    # an open file, not its path: torch closes a file that it opened with Python's lock held, for 0.1 s or more
    with replacing(path) as temporary, temporary.open("wb") as file:
        try:
            torch.save(content, file)
        except RuntimeError as error:  # what torch makes of a full disk, or a Ctrl-C
            raise error.__context__ or error from None


def as_float32(value: Tensor, key: str, path: str | Path) -> Tensor:
    """The weight `value`, `key` of the file `path`, as float32 or, one of batch-norm's counters, as int64; the same
    storage where it is that already.

    Raises InvalidFile, naming the key, for weights in other numbers than floating-point ones, and for NaN and Inf.
    """
    counter = key.endswith(COUNTER)
    if value.layout != torch.strided or not (value.is_floating_point() or counter):
        dtype = str(value.dtype).removeprefix("torch.")
        raise InvalidFile(f"{key} is {dtype}", path=path, expected="plain floating-point weights")
    plain = value.detach().to(torch.float64 if counter else torch.float32)
    # the sum takes a tenth of the time, and is not finite either, or has overflowed
    if not plain.sum().isfinite() and not plain.isfinite().all():
        raise InvalidFile(f"{key} holds NaN or Inf: the training diverged, or the file is damaged", path=path)
    return plain.to(torch.int64) if counter else plain


def first_names(keys: Iterable[Any]) -> str:
    """The first few of many keys, for a message."""
    names = list(map(str, keys))
    return ", ".join(names[:SHOWN]) + (", ..." if len(names) > SHOWN else "")


def _other_kind(path: Path, start: bytes) -> str | None:
    """Why a file that begins with `start` cannot be torch's, or None if it may be."""
    kind, declared = kind_of_content(path), SUFFIXES.get(path.suffix.lower(), "checkpoint")
    if kind in ("checkpoint", "torch"):
        return None
    if kind:
        return f"{KIND_NAMES[kind]}, or a damaged one, not a checkpoint"
    if start[:2] == b"PK" or start[:1] == b"\x80":  # a zip archive, or a pickle of old versions of torch
        return None
    if declared != "checkpoint":
        return f"{KIND_NAMES[declared]}, or a damaged one, not a checkpoint"
    if start[257:262] == b"ustar" or start[:2] == b"\x1f\x8b":
        return "a packed archive (.tar or .gz), not a checkpoint: unpack it and give the file inside"
    return "truncated, or not a checkpoint"


def _refusal(reason: str, start: bytes) -> str:
    """torch's page-long explanation as one clause."""
    function = re.search(r"GLOBAL (\S+)", reason)
    if function:
        return f"{REFUSED} (it asks for {function[1]})"
    if "Weights only" in reason:
        return REFUSED
    line = re.split(r"\. |\n", reason.strip() or "no reason given")[0][:160]
    return f"truncated, or not a checkpoint ({'a zip archive, but ' if start[:2] == b'PK' else ''}{line})"
