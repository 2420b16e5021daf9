"""A network with its weights, whoever trained it, and what deployment must know about it. Loads no torch until a file
is read."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pmm.artifacts.adopted_file import dataset_of_adopted, is_adopted_network, restore_adopted
from pmm.artifacts.checkpoint import EXPECTED, checked, restore_model, statistics_of
from pmm.artifacts.dataset_location import DatasetLocation, resolve_data_root
from pmm.config import Config
from pmm.data.crop_statistics import CropStatistics
from pmm.data.preprocessing import Preprocessing, preprocessing_of

if TYPE_CHECKING:
    from pmm.models.output import EmbeddingModel


@dataclass(frozen=True, kw_only=True)
class TrainedModel:
    """What a checkpoint of pmm train holds, or an adopted network."""

    path: Path
    model: EmbeddingModel
    """In eval mode, on the CPU."""
    method: str
    """As --method named it, or adopted."""
    preprocessing: Preprocessing
    data: DatasetLocation
    """The data set that it was trained on; of an adopted network, empty where nobody said what it was."""
    epoch: int | None
    """Epochs trained; None if unknown."""
    kernels: str
    """Build of the kernels that it was trained with."""
    config: Config | None = None
    """Of its training; None of an adopted network."""
    crop_statistics: CropStatistics | None = None
    """Of its training crops, where they were measured."""
    source: dict[str, str] = field(default_factory=dict)
    """Where an adopted network comes from, as `pmm.artifacts.adopted_file.Adopted` has it."""


def read_model(path: str | Path) -> TrainedModel:
    """The model in a checkpoint, with all that an export or a backend needs; no code inside the file is run.

    Raises InvalidFile if it is missing, damaged, or no checkpoint.
    """
    path = Path(path)
    content = _read(path)
    if is_adopted_network(content):
        adopted = restore_adopted(content, path)
        return TrainedModel(
            path=path,
            model=adopted.model,
            method="adopted",
            preprocessing=adopted.preprocessing,
            data=_located(adopted.dataset, adopted.root, path),
            epoch=None,
            kernels="none, adopted",
            crop_statistics=adopted.crop_statistics,
            source=adopted.source,
        )
    state = checked(content, path)
    model, config = restore_model(state, path)
    return TrainedModel(
        path=path,
        model=model,
        method=config.model.method,
        preprocessing=preprocessing_of(config),
        data=_located(config.data.dataset, config.data.root, path),
        epoch=state["epoch"],
        kernels=state["versions"].get("pmm kernels", "unknown"),
        config=config,
        crop_statistics=statistics_of(state),
    )


def load_model(path: str | Path) -> EmbeddingModel:
    """The model of a checkpoint in eval mode, on the CPU.

    It maps normalised float32 images [N, 3, H, W] to embeddings [N, D], of norm 1 if its `normalised` says so.

    Raises InvalidFile as `read_model`.

    Examples:
        >>> model = pmm.load_model("best.pth")
        >>> model.training, model.embedding_dim
        (False, 384)
    """
    return read_model(path).model


def dataset_of(path: str | Path) -> DatasetLocation:
    """The data set that a checkpoint was trained on, as `TrainedModel.data`, without its network.

    Raises InvalidFile as `read_model`.
    """
    path = Path(path)
    content = _read(path)
    if is_adopted_network(content):
        return _located(*dataset_of_adopted(content, path), path)
    data = Config.from_dict(checked(content, path)["config"]).data
    return _located(data.dataset, data.root, path)


def _read(path: Path) -> Any:
    from pmm.artifacts.torch_file import read_torch_file

    return read_torch_file(path, EXPECTED)


def _located(dataset: str, root: str, path: Path) -> DatasetLocation:
    return DatasetLocation(dataset, resolve_data_root(root, path))
