"""ONNX Runtime, on the CPU or through its CUDA provider. Needs no torch."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from pmm.data.crops import Crops, Preprocessing
from pmm.errors import UserError
from pmm.files import existing_file
from pmm.machine import nvidia_gpus
from pmm.manifest import Manifest, read_manifest
from pmm.runtime.base import Embeddings, Runner, RunnerInfo

METADATA_KEY = "pmm_manifest"


class OrtRunner(Runner):
    """An exported ONNX file in ONNX Runtime."""

    def __init__(self, path: str | Path, device: str = "cpu", threads: int = 0) -> None:
        """Open `path`. Raises UserError if it is not ours, was changed, or the device is not really used."""
        try:
            import onnxruntime as ort
        except ImportError as error:
            raise UserError(
                "running ONNX files needs ONNX Runtime: pip install onnxruntime-gpu (or onnxruntime)"
            ) from error

        path = existing_file(path, "an ONNX file written by export/to_onnx.py")
        content = path.read_bytes()
        manifest = read_manifest(path, hashlib.sha256(content).hexdigest())
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 4  # its errors reach the user as ours
        device = _resolved(device, ort.get_available_providers())
        provider = ("CUDAExecutionProvider", {"use_tf32": 0}) if device == "cuda" else ("CPUExecutionProvider", {})
        try:
            # from the bytes that were hashed: the file cannot change in between, nor reach for external data
            self.session = ort.InferenceSession(content, options, providers=[provider])
        except Exception as error:  # ORT raises its own exception types, one per kind of bad file
            reason = (str(error).strip().splitlines() or ["no reason given"])[0][:200]
            raise UserError(f"{path}: ONNX Runtime cannot load it ({reason})") from error
        used = self.session.get_providers()[0]
        if used != provider[0]:
            raise UserError(f"{path}: asked for {provider[0]}, but ONNX Runtime fell back to {used}; refusing to run")
        self.manifest = manifest or _embedded_manifest(self.session, path)
        self.preprocessing = self.manifest.preprocessing
        _check_inputs(self.session, self.preprocessing, path)
        self.info = RunnerInfo(
            backend="ort-cuda" if device == "cuda" else "ort-cpu",
            device=device,
            precision=self.manifest.precision_found,
            provider=f"onnxruntime {ort.__version__} {used}",
        )

    def __call__(self, images: Crops) -> Embeddings:
        self.check(images)
        return self.session.run(["embeddings"], {"images": images})[0]

    def bind(self, images: Crops) -> Callable[[], None]:
        self.check(images)
        binding = self.session.io_binding()
        binding.bind_cpu_input("images", np.ascontiguousarray(images))
        binding.bind_output("embeddings", "cpu")

        def step() -> None:
            self.session.run_with_iobinding(binding)
            binding.synchronize_outputs()

        return step


def _embedded_manifest(session: Any, path: Path) -> Manifest:
    metadata = session.get_modelmeta().custom_metadata_map
    if METADATA_KEY not in metadata:
        raise UserError(
            f"{path}: not an ONNX file of ours (no manifest beside it or inside); export it with export/to_onnx.py"
        )
    return Manifest.from_json(metadata[METADATA_KEY], str(path))


def _resolved(device: str, providers: list[str]) -> str:
    """Turn "auto" into "cuda" where a GPU and the provider are, else "cpu". Raises UserError for an unknown device."""
    if device == "auto":
        return "cuda" if nvidia_gpus() and "CUDAExecutionProvider" in providers else "cpu"
    if device not in ("cpu", "cuda"):
        raise UserError(f"unknown device '{device}'; known: auto, cpu, cuda")
    return device


def _check_inputs(session: Any, size: Preprocessing, path: Path) -> None:
    found = {value.name: list(value.shape) for value in session.get_inputs()}
    if list(found) != ["images"] or found["images"][1:] != [size.height, size.width, 3]:
        raise UserError(f"{path}: takes {found}, its manifest promises images [batch, {size.height}, {size.width}, 3]")
