import sys
from types import SimpleNamespace

import pynvml
import pytest

from pmm.utils import hardware
from pmm.utils.errors import BackendUnavailable, InvalidValue
from tests.conftest import assert_one_line_error, run_here
from tests.refusals import refuses


@pytest.fixture
def fresh_flags():
    hardware.cpu_flags.cache_clear()
    yield
    hardware.cpu_flags.cache_clear()


@pytest.mark.parametrize(
    ("cpuinfo", "overflows", "bf16"),
    [
        ("flags\t\t: fpu sse2 avx2 fma", True, False),
        ("flags\t\t: fpu sse2 avx2 avx512f avx512bw", True, False),
        ("model name\t: x\nflags\t\t: fpu sse2 avx2 avx512_vnni\nbugs\t\t: spectre", False, False),
        ("flags\t\t: sse2 avx_vnni avx512_bf16", False, True),
        ("flags\t\t: sse2 amx_int8 amx_bf16", False, True),
        ("Features\t: fp asimd asimddp bf16", False, False),
        (None, False, False),
    ],
)
def test_what_a_cpu_does_with_int8_and_bf16(tmp_path, monkeypatch, fresh_flags, cpuinfo, overflows, bf16):
    path = tmp_path / "cpuinfo"
    if cpuinfo is not None:
        path.write_text(f"processor\t: 0\n{cpuinfo}\n\nprocessor\t: 1\n{cpuinfo}\n")
    monkeypatch.setattr(hardware, "Path", lambda name: path)
    assert (hardware.int8_overflows(), hardware.cpu_has_bf16()) == (overflows, bf16)


@pytest.fixture
def cores(monkeypatch):
    """Call it with the cores that this process may run on, its quota, and which cores are one in hardware."""

    def pretend(own, quota=None, pairs=None):
        monkeypatch.setattr(hardware, "_allowed_cores", lambda: set(range(own)))
        monkeypatch.setattr(hardware, "_siblings", lambda core: str(core % pairs if pairs else core))
        monkeypatch.setattr(hardware, "cpu_quota", lambda: quota)
        hardware.quota_cores.cache_clear()

    yield pretend
    hardware.quota_cores.cache_clear()


@pytest.mark.parametrize(
    ("own", "quota", "usable"),
    [(8, None, 8), (8, 16.0, 8), (8, 2.0, 2), (8, 1.5, 2), (8, 1.01, 2), (8, 1.0, 1), (8, 0.5, 1), (8, 0.01, 1)],
)
def test_cores_that_may_be_used(cores, own, quota, usable):
    cores(own, quota)
    assert hardware.usable_cores() == usable


@pytest.mark.parametrize(
    ("own", "quota", "pairs", "threads"),
    [(8, None, None, 8), (8, None, 4, 4), (8, 6.0, 4, 4), (8, 3.0, 4, 3), (8, 0.5, 4, 1), (1, None, 4, 1)],
)
def test_a_thread_for_each_core_of_the_hardware_or_as_the_quota_says(cores, own, quota, pairs, threads):
    cores(own, quota, pairs)
    assert hardware.compute_threads() == threads


@pytest.mark.parametrize(
    ("device", "index"), [("auto", None), ("cpu", None), ("cuda", 0), ("cuda:0", 0), ("cuda:1", 1), ("cuda:12", 12)]
)
def test_which_gpu_a_device_names(device, index):
    assert hardware.cuda_index(device) == index


@pytest.mark.parametrize("device", ["", "gpu", "cuda:", "cuda:-1", "cuda:x", "cuda:1 ", "cuda:1.0", "cuda:²", "cpu:0"])
def test_a_word_that_names_no_device(device):
    with refuses(InvalidValue, "device", "auto, cpu, cuda or cuda:N", value=device):
        hardware.cuda_index(device)


@pytest.mark.parametrize(
    "command",
    [
        "pmm embed no.pth no -o no",
        "pmm search no --query no.png",
        "pmm gallery upgrade no --to no.pth",
        "pmm evaluate no.pth --dataset synthetic --root no",
        "pmm visualize no.pth",
        "pmm train",
        "bench.lab.mix_kernels",
        "pmm export aoti no.pth",
    ],
)
def test_each_command_refuses_a_device_that_no_word_names(command):
    """Before it looks at any file."""
    done = run_here("-m", *command.split(), "--device", "gpu:1")
    assert done.returncode == 2
    assert_one_line_error(done, "--device is 'gpu:1'", "cuda:N")


