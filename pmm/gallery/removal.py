"""The ids of the crops that a command line names."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from pmm.gallery.foreign_embeddings import lines_of
from pmm.gallery.gallery import Gallery
from pmm.utils.errors import InvalidInput
from pmm.utils.files import existing_file


def ids_to_remove(gallery: Gallery, named: Sequence[str], file: Path | None = None) -> list[str] | list[int]:
    """The ids `named`, and those on the lines of a text `file`, as the gallery holds them, each once.

    Raises InvalidInput for an id that the gallery does not have, InvalidFile for a file that is no text.
    """
    texts = list(named)
    if file is not None:
        texts += [line for line in lines_of(existing_file(file, "a text file with an id on each line")) if line]
    texts = list(dict.fromkeys(texts))
    if gallery.manifest.ids == "text":
        found = gallery.find(texts)
        ids: list[str] | list[int] = texts
    else:
        numbers = [int(text) if text.lstrip("-").isdecimal() else None for text in texts]
        ids = [number for number in numbers if number is not None]
        found = np.full(len(texts), -1)
        found[[number is not None for number in numbers]] = gallery.find(ids)
    unknown = [text for text, row in zip(texts, found.tolist(), strict=True) if row < 0]
    if unknown:
        shown = ", ".join(unknown[:3]) + ", ..." * (len(unknown) > 3)
        problem = f"it does not hold {len(unknown)} of {len(texts)} ids: {shown}"
        raise InvalidInput(problem, path=gallery.path, hint="nothing was removed")
    return ids
