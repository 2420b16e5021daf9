"""Adopted networks: a file of plain tensors and plain types that holds the network itself, as a graph of operators.

No later command needs the code that the network was built by.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pmm.data.crop_statistics import CropStatistics
from pmm.data.preprocessing import Preprocessing
from pmm.utils.errors import InvalidFile, UserError
from pmm.utils.from_dict import from_dict

if TYPE_CHECKING:
    from pmm.models.adopted import AdoptedNetwork

ADOPTED = "pmm-checkpoint-adopted-1"
"""The format."""
HINT = "adopt the network again (pmm adopt)"
AS_IT_IS = "pmm evaluate, embed, export and bench take it as it is"
"""What to do with an adopted network."""
TYPES: dict[str, type] = {
    "graph": str,
    "weights": dict,
    "preprocessing": dict,
    "normalised": bool,
    "data": dict,
    "source": dict,
    "versions": dict,
}


@dataclass(frozen=True, kw_only=True)
class Adopted:
    """An adopted network, and what its user said of it."""

    model: AdoptedNetwork
    preprocessing: Preprocessing
    dataset: str = ""
    """Layout of the data set that it was trained on; empty if nobody said what it was."""
    root: str = ""
    """Folder of that data set."""
    crop_statistics: CropStatistics | None = None
    """Of its training crops, if they were at hand."""
    source: dict[str, str] = dataclasses.field(default_factory=dict)
    """Where it comes from: the factory, the weights and their SHA-256, the flags that were given, what was assumed."""


def is_adopted_network(content: Any) -> bool:
    """Whether `content`, as torch.load returns it, is an adopted network."""
    return isinstance(content, dict) and content.get("format") == ADOPTED


def save_adopted(path: Path, adopted: Adopted, versions: dict[str, str]) -> None:
    """Write an adopted network whole or not at all.

    Raises as `write_torch_file`, and ValueError for a graph that could not be read back.
    """
    from pmm.artifacts.torch_file import write_torch_file
    from pmm.models.graph_json import graph_to_json

    graph, weights = graph_to_json(adopted.model.graph.graph)
    content = {
        "format": ADOPTED,
        "graph": graph,
        "weights": weights,
        "preprocessing": dataclasses.asdict(adopted.preprocessing),
        "normalised": adopted.model.normalised,
        "data": {"dataset": adopted.dataset, "root": adopted.root},
        "source": adopted.source,
        "versions": versions,
    }
    if adopted.crop_statistics:
        content["crop_statistics"] = dataclasses.asdict(adopted.crop_statistics)
    write_torch_file(path, content)


def restore_adopted(content: dict[str, Any], path: Path) -> Adopted:
    """The adopted network in the content of the file `path`, as torch.load returns it. Raises InvalidFile for what
    `save_adopted` did not write."""
    from pmm.models.adopted import AdoptedNetwork
    from pmm.models.graph_json import graph_from_json

    dataset, root = dataset_of_adopted(content, path)
    try:
        size = from_dict(Preprocessing, content["preprocessing"])
        statistics = content.get("crop_statistics")
        statistics = None if statistics is None else from_dict(CropStatistics, statistics)
        graph = graph_from_json(content["graph"], content["weights"])
        model = AdoptedNetwork(graph, (size.height, size.width), normalised=content["normalised"])
    except (UserError, ValueError) as error:
        raise InvalidFile(f"not a network of pmm adopt ({error})", path=path, hint=HINT) from error
    return Adopted(
        model=model,
        preprocessing=size,
        dataset=dataset,
        root=root,
        crop_statistics=statistics,
        source=content["source"],
    )


def dataset_of_adopted(content: dict[str, Any], path: Path) -> tuple[str, str]:
    """Layout and root of the data set that the content of the file `path` names, as in `Adopted`.

    Raises InvalidFile if anything in it is of another type than `save_adopted` writes.
    """
    from torch import Tensor

    for key, type_ in TYPES.items():
        if not isinstance(content.get(key), type_):
            raise InvalidFile(f"its {key} is of type {type(content.get(key)).__name__}", path=path, hint=HINT)
    for key, type_ in (("weights", Tensor), ("data", str), ("source", str), ("versions", str)):
        if not all(isinstance(name, str) and isinstance(value, type_) for name, value in content[key].items()):
            problem = f"its {key} are not all of type {type_.__name__}"
            raise InvalidFile(problem, path=path, hint=HINT)
    data = content["data"]
    if not {"dataset", "root"} <= data.keys():
        raise InvalidFile("its data section does not name a data set and its root", path=path, hint=HINT)
    return data["dataset"], data["root"]