def test_a_package_is_for_one_kind_of_processor():
    done = run_here("export/to_aoti.py", "no.pth", "--device", "auto")
    assert_one_line_error(done, "--device is 'auto'", "cpu, cuda or cuda:N")
    done = run_here("export/to_aoti.py", "no.pth", "--precision", "tf32")
    assert_one_line_error(done, "--precision tf32", "--device is cpu", "--device cuda")


def test_the_gpu_of_an_index_or_which_there_are(monkeypatch):
    two = (hardware.Gpu("NVIDIA T4", "7.5"), hardware.Gpu("NVIDIA L4", "8.9"))
    monkeypatch.setattr(hardware, "nvidia_gpus", lambda: two)
    assert [hardware.gpu_at(0), hardware.gpu_at(1)] == list(two)
    with refuses(BackendUnavailable, "no GPU 2", "2 visible (0 NVIDIA T4, 1 NVIDIA L4)", "CUDA_VISIBLE_DEVICES"):
        hardware.gpu_at(2)
    monkeypatch.setattr(hardware, "nvidia_gpus", tuple)
    with refuses(BackendUnavailable, "no NVIDIA GPU", hint="CUDA_VISIBLE_DEVICES"):
        hardware.gpu_at(0)


@pytest.fixture
def nvml(monkeypatch):
    """Call it with what each GPU answers, pairs of process and bytes or an error: so do nvidia-ml-py's functions, and
    none is asked before nvmlInit or after nvmlShutdown."""
    sessions = []

    def pretend(*gpus, driver="580.65.06", start=None):
        def answer(value):
            assert sessions == ["open"]
            if isinstance(value, Exception):
                raise value
            return value

        def begin():
            if start:
                raise start
            sessions.append("open")

        def processes(index):
            found = answer(gpus[index])
            return [SimpleNamespace(pid=process, usedGpuMemory=memory) for process, memory in found]

        for name, function in {
            "nvmlInit": begin,
            "nvmlShutdown": lambda: sessions.remove("open"),
            "nvmlSystemGetDriverVersion": lambda: answer(driver),
            "nvmlDeviceGetCount": lambda: answer(len(gpus)),
            "nvmlDeviceGetHandleByIndex": answer,
            "nvmlDeviceGetComputeRunningProcesses_v3": processes,
        }.items():
            monkeypatch.setattr(pynvml, name, function)

    yield pretend
    assert not sessions


def test_memory_that_a_process_holds_on_all_gpus(nvml):
    nvml([(1, 100), (2, 2**33)], [], [(2, 5), (3, 7)])
    assert [hardware.gpu_memory_of(process) for process in (1, 2, 3, 4)] == [100, 2**33 + 5, 7, None]
    assert hardware.nvidia_driver() == "580.65.06"


def test_memory_that_a_gpu_does_not_tell_does_not_count(nvml):
    for untold in ([(1, None)], pynvml.NVMLError(pynvml.NVML_ERROR_NO_PERMISSION)):
        nvml(untold, [(1, 100)])
        assert hardware.gpu_memory_of(1) == 100
        nvml(untold)
        assert hardware.gpu_memory_of(1) is None


@pytest.mark.parametrize("error", ["NVML_ERROR_LIBRARY_NOT_FOUND", "NVML_ERROR_DRIVER_NOT_LOADED"])
def test_nothing_is_told_without_a_driver(nvml, error):
    nvml([(1, 100)], start=pynvml.NVMLError(getattr(pynvml, error)))
    assert (hardware.gpu_memory_of(1), hardware.nvidia_driver()) == (None, "")


def test_nothing_is_told_by_an_old_driver_or_without_nvidia_ml_py(nvml, monkeypatch):
    old = pynvml.NVMLError(pynvml.NVML_ERROR_FUNCTION_NOT_FOUND)
    nvml(old, driver=old)
    assert (hardware.gpu_memory_of(1), hardware.nvidia_driver()) == (None, "")
    nvml([(1, 100)])
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert (hardware.gpu_memory_of(1), hardware.nvidia_driver()) == (None, "")
