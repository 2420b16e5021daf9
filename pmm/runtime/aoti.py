"""Packages that torch compiled ahead of time (AOTInductor, .pt2): native code for one kind of processor."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pmm.artifacts.kinds import PACKAGE_SUFFIX
from pmm.artifacts.native_contracts import PackageContract
from pmm.artifacts.native_file import check_origin, read_native
from pmm.runtime.base import RunnerInfo, warn_if_unverified
from pmm.runtime.opened import closed_runner
from pmm.runtime.torch_graph import quiet
from pmm.runtime.torch_runner import TorchRunner
from pmm.runtime.trt_variant import this_platform
from pmm.utils.errors import BackendUnavailable, InvalidFile, reason_of
from pmm.utils.hardware import cuda_index, gpu_at


class AotiRunner(TorchRunner):
    """A package. Any thread may call it; its runs happen one after the other."""

    def __init__(
        self, path: str | Path, device: str = "auto", threads: int = 0, *, cuda_graph: bool = False, warn: bool = True
    ) -> None:
        """Open `path`.

        Nothing of it is loaded before the file was checked and found to be built for this machine.

        Args:
            device: cpu, cuda or cuda:N, which must be the package's, or auto: the package's.
            threads: CPU threads (0: torch's own default).
            cuda_graph: capture the work of each batch size once, and replay it with one launch.
            warn: about embeddings that were never verified.

        Raises:
            InvalidFile: no package of pmm export aoti, a changed one, or one that is not for this machine.
            BackendUnavailable: no GPU here, or no CUDA graph on a CPU.
        """
        file = read_native(path, PackageContract)
        self._path, self.manifest, contract = file.path, file.manifest, file.contract
        target = _package_device(self._path, contract, device)
        check_origin(self._path, contract, this_machine(target), (contract.compute_capability,))
        if warn:
            warn_if_unverified(self._path, self.manifest)
        self.method, precision = self.manifest.method, self.manifest.precision_found
        super().__init__(
            self.manifest.preprocessing, self.manifest.embedding, target, threads,
            tf32=precision == "tf32", cuda_graph=cuda_graph,
        )  # fmt: skip
        try:
            self._package = _load_package(self._path, file.content, target, cuda_graph)
            self._check_interface()
        except BaseException:
            self.close()
            raise
        self.info = RunnerInfo(
            backend="aoti",
            device=self.device_name(),
            precision=precision,
            provider=f"torch {torch.__version__} AOTInductor{' (CUDA graph)' if cuda_graph else ''}",
        )

    def _release(self) -> None:
        self._package = None
        super()._release()

    def _run(self, images: Tensor) -> Tensor:
        if self._package is None:
            raise closed_runner(self._path)
        return self._package(images)

    def _check_interface(self) -> None:
        """A run now: raises InvalidFile unless it returns the embeddings of the manifest."""
        embeddings = self._forward(self._to_device(self.blank(2)))
        returned, declared = (list(embeddings.shape), embeddings.dtype), ([2, self.embedding.dim], torch.float32)
        if returned != declared:
            raise InvalidFile(f"it returns {returned}", path=self._path, expected=f"{declared}, by its manifest")


def this_machine(device: torch.device) -> PackageContract:
    """What a package for `device` is built with here."""
    gpu = gpu_at(device.index or 0) if device.type == "cuda" else None
    instructions = (name for name, present in torch.cpu.get_capabilities().items() if present is True)
    return PackageContract(
        device="cuda" if gpu else "cpu",
        torch=torch.__version__,
        platform=this_platform(),
        instructions=tuple(sorted(instructions)),
        gpu=gpu.name if gpu else "",
        compute_capability=gpu.compute_capability if gpu else "",
        precision_read_from="exported graph",
    )


def _package_device(path: Path, contract: PackageContract, device: str) -> torch.device:
    """The device to run it on, of the kind that it was built for."""
    index = cuda_index(device)
    if device != "auto" and contract.device != ("cpu" if index is None else "cuda"):
        problem = f"built for {contract.device}, and --device is {device}"
        raise InvalidFile(problem, path=path, hint=PackageContract.rebuild)
    if contract.device == "cuda" and not torch.cuda.is_available():
        problem = f"built for {contract.gpu}, and torch sees no usable CUDA GPU"
        raise BackendUnavailable(problem, path=path, hint=PackageContract.rebuild)
    if index is not None:
        gpu_at(index)
    return torch.device(contract.device) if index is None else torch.device(contract.device, index)


def _load_package(path: Path, content: bytes, device: torch.device, cuda_graph: bool) -> Any:
    """The package, from the bytes that were hashed: the file cannot change in between."""
    with tempfile.TemporaryDirectory() as folder, quiet():
        copy = Path(folder) / f"model{PACKAGE_SUFFIX}"
        copy.write_bytes(content)
        try:
            # torch's bookkeeping between threads cannot be captured
            index = -1 if device.index is None else device.index
            return torch._inductor.aoti_load_package(str(copy), run_single_threaded=cuda_graph, device_index=index)
        except RuntimeError as error:
            problem = f"torch cannot load it ({reason_of(error)})"
            raise InvalidFile(problem, path=path, hint=PackageContract.rebuild) from error
