"""The reference in torch, and what all runners of torch share; a stand-in plays the GPU."""

import contextlib
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from pmm.artifacts.checkpoint import load, restore_model
from pmm.artifacts.manifest import EmbeddingContract
from pmm.data.crops import load_crops
from pmm.data.preprocessing import Preprocessing, preprocessing_of
from pmm.data.readers import read_dataset
from pmm.evaluation.parity.numeric import numeric_parity
from pmm.export.options import MIN_COSINE
from pmm.runtime import driver, eager, torch_runner
from pmm.runtime.base import RunnerInfo
from pmm.runtime.cuda_graph import bucket
from pmm.runtime.eager import EagerRunner
from pmm.runtime.open import open_runner
from pmm.runtime.torch_runner import WARM_UPS, CudaBoundRun, TorchRunner, tf32_allowed
from pmm.utils import hardware
from pmm.utils.errors import BackendUnavailable, InvalidInput, InvalidValue, OutOfMemory, UserError
from pmm.utils.hardware import Gpu, nvidia_gpus
from tests.refusals import refuses
from tests.runtime.standin import Libcuda, Stream, World
from tests.runtime.standin import OnGpu as Theirs

SIZE = Preprocessing(height=4, width=2, mean=(0.5, 0.5, 0.5), std=(0.2, 0.2, 0.2))
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def crops(people):
    split = read_dataset("synthetic", people)
    return load_crops([s.path for s in (*split.query, *split.gallery)[:70]], 128, 64)


@pytest.fixture
def tf32_state():
    """What the process allows; torch's own defaults come back afterwards."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    yield lambda: (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32)
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


class Sums(TorchRunner):
    """Embeddings [B, 2]: sum of the pixels, and their mean; remembers the sizes of its runs."""

    def __init__(self, device=CPU, **modes):
        super().__init__(SIZE, EmbeddingContract(dim=2), device, **modes)
        self.runs = []

    def _run(self, images):
        self.runs.append(len(images))
        values = images.double().flatten(1)
        return torch.stack([values.sum(1), values.mean(1)], 1)


def pixels(count, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, 4, 2, 3), np.uint8)


def sums(images):
    flat = images.reshape(len(images), -1).astype(np.float64)
    return np.stack([flat.sum(1), flat.mean(1)], 1).astype(np.float32)


def test_images_of_any_number_and_memory_layout():
    runner = Sums()
    for images in (pixels(1), pixels(7), pixels(9)[::2], pixels(3)[:, :, ::-1]):
        found = runner(images)
        assert found.dtype == np.float32
        assert np.array_equal(found, sums(images))
    read_only = pixels(2)
    read_only.flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.array_equal(runner(read_only), sums(read_only))
    before = len(runner.runs)
    assert runner(pixels(0)).shape == (0, 2)
    assert len(runner.runs) == before
    with refuses(InvalidInput, "bind 0 images", "1 or more"):
        runner.bind(pixels(0))
    with refuses(InvalidInput, "[1, 2, 4, 3]", "expected uint8 [B, 4, 2, 3]"):
        runner.bind(np.zeros((1, 2, 4, 3), np.uint8))


def test_a_step_on_a_cpu_runs_each_time_and_has_no_clock_of_its_own():
    runner = Sums()
    step = runner.bind(pixels(3))
    assert runner.runs == []
    step()
    step.enqueue()
    step.wait()
    assert runner.runs == [3, 3]
    assert step.device_ms() is None
    assert step.transfers_ms() is None


def test_a_step_keeps_its_images():
    runner, images, seen = Sums(), pixels(2), []
    run = runner._run
    runner._run = lambda placed: seen.append(placed.numpy().copy()) or run(placed)
    step = runner.bind(images)
    images[:] = 0
    step()
    assert np.array_equal(seen[0], pixels(2))


def test_threads_are_of_the_whole_process_and_given_back(trained):
    before = torch.get_num_threads()
    for opened in (Sums, lambda threads: open_runner(trained, threads=threads)):
        runner = opened(threads=before + 1)
        assert torch.get_num_threads() == before + 1
        runner.close()
        assert torch.get_num_threads() == before
    Sums().close()
    assert torch.get_num_threads() == before


def test_the_model_is_in_eval_mode(trained, crops):
    model, config = restore_model(load(trained), trained)
    with open_runner(trained) as runner, EagerRunner(model.train(), preprocessing_of(config), CPU) as same:
        assert np.array_equal(runner(crops[:3]), same(crops[:3]))


def test_tf32_is_off_while_it_runs_whatever_the_process_allows(trained, crops, tf32_state, monkeypatch):
    monkeypatch.setattr(torch_runner, "_obeys_tf32_setting", lambda device: True)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    with EagerRunner.open(trained) as runner:
        inside = []
        model = runner.model
        runner.model = lambda images: inside.append((tf32_state(), torch.is_inference_mode_enabled())) or model(images)
        runner(crops[:2])
        runner.bind(crops[:2])()
    assert inside == [((False, False), True)] * 2
    assert tf32_state() == (True, True)
    torch.backends.cuda.matmul.allow_tf32 = False

    def fail():
        assert tf32_state() == (True, True)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), tf32_allowed(True):
        fail()
    assert tf32_state() == (False, True)


def test_threads_that_want_tf32_and_do_not_wait_for_each_other(tf32_state):
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    inside, seen = threading.Event(), []

    def other():
        inside.wait()
        with tf32_allowed(True):
            seen.append(("other", tf32_state()))

    thread = threading.Thread(target=other)
    thread.start()
    with tf32_allowed(False):
        inside.set()
        time.sleep(0.1)  # as long as a launch may take; the other would be in
        seen.append(("mine", tf32_state()))
    thread.join()
    assert seen == [("mine", (False, False)), ("other", (True, True))]
    assert tf32_state() == (True, True)


def test_a_cpu_leaves_the_settings_alone(trained, crops, tf32_state):
    """And its threads side by side."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    with EagerRunner.open(trained) as runner:
        model, inside = runner.model, []
        runner.model = lambda images: inside.append(tf32_state()) or model(images)
        runner(crops[:2])
    assert inside == [(True, True)]


