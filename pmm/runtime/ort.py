"""ONNX Runtime, on the CPU or through its CUDA provider. Needs no torch."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from pmm.data.crops import Crops
from pmm.errors import UserError
from pmm.machine import clashing_wheels, nvidia_gpus
from pmm.manifest import Manifest
from pmm.onnx_file import read_onnx
from pmm.runtime.base import Embeddings, Runner, RunnerInfo, Step, warn_if_unverified

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
_PRODUCTS = ("Conv", "Gemm", "MatMul")


class OrtRunner(Runner):
    """An exported ONNX file in ONNX Runtime."""

    def __init__(self, path: str | Path, device: str = "cpu", threads: int = 0, *, warn: bool = True) -> None:
        """Open `path`; `warn` about embeddings that were never verified.

        Raises UserError if the file is not ours, was changed, cannot run here, or the device is not really used.
        """
        file = read_onnx(path)
        self.manifest = file.manifest
        device = _resolved(device)
        if self.manifest.precision_found == "bf16" and device == "cpu":
            raise UserError(
                f"{path}: ONNX Runtime has no bf16 convolution for CPUs; use a GPU, build an engine "
                "(export/to_trt.py), or export another precision"
            )
        # from the bytes that were hashed: the file cannot change in between
        self.session = open_session(file.content, str(path), device, threads)
        self.preprocessing, self.embedding = self.manifest.preprocessing, self.manifest.embedding
        _check_interface(self.session, self.manifest, str(path))
        if warn:
            warn_if_unverified(Path(path), self.manifest)
        self.info = RunnerInfo(
            backend=f"ort-{device}",
            device=nvidia_gpus()[0].name if device == "cuda" else "cpu",
            precision=self.manifest.precision_found,
            provider=f"onnxruntime {_import().__version__} {_evidence(self.session, device, str(path))}",
        )

    def __call__(self, images: Crops) -> Embeddings:
        self.check(images)
        feed = self.manifest.input.feed(images, self.preprocessing)
        return self.session.run([self.embedding.name], {self.manifest.input.name: feed})[0]

    def bind(self, images: Crops) -> Step:
        self.check(images)
        binding = self.session.io_binding()
        binding.bind_cpu_input(self.manifest.input.name, self.manifest.input.feed(images, self.preprocessing))
        binding.bind_output(self.embedding.name, "cpu")

        def step() -> None:
            self.session.run_with_iobinding(binding)
            binding.synchronize_outputs()

        return Step(step)


def open_session(
    content: bytes, name: str = "graph", device: str = "cpu", threads: int = 0, *, optimise: bool = True
) -> Any:
    """An onnxruntime.InferenceSession on one provider, recording where each operator goes.

    Args:
        name: of the file, for messages.
        device: cpu or cuda (TF32 off).
        optimise: let ONNX Runtime rewrite the graph.

    Raises:
        UserError: ONNX Runtime is missing or installed twice, or refuses the graph.
    """
    ort = _import()
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4  # its errors reach the user as ours
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    if not optimise:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    provider = (PROVIDERS[device], {"use_tf32": 0} if device == "cuda" else {})
    try:
        return ort.InferenceSession(content, options, providers=[provider])
    except Exception as error:  # ORT raises its own exception types, one per kind of bad file
        reason = (str(error).strip().splitlines() or ["no reason given"])[0][:200]
        raise UserError(f"{name}: ONNX Runtime cannot load it ({reason})") from error


def _import() -> Any:
    try:
        import onnxruntime as ort
    except ImportError as error:
        raise UserError(
            "running ONNX files needs ONNX Runtime: pip install onnxruntime-gpu (or onnxruntime)"
        ) from error
    if clash := clashing_wheels():
        raise UserError(clash)
    ort.disable_telemetry_events()  # nobody asked for it to be sent
    return ort


def _resolved(device: str) -> str:
    """Turn "auto" into "cuda" where a GPU and the provider are, else "cpu". Raises UserError for what cannot be had."""
    providers = _import().get_available_providers()  # what was compiled: necessary, not sufficient
    usable = bool(nvidia_gpus()) and PROVIDERS["cuda"] in providers
    if device == "auto":
        return "cuda" if usable else "cpu"
    if device not in PROVIDERS:
        raise UserError(f"unknown device '{device}'; known: auto, {', '.join(PROVIDERS)}")
    if device == "cuda" and not usable:
        lacking = "no NVIDIA GPU is visible" if not nvidia_gpus() else "this ONNX Runtime has no CUDA provider"
        raise UserError(f"--device cuda: {lacking}; use --device cpu, or install onnxruntime-gpu and a driver")
    return device


def _evidence(session: Any, device: str, name: str) -> str:
    """Which provider really runs the graph, as strongly as this version can show it.

    Raises UserError if it is not the one asked for: ONNX Runtime falls back without a word.
    """
    wanted = PROVIDERS[device]
    first = session.get_providers()[0]
    if first != wanted:
        raise UserError(f"{name}: asked for {wanted}, but ONNX Runtime fell back to {first}; refusing to run")
    if not hasattr(session, "get_provider_graph_assignment_info"):
        return wanted
    placed = [(part.ep_name, node.op_type) for part in session.get_provider_graph_assignment_info()
              for node in part.get_nodes()]  # fmt: skip
    elsewhere = Counter(provider for provider, operator in placed if provider != wanted and operator in _PRODUCTS)
    if elsewhere:
        where = ", ".join(f"{count} on {provider}" for provider, count in elsewhere.items())
        raise UserError(f"{name}: asked for {wanted}, but convolutions or matrix products run elsewhere: {where}")
    return f"{wanted} ({sum(provider == wanted for provider, _ in placed)} of {len(placed)} operators)"


def _check_interface(session: Any, manifest: Manifest, name: str) -> None:
    found = {value.name: list(value.shape)[1:] for value in (*session.get_inputs(), *session.get_outputs())}
    promised = {
        manifest.input.name: list(manifest.input.shape(manifest.preprocessing)),
        manifest.embedding.name: [manifest.embedding.dim],
    }
    if found != promised:
        raise UserError(f"{name}: takes and gives {found} per image, its manifest promises {promised}")
