"""PMM: person re-identification from training to production, with proof.

    import pmm

    model = pmm.load_model("best.pth")  # torch: normalised images [N, 3, H, W] -> embeddings [N, D]
    with pmm.open_runner("best.onnx") as runner:  # any backend: uint8 RGB crops [N, H, W, 3] -> embeddings [N, D]
        embeddings = runner(pmm.load_crops(["a.jpg", "b.jpg"], runner.preprocessing))
        embeddings = runner(pmm.crop_boxes(frame, boxes, colour="bgr"))  # of a frame of OpenCV and a detector's boxes

What is named here is loaded when it is first used: importing pmm loads neither torch nor numpy.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from pmm.utils.build_info import __version__ as __version__

if TYPE_CHECKING:
    from pmm import ops as ops
    from pmm.adoption.adopt import adopt as adopt
    from pmm.adoption.user_code import CannotAdopt as CannotAdopt
    from pmm.artifacts.artifact import Artifact as Artifact
    from pmm.artifacts.trained_model import load_model as load_model
    from pmm.data.crops import load_crops as load_crops
    from pmm.data.frames import crop_boxes as crop_boxes
    from pmm.data.samples import ReidDataset as ReidDataset
    from pmm.data.samples import Sample as Sample
    from pmm.embedding.evaluate import Evaluation as Evaluation
    from pmm.embedding.evaluate import evaluate as evaluate
    from pmm.evaluation.metrics import RankingResult as RankingResult
    from pmm.evaluation.metrics import evaluate_ranking as evaluate_ranking
    from pmm.evaluation.reranking import Reranking as Reranking
    from pmm.export.onnx import export_onnx as export_onnx
    from pmm.export.options import EngineOptions as EngineOptions
    from pmm.export.options import ExportOptions as ExportOptions
    from pmm.export.options import VerifyOptions as VerifyOptions
    from pmm.export.parity_check import ParityFailed as ParityFailed
    from pmm.export.trt import build_engine as build_engine
    from pmm.gallery.embed_folder import embed as embed
    from pmm.gallery.filters import RowFilter as RowFilter
    from pmm.gallery.gallery import Gallery as Gallery
    from pmm.gallery.matches import Matches as Matches
    from pmm.gallery.search import search as search
    from pmm.runtime.base import Runner as Runner
    from pmm.runtime.open import open_runner as open_runner
    from pmm.selftest.judge import SelftestVerdict as SelftestVerdict
    from pmm.selftest.run import judge_embeddings as judge_embeddings
    from pmm.selftest.run import run_selftest as run_selftest
    from pmm.utils.errors import BackendUnavailable as BackendUnavailable
    from pmm.utils.errors import CannotWrite as CannotWrite
    from pmm.utils.errors import ConflictingOptions as ConflictingOptions
    from pmm.utils.errors import InvalidFile as InvalidFile
    from pmm.utils.errors import InvalidInput as InvalidInput
    from pmm.utils.errors import InvalidValue as InvalidValue
    from pmm.utils.errors import MissingLibrary as MissingLibrary
    from pmm.utils.errors import OutOfMemory as OutOfMemory
    from pmm.utils.errors import UserError as UserError

_EXPORTS = {
    "Artifact": "pmm.artifacts.artifact",
    "BackendUnavailable": "pmm.utils.errors",
    "CannotAdopt": "pmm.adoption.user_code",
    "CannotWrite": "pmm.utils.errors",
    "ConflictingOptions": "pmm.utils.errors",
    "EngineOptions": "pmm.export.options",
    "Evaluation": "pmm.embedding.evaluate",
    "ExportOptions": "pmm.export.options",
    "Gallery": "pmm.gallery.gallery",
    "InvalidFile": "pmm.utils.errors",
    "InvalidInput": "pmm.utils.errors",
    "InvalidValue": "pmm.utils.errors",
    "Matches": "pmm.gallery.matches",
    "MissingLibrary": "pmm.utils.errors",
    "OutOfMemory": "pmm.utils.errors",
    "ParityFailed": "pmm.export.parity_check",
    "RankingResult": "pmm.evaluation.metrics",
    "ReidDataset": "pmm.data.samples",
    "Reranking": "pmm.evaluation.reranking",
    "RowFilter": "pmm.gallery.filters",
    "Runner": "pmm.runtime.base",
    "Sample": "pmm.data.samples",
    "SelftestVerdict": "pmm.selftest.judge",
    "UserError": "pmm.utils.errors",
    "VerifyOptions": "pmm.export.options",
    "adopt": "pmm.adoption.adopt",
    "build_engine": "pmm.export.trt",
    "crop_boxes": "pmm.data.frames",
    "embed": "pmm.gallery.embed_folder",
    "evaluate": "pmm.embedding.evaluate",
    "evaluate_ranking": "pmm.evaluation.metrics",
    "export_onnx": "pmm.export.onnx",
    "judge_embeddings": "pmm.selftest.run",
    "load_crops": "pmm.data.crops",
    "load_model": "pmm.artifacts.trained_model",
    "open_runner": "pmm.runtime.open",
    "ops": "pmm",
    "run_selftest": "pmm.selftest.run",
    "search": "pmm.gallery.search",
}
"""Name -> module that holds it."""

__all__ = [*sorted(_EXPORTS), "__version__"]


if not TYPE_CHECKING:  # a type checker would take any name for one of these

    def __getattr__(name: str) -> object:
        if name not in _EXPORTS:
            raise AttributeError(f"module 'pmm' has no attribute '{name}'; it has {', '.join(__all__)}")
        home = _EXPORTS[name]
        if home == __name__:
            return importlib.import_module(f"{home}.{name}")
        value = globals()[name] = getattr(importlib.import_module(home), name)
        return value


def __dir__() -> list[str]:
    return sorted(__all__)