def test_what_a_cpu_has_not_is_refused(trained, monkeypatch):
    before = torch.get_num_threads()
    with refuses(BackendUnavailable, "CPU", "TF32"):
        EagerRunner.open(trained, "cpu", before + 1, tf32=True)
    with refuses(BackendUnavailable, "CPU", "CUDA graphs"):
        Sums(cuda_graph=True)
    assert torch.get_num_threads() == before, "a runner that could not be opened changed the process"
    monkeypatch.setattr(hardware, "nvidia_gpus", lambda: (Gpu("an old GPU", "7.5"), Gpu("a new GPU", "8.0")))
    for device in (torch.device("cuda"), torch.device("cuda", 0)):
        with refuses(BackendUnavailable, "an old GPU", "TF32", hint="fp32"):
            torch_runner.check_modes(device, tf32=True)
    torch_runner.check_modes(torch.device("cuda"), cuda_graph=True)
    torch_runner.check_modes(torch.device("cuda", 1), tf32=True)


def test_devices_are_resolved_or_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert eager.torch_device("auto") == eager.torch_device("cpu") == CPU
    with refuses(BackendUnavailable, "--device cuda:", "torch", hint="--device cpu"):
        eager.torch_device("cuda")
    with refuses(BackendUnavailable, "--device cuda:1:", "torch", hint="--device cpu"):
        eager.torch_device("cuda:1")
    with refuses(InvalidValue, value="gpu", expected="auto, cpu, cuda"):
        eager.torch_device("gpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert eager.torch_device("auto") == eager.torch_device("cuda") == torch.device("cuda")
    monkeypatch.setattr(hardware, "nvidia_gpus", lambda: (Gpu("one", "8.0"), Gpu("two", "9.0")))
    assert eager.torch_device("cuda:1") == torch.device("cuda", 1)
    with refuses(BackendUnavailable, "GPU 2", "0 one, 1 two"):
        eager.torch_device("cuda:2")


class Gpus:
    """torch.cuda as the runners use it, on the CPU: a capture records what the runner's `_run` wrote where.

    The CPU plays the GPU that was chosen, and the process's own is another, as after `--device cuda:1`: torch then
    takes that other one for whatever is not told (torch/cuda/graphs.py: the stream of a capture, and what `graph` waits
    for; torch/cuda/streams.py: the stream that an event is recorded on).
    """

    def __init__(self, monkeypatch):
        self.clock, self.synchronized, self.launches, self.captures = 0.0, 0, 0, 0
        self.recording, self.current = None, "another GPU"
        fake = self

        class Stream:
            cuda_stream = 7

            def __init__(self, device=None):
                self.device = device or fake.current

            def synchronize(self):
                fake.synchronized += 1

            def wait_stream(self, other):
                pass

        class Event:
            def __init__(self, enable_timing=False):
                assert enable_timing

            def record(self, stream=None):
                assert (stream or Stream()).device == CPU, "recorded on another GPU, idle as it is"
                self.at = fake.clock

            def synchronize(self):
                fake.synchronized += 1

            def elapsed_time(self, end):
                return end.at - self.at

        class CUDAGraph:
            def replay(self):
                assert fake.recording is None
                fake.launches += 1
                with torch.inference_mode():
                    for write in self.writes:
                        write()

        @contextlib.contextmanager
        def device(chosen):
            before, fake.current = fake.current, chosen
            yield
            fake.current = before

        @contextlib.contextmanager
        def graph(captured, stream=None):
            assert (stream or Stream("the first one")).device == fake.current == CPU
            fake.captures += 1
            fake.recording = captured.writes = []
            try:
                yield
            finally:
                fake.recording = None

        for name, value in {
            "Stream": Stream,
            "Event": Event,
            "CUDAGraph": CUDAGraph,
            "graph": graph,
            "stream": lambda stream: contextlib.nullcontext(),
            "device": device,
            "current_device": lambda: 0,
            "current_stream": Stream,
            "synchronize": lambda device=None: setattr(fake, "synchronized", fake.synchronized + 1),
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)
        monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor.clone())
        monkeypatch.setattr(torch_runner, "check_modes", lambda *args, **modes: None)


