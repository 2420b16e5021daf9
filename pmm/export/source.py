"""What exports start from: a checkpoint, or an adopted ONNX file. Loads torch for a checkpoint only."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

from pmm.artifacts.dataset_location import DatasetLocation, resolve_data_root
from pmm.artifacts.kinds import kind_of
from pmm.artifacts.manifest import EmbeddingContract, InputContract, OnnxOrigin
from pmm.artifacts.onnx_file import OnnxFile, read_onnx
from pmm.data.crop_statistics import CropStatistics
from pmm.data.preprocessing import Preprocessing
from pmm.export.options import OF_ADOPTED, ExportOptions, VerifyOptions, flag_of
from pmm.export.parity_check import ParityCheck
from pmm.export.reference import checkpoint_parity_check, onnx_parity_check
from pmm.export.selftest import checkpoint_vectors, onnx_vectors
from pmm.selftest.vectors import SelftestVectors
from pmm.utils.build_info import __version__
from pmm.utils.errors import ConflictingOptions, InvalidFile
from pmm.utils.files import sha256

if TYPE_CHECKING:
    import onnx

    from pmm.artifacts.trained_model import TrainedModel

LEAST_OPSET = {"int8": 13, "int8-fp16": 19}
"""Of files made from an adopted one: QuantizeLinear takes a scale per channel from 13 on and fp16 from 19 on."""


@dataclass(frozen=True, kw_only=True)
class ExportSource(ABC):
    """A network in fp32, what goes with it, and how its exports are judged."""

    path: Path
    sha256: str
    method: str
    """As pmm train has it, or adopted."""
    preprocessing: Preprocessing
    data: DatasetLocation
    """Its data set; empty where that is unknown."""
    adopted: OnnxOrigin | None = None
    """Of an adopted ONNX file."""
    crop_statistics: CropStatistics | None = None
    """Of its training crops, where they were measured."""

    @abstractmethod
    def check(self, options: ExportOptions) -> None:
        """Raises ConflictingOptions or InvalidFile for options that this source cannot be exported with."""

    def fed(self, options: ExportOptions) -> Preprocessing:
        """How crops for the exported file are prepared."""
        return options.fed(self.preprocessing)

    @abstractmethod
    def input(self, options: ExportOptions) -> InputContract:
        """What the exported file takes."""

    @abstractmethod
    def embedding(self, options: ExportOptions) -> EmbeddingContract:
        """What the exported file returns."""

    @abstractmethod
    def parity_check(self, options: ExportOptions, verification: VerifyOptions) -> ParityCheck | None:
        """What the exported file must equal; None if it is not to be verified. Raises InvalidFile without crops."""

    @abstractmethod
    def graph(self, options: ExportOptions) -> onnx.ModelProto:
        """The graph in the precision of `options`; in fp32 for int8 and, of adopted networks, for fp16 and bf16: those
        are made of it."""

    @abstractmethod
    def selftest_vectors(self, options: ExportOptions) -> SelftestVectors | None:
        """The embeddings, right and wrong ones, that the selftest of the exported file compares with."""

    @abstractmethod
    def versions(self) -> dict[str, str]:
        """Versions of the libraries that make `graph`."""


def open_source(path: str | Path) -> ExportSource:
    """Raises InvalidFile for what is neither a checkpoint nor an adopted ONNX file, or is damaged."""
    path = Path(path)
    if kind_of(path, "checkpoint", "onnx") == "onnx":
        return _adopted(path)
    return _checkpoint(path)


def _checkpoint(path: Path) -> ExportSource:
    from pmm.artifacts.trained_model import read_model

    digest = sha256(path)
    trained = read_model(path)
    return CheckpointSource(
        path=path,
        sha256=digest,
        method=trained.method,
        preprocessing=trained.preprocessing,
        data=trained.data,
        crop_statistics=trained.crop_statistics,
        trained=trained,
    )


def _adopted(path: Path) -> ExportSource:
    file = read_onnx(path)
    manifest = file.manifest
    if not manifest.is_adopted_itself:
        expected = "a checkpoint, or an ONNX file of pmm adopt"
        source = "the adopted file" if manifest.adopted else "its checkpoint"
        raise InvalidFile("it is itself an export", path=path, expected=expected, hint=f"give {source}")
    assert manifest.adopted is not None
    return AdoptedOnnxSource(
        path=path,
        sha256=file.sha256,
        method=manifest.method,
        preprocessing=manifest.preprocessing,
        data=DatasetLocation(manifest.adopted.dataset, resolve_data_root(manifest.adopted.root, path)),
        adopted=manifest.adopted,
        crop_statistics=manifest.crop_statistics,
        file=file,
    )


@dataclass(frozen=True, kw_only=True)
class CheckpointSource(ExportSource):
    """A checkpoint of pmm train, or an adopted network of torch."""

    trained: TrainedModel

    def check(self, options: ExportOptions) -> None:
        self.fed(options)

    def input(self, options: ExportOptions) -> InputContract:
        return options.contract

    def embedding(self, options: ExportOptions) -> EmbeddingContract:
        return EmbeddingContract.of(self.trained.model, normalised=options.normalize, flip_tta=options.flip_tta)

    def parity_check(self, options: ExportOptions, verification: VerifyOptions) -> ParityCheck | None:
        return checkpoint_parity_check(self.trained, self.embedding(options), verification)

    def graph(self, options: ExportOptions) -> onnx.ModelProto:
        from pmm.export.graph import to_onnx
        from pmm.runtime.deployed_graph import deployed_graph

        size, contract = self.preprocessing, options.contract
        precision = "fp32" if self.method == "adopted" else options.precision
        embedding = self.embedding(options)
        graph = deployed_graph(self.trained.model, size, contract, embedding, precision, self.fed(options))
        return to_onnx(graph, self.fed(options), contract, options.onnx_opset)

    def selftest_vectors(self, options: ExportOptions) -> SelftestVectors | None:
        contracts = self.fed(options), self.input(options), self.embedding(options)
        return checkpoint_vectors(self.trained, self.sha256, *contracts)

    def versions(self) -> dict[str, str]:
        import onnxscript

        from pmm.artifacts.checkpoint import versions

        return {
            **versions(),
            "onnxscript": onnxscript.__version__,
            "pmm kernels in training": self.trained.kernels,
        }


@dataclass(frozen=True, kw_only=True)
class AdoptedOnnxSource(ExportSource):
    """An ONNX file of pmm adopt."""

    file: OnnxFile

    def check(self, options: ExportOptions) -> None:
        defaults = {each.name: each.default for each in fields(ExportOptions)}
        decided = [flag_of(name) for name in OF_ADOPTED if getattr(options, name) != defaults[name]]
        if decided:
            problem = f"{', '.join(decided)}: the adopted ONNX file decides that"
            raise ConflictingOptions(problem, *decided, hint="leave it out, or adopt a file that has it")
        if (found := self.file.manifest.precision_found) != "fp32":
            hint = f"use it as it is, or adopt the same network in fp32 and export {options.precision} from that"
            raise InvalidFile(f"it is in {found}", path=self.path, expected="a file in fp32", hint=hint)

    def input(self, options: ExportOptions) -> InputContract:
        return self.file.manifest.input

    def embedding(self, options: ExportOptions) -> EmbeddingContract:
        return self.file.manifest.embedding

    def parity_check(self, options: ExportOptions, verification: VerifyOptions) -> ParityCheck | None:
        return onnx_parity_check(self.file, self.data, verification)

    def graph(self, options: ExportOptions) -> onnx.ModelProto:
        from pmm.export.graph_folding import folded, with_opset

        kind = "int8-fp16" if options.int8_fallback == "fp16" else options.precision
        try:
            graph = with_opset(folded(self.file.proto), LEAST_OPSET.get(kind, 0))
        except InvalidFile as error:
            error.path = self.path
            raise
        del graph.metadata_props[:]  # with the manifest of the adopted file
        return graph

    def selftest_vectors(self, options: ExportOptions) -> SelftestVectors | None:
        return onnx_vectors(self.file)

    def versions(self) -> dict[str, str]:
        return {"pmm": __version__}
