"""The deployed graph as a torch module: batch-norm folded, the trunk in its precision, eager or through inductor."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from pmm.artifacts.manifest import EmbeddingContract, InputContract
from pmm.artifacts.trained_model import read_model
from pmm.data.preprocessing import Preprocessing
from pmm.runtime.base import RunnerInfo
from pmm.runtime.deployed_graph import TRUNK_TYPES, DeployedGraph, deployed_graph
from pmm.runtime.eager import torch_device
from pmm.runtime.torch_runner import TorchRunner
from pmm.utils.errors import BackendUnavailable, UserError


class GraphRunner(TorchRunner):
    """The deployed graph behind the runner contract."""

    def __init__(
        self,
        graph: DeployedGraph,
        preprocessing: Preprocessing,
        device: torch.device,
        precision: str = "fp32",
        threads: int = 0,
        *,
        compiled: bool = False,
        cuda_graph: bool = False,
    ) -> None:
        """Run `graph`, which is moved to `device`.

        Args:
            graph: uint8 RGB crops [B, H, W, 3] -> embeddings [B, D] of its contract `embedding`.
            precision: fp32, tf32, fp16 or bf16; the trunk's type must be that already.
            compiled: through inductor, whole. Compiled now for one image, and at the first call with more for all other
                batch sizes (on a CPU in fp32 twice: from 16 images on, torch convolves them in another way).
            cuda_graph: capture the work of each batch size once, and replay it with one launch.

        Raises:
            ValueError: the trunk has another type.
            UserError: inductor fails, or compiles nothing.
            BackendUnavailable: no C++ compiler, or no TF32 or CUDA graph on this device.
        """
        stored = main_type(graph)
        if precision == "int8" or TRUNK_TYPES.get(precision) != stored:
            raise ValueError(f"the trunk's weights are {stored}; expected those of {precision}")
        tf32 = precision == "tf32"
        super().__init__(preprocessing, graph.embedding, device, threads, tf32=tf32, cuda_graph=cuda_graph)
        self.compilations = 0
        """Graphs that inductor has compiled so far."""
        # crops come with their channels last; weights that do too are not rearranged at every run
        module = graph.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        try:
            self._module = self._through_inductor(module) if compiled else module
            if compiled:
                self._prove_compiled()
        except BaseException:
            self.close()
            raise
        mode = f"{'inductor' if compiled else 'eager'} (batch-norm folded, trunk {precision}"
        self.info = RunnerInfo(
            backend="torch-compile" if compiled else "torch",
            device=self.device_name(),
            precision=precision,
            provider=f"torch {torch.__version__} {mode}{', CUDA graph' if cuda_graph else ''})",
        )

    @classmethod
    def open(
        cls,
        checkpoint: str | Path,
        device: str = "cpu",
        precision: str = "fp32",
        threads: int = 0,
        *,
        compiled: bool = False,
        cuda_graph: bool = False,
    ) -> GraphRunner:
        """Of a checkpoint file. Raises UserError as `read_model`, and as the constructor."""
        trained = read_model(checkpoint)
        size, embedding = trained.preprocessing, EmbeddingContract.of(trained.model)
        graph = deployed_graph(trained.model, size, InputContract(), embedding, precision)
        runner = cls(graph, size, torch_device(device), precision, threads, compiled=compiled, cuda_graph=cuda_graph)
        runner._path, runner.method = trained.path, trained.method
        return runner

    def _run(self, images: Tensor) -> Tensor:
        return self._module(images)

    def _through_inductor(self, module: nn.Module) -> Callable[[Tensor], Tensor]:
        """`module`, compiled as a whole when it is called, or UserError: nothing is left to eager mode."""
        if torch._dynamo.config.suppress_errors:
            raise UserError(
                "torch would silently run in eager mode what it cannot compile",
                hint="unset TORCHDYNAMO_SUPPRESS_ERRORS",
            )

        def backend(graph: torch.fx.GraphModule, example: list[Tensor], **options: Any) -> Callable[..., Any]:
            with quiet():
                function = torch._dynamo.lookup_backend("inductor")(graph, example, **options)
            self.compilations += 1
            return function

        def whole(images: Tensor) -> Tensor:
            return module(images)

        # torch keeps what it compiles with the code, up to a limit: each runner gets a copy of the code, else all
        # runners of a process would share that limit
        copy = FunctionType(whole.__code__.replace(), globals(), closure=whole.__closure__)
        function = torch.compile(copy, fullgraph=True, backend=backend)

        def run(images: Tensor) -> Tensor:
            torch._dynamo.maybe_mark_dynamic(images, 0)
            try:
                return function(images)
            except torch._dynamo.exc.TorchDynamoException as error:
                raise build_failed("torch.compile", error) from error

        return run

    def _prove_compiled(self) -> None:
        """A run now, of one image: something must have been compiled for it. Raises UserError."""
        try:
            self._forward(self._to_device(self.blank(1)))
        except RuntimeError:  # newer versions of torch notice it themselves
            if self.compilations:
                raise
        if not self.compilations:
            raise UserError("torch.compile compiled nothing: it is switched off", hint="unset TORCHDYNAMO_DISABLE")


def main_type(module: nn.Module) -> torch.dtype:
    """The type of most weights: the trunk's."""
    counts: Counter[torch.dtype] = Counter()
    for parameter in module.parameters():
        counts[parameter.dtype] += parameter.numel()
    return counts.most_common(1)[0][0]


def build_failed(compiler: str, error: Exception) -> UserError:
    """The error for one of inductor, with what to install if that is a compiler."""
    while isinstance(error, torch._dynamo.exc.BackendCompilerFailed):
        error = error.inner_exception
    reason = ": ".join([type(error).__name__, *str(error).strip().splitlines()[:1]])[:300]
    if "C++ compiler" in reason:
        problem = f"{compiler} needs a C++ compiler and found none ({reason})"
        return BackendUnavailable(problem, hint="install g++, or name one in CXX")
    return UserError(f"{compiler} failed ({reason})")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No output and warnings of compilers and exporters on their internals; their errors still come through."""
    parts = ("torch._dynamo", "torch._inductor", "torch.export", "torch.utils", "torch.onnx", "onnxscript", "onnx_ir")
    loggers = [logging.getLogger(name) for name in parts]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
