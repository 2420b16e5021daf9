"""A session of ONNX Runtime: where it may run, how it is opened, and the proof that it runs there."""

from __future__ import annotations

from collections import Counter
from typing import Any

from pmm.artifacts.manifest import Manifest
from pmm.runtime.fork import refuse_parents_gpu
from pmm.runtime.memory import reason
from pmm.runtime.ort_cuda import CUDA, CUDA_FAILURE, CudaFailure, fell_back, mend, preload
from pmm.utils.errors import BackendUnavailable, UserError
from pmm.utils.hardware import clashing_wheels, compute_threads, cuda_index, gpu_at, nvidia_gpus

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": CUDA}
COMPUTED = {("fp16", "cpu"): "fp32", ("int8", "cuda"): "fp32"}
"""Precision of the file and device, where ONNX Runtime has no products in it: what it computes them in."""
SEARCH = "HEURISTIC"
"""How cuDNN's convolutions are chosen. ONNX Runtime's own setting, EXHAUSTIVE, searches long, and again whenever a
batch has another size than the one before it; with HEURISTIC cuDNN says at once what it expects to be fastest. Batches
of changing sizes are what is served, and a bench times what is served, so it is one setting for all runs."""
_PRODUCTS = ("Conv", "Gemm", "MatMul")


def open_session(
    content: bytes,
    name: str = "graph",
    device: str = "cpu",
    threads: int = 0,
    *,
    optimise: bool = True,
    tf32: bool = False,
    cuda_graph: bool = False,
) -> Any:
    """An onnxruntime.InferenceSession on one provider, recording where each operator goes.

    Args:
        name: of the file, for messages.
        device: cpu, cuda or cuda:N.
        optimise: let ONNX Runtime rewrite the graph.
        tf32, cuda_graph: as `OrtRunner` has them, on cuda.

    Raises:
        UserError: ONNX Runtime is missing or installed twice, or refuses the graph.
        CudaFailure: CUDA refused.
    """
    ort, gpu = onnx_runtime(), cuda_index(device)
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads or compute_threads()
    options.log_severity_level = 4  # its errors reach the user as ours
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    # where 8-bit products are summed in 16 bits (see hardware.int8_overflows), exact sums: a few percent slower
    options.add_session_config_entry("session.x64quantprecision", "1")
    if not optimise:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    # TF32 is on by default in ONNX Runtime; fp32 must be fp32
    on_gpu = {
        "device_id": gpu,
        "use_tf32": int(tf32),
        "enable_cuda_graph": int(cuda_graph),
        "cudnn_conv_algo_search": SEARCH,
    }
    provider = (PROVIDERS["cpu"], {}) if gpu is None else (PROVIDERS["cuda"], on_gpu)
    if gpu is not None:
        preload(ort)
    try:
        # without the fallback: it would print, go on with the CPU, and do so again in the middle of the runs
        return ort.InferenceSession(content, options, providers=[provider], enable_fallback=0)
    except Exception as error:  # ORT raises its own exception types, one per kind of bad file
        said = f"{name}: ONNX Runtime cannot load it ({reason(error)})"
        if gpu is not None and CUDA_FAILURE.search(str(error)):
            raise CudaFailure(said + mend(ort, reason(error))) from error
        raise UserError(said) from error


def onnx_runtime() -> Any:
    """The module. Raises UserError where it is missing or installed twice."""
    try:
        import onnxruntime as ort
    except ImportError as error:
        raise BackendUnavailable(
            "running ONNX files needs ONNX Runtime: pip install onnxruntime-gpu (or onnxruntime)"
        ) from error
    if clash := clashing_wheels():
        raise UserError(clash)
    ort.disable_telemetry_events()  # nobody asked for it to be sent
    return ort


def resolved_device(device: str) -> str:
    """Turn "auto" into "cuda" where a GPU and the provider are, else "cpu". Raises UserError for what cannot be had."""
    index = cuda_index(device)
    if device != "cpu":
        refuse_parents_gpu()
    providers = onnx_runtime().get_available_providers()  # what was compiled: necessary, not sufficient
    usable = bool(nvidia_gpus()) and PROVIDERS["cuda"] in providers
    if device == "auto":
        return "cuda" if usable else "cpu"
    if index is not None and not usable:
        lacking = "no NVIDIA GPU is visible" if not nvidia_gpus() else "this ONNX Runtime has no CUDA provider"
        raise BackendUnavailable(
            f"--device {device}: {lacking}; use --device cpu, or install onnxruntime-gpu and a driver"
        )
    if index is not None:
        gpu_at(index)
    return device


def check_request(name: str, device: str, holds: str, tf32: bool, cuda_graph: bool) -> None:
    """Raises UserError for what cannot be had of a file that `holds` this precision, on this device."""
    if holds == "bf16" and device == "cpu":
        raise BackendUnavailable(
            f"{name}: ONNX Runtime has no bf16 convolution for CPUs; use a GPU, build an engine "
            "(pmm export trt), or export another precision"
        )
    if device == "cpu" and (tf32 or cuda_graph):
        raise BackendUnavailable(
            f"{name}: {'TF32' if tf32 else 'a CUDA graph'} was asked for, and a CPU has no such thing"
        )
    if tf32 and holds != "fp32":
        raise UserError(f"{name}: TF32 is for the products of an fp32 file, and this one holds {holds}")
    if tf32 and not (gpu := gpu_at(cuda_index(device) or 0)).has_tf32:
        raise BackendUnavailable(f"{name}: {gpu.name} has no TF32; run it in fp32")


def evidence_of(session: Any, device: str, name: str) -> str:
    """Which provider really runs the graph, as strongly as this version can show it.

    Raises UserError if it is not the one asked for: ONNX Runtime falls back without a word.
    """
    wanted = PROVIDERS["cpu" if device == "cpu" else "cuda"]
    if device != "cpu" and (why := fell_back(onnx_runtime(), session)):
        raise UserError(f"{name}: asked for {wanted}, but {why}; refusing to run")
    if not hasattr(session, "get_provider_graph_assignment_info"):
        return wanted
    placed = [(part.ep_name, node.op_type) for part in session.get_provider_graph_assignment_info()
              for node in part.get_nodes()]  # fmt: skip
    elsewhere = Counter(provider for provider, operator in placed if provider != wanted and operator in _PRODUCTS)
    if elsewhere:
        where = ", ".join(f"{count} on {provider}" for provider, count in elsewhere.items())
        raise UserError(f"{name}: asked for {wanted}, but convolutions or matrix products run elsewhere: {where}")
    return f"{wanted} ({sum(provider == wanted for provider, _ in placed)} of {len(placed)} operators)"


def check_interface(session: Any, manifest: Manifest, name: str) -> None:
    """Raises UserError if the session does not take and give what the manifest promises."""
    values = (*session.get_inputs(), *session.get_outputs())
    # a dynamic size is a name
    found = {v.name: ["any" if isinstance(v.shape[0], str) else v.shape[0], *v.shape[1:]] for v in values if v.shape}
    batch = manifest.input.batch or "any"
    promised = {
        manifest.input.name: [batch, *manifest.input.shape(manifest.preprocessing)],
        manifest.embedding.name: [batch, manifest.embedding.dim],
    }
    if found != promised:
        raise UserError(f"{name}: takes and gives {found}, its manifest promises {promised}")
