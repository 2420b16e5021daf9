"""What is said of a network beside its images. Loads no torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pmm.data.dataset_specs import dataset_spec
from pmm.utils.arguments import Arg
from pmm.utils.errors import ConflictingOptions, InvalidFile

Metric = Literal["auto", "euclidean", "cosine"]


@dataclass(frozen=True, kw_only=True)
class NetworkOptions:
    """Raises ConflictingOptions, InvalidValue or InvalidFile for a data set that is none."""

    output: Annotated[str, Arg("NAME")] = ""
    """Name or index of the embeddings, if the network has several outputs."""
    metric: Metric = "auto"
    """How embeddings are compared: with cosine they are given norm 1, auto takes them as they are."""
    dataset: Annotated[str, Arg("NAME", group="data")] = ""
    """Data set to judge it on where a later command is not told one; pmm check --help lists them."""
    root: Annotated[str, Arg("DIR", group="data")] = ""
    """Folder of that data set."""

    def __post_init__(self) -> None:
        if self.root and not self.dataset:
            raise ConflictingOptions("{root} needs {dataset}", "root", "dataset", hint="say which data set it is")
        if self.dataset:
            dataset_spec(self.dataset)
        if self.root and not Path(self.root).is_dir():
            raise InvalidFile("it is not a folder", path=self.root, expected="the folder of the data set")