class OnGpu(Sums):
    """Its images and its runs are on the CPU, but it thinks otherwise."""

    def __init__(self, gpus, **modes):
        super().__init__(torch.device("cuda"), **modes)
        self.gpus = gpus

    def _to_device(self, images):
        return torch.from_numpy(np.ascontiguousarray(images)).clone()

    def _run(self, images):
        found = super()._run(images)
        if self.gpus.recording is not None:
            written = found
            found = torch.full_like(written, torch.nan)  # nothing is run while it is captured
            self.gpus.recording.append(lambda: found.copy_(Sums._run(self, images)))
        return found


@pytest.fixture
def gpus(monkeypatch):
    return Gpus(monkeypatch)


def test_a_graph_is_captured_per_bucket_and_replayed_on_new_images(gpus):
    runner = OnGpu(gpus, cuda_graph=True)
    given = [pixels(count, seed) for seed, count in enumerate((3, 4, 5, 3))]
    found = [runner(images) for images in given]
    for images, embeddings in zip(given, found, strict=True):
        assert np.array_equal(embeddings, sums(images))
    assert (gpus.captures, gpus.launches) == (2, 4)
    # warmed up, captured, replayed; and the size that is known only replayed
    assert runner.runs == [4] * (WARM_UPS + 2) + [4] + [8] * (WARM_UPS + 2) + [4]
    assert runner(pixels(0)).shape == (0, 2)
    runner.close()
    assert not runner._captured, "graphs were kept after `close`"


def test_graphs_of_the_least_recently_used_sizes_are_dropped(gpus, monkeypatch):
    monkeypatch.setattr(torch_runner, "GRAPHS_KEPT", 2)
    runner = OnGpu(gpus, cuda_graph=True)
    for count in (1, 2, 1, 3, 1):  # as 1, 2, 1, 4, 1
        assert np.array_equal(runner(pixels(count)), sums(pixels(count)))
    assert gpus.captures == 3
    runner(pixels(2))
    assert gpus.captures == 4


def test_batches_of_any_size_are_few_captures(gpus):
    """A tracker's: 1 to 40 crops at random, for ever."""
    runner = OnGpu(gpus, cuda_graph=True)
    sizes = np.random.default_rng(0).integers(1, 41, 1000).tolist()
    for seed, count in enumerate(sizes):
        images = pixels(count, seed)
        assert np.array_equal(runner(images), sums(images))
    assert gpus.captures == len({bucket(count, 999) for count in range(1, 41)}) == 9
    step = runner.bind(pixels(5))
    assert step._embeddings.shape == (5, 2), "a step is timed at its own size"


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 8 GiB"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
)
@pytest.mark.parametrize("cuda_graph", [False, True])
def test_a_batch_too_large_for_the_gpu_is_one_line(gpus, error, cuda_graph):
    runner = OnGpu(gpus, cuda_graph=cuda_graph)

    def full(images):
        raise error

    runner._run = full
    with refuses(OutOfMemory, "7 images", "(CUDA ", hint="--batch-size"):
        runner(pixels(7))
    error = ValueError("something else")
    with pytest.raises(ValueError, match="something else"):
        runner(pixels(7))


class CudaTensor(torch.Tensor):
    """One of torch's, on its first GPU."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # what is made of it is a plain tensor
    device = torch.device("cuda", 0)

    def __dlpack_device__(self):
        return 2, 0


@pytest.fixture
def world(gpus, monkeypatch):
    """Where arrays of others come complete with a stream, ours being number 7."""
    world = World()
    cuda = Libcuda(world)
    monkeypatch.setattr(driver, "cuda_library", lambda: cuda)
    world.streams[7] = Stream()

    def shared(array):
        world.streams[7].run()  # what our stream does comes after
        host = type("Host", (), {"__array_interface__": {**array.__cuda_array_interface__, "version": 3}})()
        return torch.from_numpy(np.array(host))

    monkeypatch.setattr(torch_runner, "_shared", shared)
    return world


@pytest.mark.parametrize("cuda_graph", [False, True])
@pytest.mark.parametrize("kind", ["torch", "dlpack", "interface"])
def test_images_that_are_on_the_gpu_stay_there(gpus, world, kind, cuda_graph):
    runner = OnGpu(gpus, cuda_graph=cuda_graph)
    runner._to_device = lambda images: pytest.fail("a way through the host")
    for count in (3, 5, 4):
        images = pixels(count, count)
        given = torch.from_numpy(images).as_subclass(CudaTensor) if kind == "torch" else Theirs(world, images, kind)
        assert np.array_equal(runner(given), sums(images))
        waits = gpus.synchronized
        there = runner.embed_on_gpu(given)
        assert (there.shape, there.dtype, there.device) == ((count, 2), np.float32, 0)
        assert gpus.synchronized > waits, "not complete"
        assert np.array_equal(there.owner.numpy(), sums(images))
    none = torch.from_numpy(pixels(0)).as_subclass(CudaTensor)
    assert runner(none).shape == runner.embed_on_gpu(none).shape == (0, 2)


def test_images_on_a_gpu_that_cannot_be_taken(gpus, world):
    runner, images = OnGpu(gpus), pixels(2)
    for content, index, facts in (
        (images, 1, ("cuda:1", "cuda:0", "device=")),
        (images.astype(np.float32), 0, ("torch.float32", "expected uint8 [B, H, W, 3]")),
        (images[:, :2], 0, ("[2, 2, 2, 3]", "expected uint8 [B, 4, 2, 3]")),
    ):
        with refuses(InvalidInput, *facts):
            runner(Theirs(world, np.ascontiguousarray(content), "dlpack", index))
    cpu = Sums()
    cpu.info = RunnerInfo(backend="torch", device="cpu", precision="fp32", provider="torch")
    with refuses(InvalidInput, "on a GPU", "runs on cpu", hint=".cpu().numpy()"):
        cpu(Theirs(world, images, "dlpack"))
    with refuses(UserError, "torch leaves no embeddings on a GPU", "runs on cpu"):
        cpu.embed_on_gpu(images)


def test_threads_share_a_graph_but_not_their_embeddings(gpus):
    runner = OnGpu(gpus, cuda_graph=True)
    barrier = threading.Barrier(4)

    def call(seed):
        barrier.wait()
        return [np.array_equal(runner(pixels(2, seed + k)), sums(pixels(2, seed + k))) for k in range(50)]

    with ThreadPoolExecutor(4) as pool:
        assert all(all(right) for right in pool.map(call, range(0, 400, 100)))
    assert gpus.captures == 1


@pytest.mark.parametrize("cuda_graph", [False, True])
def test_a_step_on_a_gpu_launches_waits_and_is_timed_apart(gpus, cuda_graph):
    runner = OnGpu(gpus, cuda_graph=cuda_graph)
    step = runner.bind(pixels(3))
    assert isinstance(step, CudaBoundRun)
    runs, waits, launches = len(runner.runs), gpus.synchronized, gpus.launches
    step.enqueue()
    assert (len(runner.runs), gpus.synchronized, gpus.launches) == (runs + 1, waits, launches + cuda_graph)
    step.wait()
    assert gpus.synchronized == waits + 1
    step()
    assert (len(runner.runs), gpus.synchronized) == (runs + 2, waits + 2)
    step.transfers_ms()
    assert np.array_equal(step._host_embeddings.float().numpy(), sums(pixels(3)))


def test_the_times_of_a_step_are_of_the_run_and_of_each_copy(gpus):
    placed, out = torch.from_numpy(pixels(2)), torch.ones(2, 5)
    busy = {"run": 4.0, "upload": 2.0, "download": 1.0}

    def launch():
        gpus.clock += busy["run"]
        return out

    step = CudaBoundRun(launch, placed)
    waits = gpus.synchronized
    assert step.device_ms() == 4.0
    assert gpus.synchronized == waits + 2, "from an idle GPU, and once at the end"
    before = placed.clone()
    copy = torch.Tensor.copy_

    def copied(target, source, non_blocking=False):
        assert non_blocking
        gpus.clock += busy["upload" if target is placed else "download"]
        return copy(target, source)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "copy_", copied)
        assert step.transfers_ms() == (2.0, 1.0)
    assert torch.equal(placed, before)
    assert torch.equal(step._host_embeddings, out)


def synchronised(step):
    ms = step.device_ms()
    upload, download = step.transfers_ms()
    step.enqueue()
    step.enqueue()
    step.wait()
    step()
    return ms, upload, download


@pytest.mark.gpu
def test_the_reference_on_a_gpu_is_the_reference(trained, crops, tf32_state):
    with open_runner(trained, device="cpu") as reference, EagerRunner.open(trained, "cuda") as runner:
        assert (runner.info.device, runner.info.precision) == (nvidia_gpus()[0].name, "fp32")
        assert numeric_parity(reference(crops), runner(crops)).min_cosine > MIN_COSINE["fp32"]
        there = torch.from_numpy(crops).cuda()
        assert np.array_equal(runner(there), runner(crops))
        assert np.array_equal(torch.as_tensor(runner.embed_on_gpu(there)).cpu().numpy(), runner(crops))
        assert all(0 < ms < 10_000 for ms in synchronised(runner.bind(crops[:8])))
    with EagerRunner.open(trained, "cuda", tf32=True) as runner, open_runner(trained, device="cuda") as exact:
        assert runner.info.precision == "tf32"
        expected, found = exact(crops), runner(crops)
        assert numeric_parity(expected, found).min_cosine > MIN_COSINE["tf32"]
        assert not np.array_equal(expected, found), "TF32 was allowed, and nothing ran in it"
