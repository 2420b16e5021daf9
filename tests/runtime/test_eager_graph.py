"""The deployed graph in torch, eager and compiled: right in every precision, and never quietly something else."""

import logging
import warnings

import numpy as np
import pytest
import torch

from pmm.artifacts.checkpoint import load, restore_model
from pmm.artifacts.manifest import EmbeddingContract, InputContract
from pmm.data.crops import load_crops
from pmm.data.preprocessing import preprocessing_of
from pmm.data.readers import read_dataset
from pmm.evaluation.parity.numeric import numeric_parity
from pmm.export.options import MIN_COSINE, ExportOptions
from pmm.runtime.deployed_graph import deployed_graph
from pmm.runtime.open import open_runner
from pmm.runtime.torch_graph import GraphRunner, build_failed, main_type
from pmm.utils.errors import BackendUnavailable, UserError
from pmm.utils.hardware import nvidia_gpus
from tests.refusals import refuses
from tests.runtime.small import small_graph

BATCHES = (1, 3, 64, 37, 2, 15, 16)
"""Alone, small, whole, ragged, and on both sides of where torch convolves in another way."""
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def crops(people):
    split = read_dataset("synthetic", people)
    return load_crops([s.path for s in (*split.query, *split.gallery)[:64]], 128, 64)


@pytest.fixture(scope="module")
def expected(trained, crops):
    with open_runner(trained, device="cpu") as reference:
        return reference(crops)


@pytest.fixture
def graph(trained):
    """Call it with a precision, and contract fields if any, for the graph and its preprocessing."""
    model, config = restore_model(load(trained), trained)
    size = preprocessing_of(config)

    def build(precision="fp32", **contract):
        stored = "fp32" if precision == "tf32" else precision
        return deployed_graph(model, size, InputContract(), EmbeddingContract(dim=384, **contract), stored), size

    return build


def opened(pair, precision="fp32", device=CPU, **options):
    return GraphRunner(*pair, device, precision, **options)


def check(runner, crops, expected, precision, batches=BATCHES):
    for batch in batches:
        found = runner(crops[:batch])
        assert found.dtype == np.float32
        assert found.shape == (batch, 384)
        assert numeric_parity(expected[:batch], found).min_cosine > MIN_COSINE[precision], batch


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_eager_in_every_precision(graph, crops, expected, precision):
    with opened(graph(precision), precision) as runner:
        check(runner, crops, expected, precision)
        info = runner.info
    assert (info.backend, info.device, info.precision) == ("torch", "cpu", precision)
    assert info.provider == f"torch {torch.__version__} eager (batch-norm folded, trunk {precision})"


# which torch would otherwise find out by itself, from the second size that it sees
@pytest.mark.parametrize(
    "network", [pytest.param("small", marks=pytest.mark.full), pytest.param("whole", marks=pytest.mark.slow)]
)
@torch._dynamo.config.patch(automatic_dynamic_shapes=False)
def test_compiled_with_few_compilations_for_all_sizes(graph, crops, expected, network):
    pair = graph()
    if network == "small":
        pair = small_graph(pair[1]), pair[1]
        with opened(pair) as eager:
            expected = eager(crops)
    with opened(pair, compiled=True) as runner:
        assert runner.compilations == 1
        check(runner, crops, expected, "fp32")
        assert runner.compilations <= 3
        before = runner.compilations
        steps = [runner.bind(crops[:batch]) for batch in (1, 5, 33)]
        for step in steps:
            step()
        assert runner(crops[:0]).shape == (0, 384)
        assert runner.compilations == before
        info = runner.info
    assert (info.backend, info.device, info.precision) == ("torch-compile", "cpu", "fp32")
    assert info.provider == f"torch {torch.__version__} inductor (batch-norm folded, trunk fp32)"


@pytest.mark.full
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_compiled_in_half_precision(graph, crops, expected, precision):
    with opened(graph(precision), precision, compiled=True) as runner:
        check(runner, crops, expected, precision)
        assert runner.compilations == 2


@pytest.mark.slow
def test_many_compiled_runners_in_one_process(graph, crops, expected):
    """Their code is one; the limit of compilations is for each."""
    runners = [opened(graph(), compiled=True) for _ in range(4)]
    for runner in runners:
        check(runner, crops, expected, "fp32", batches=(1, 8, 64))
        assert runner.compilations == 3


def test_lengths_and_mirror_images_are_the_graphs(graph, crops, expected):
    with opened(graph(normalised=True)) as runner:
        assert runner.embedding.normalised
        found = runner(crops[:5])
        np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-5)
        assert numeric_parity(expected[:5] / np.linalg.norm(expected[:5], axis=1, keepdims=True), found).max_abs < 1e-4


def test_the_trunk_must_be_in_the_precision_asked_for(graph):
    with pytest.raises(ValueError, match=r"trunk.*bfloat16.*fp32"):
        opened(graph("bf16"))
    with pytest.raises(ValueError, match=r"trunk.*float32.*int8"):
        opened(graph(), "int8")
    assert main_type(graph("fp16")[0]) == torch.float16
    large, small = torch.nn.Linear(9, 9).half(), torch.nn.Sequential(*[torch.nn.Linear(2, 2) for _ in range(3)])
    assert main_type(torch.nn.ModuleList([small, large])) == torch.float16


def test_a_cpu_has_neither_tf32_nor_cuda_graphs(graph):
    with refuses(BackendUnavailable, "CPU", "TF32"):
        opened(graph(), "tf32")
    with refuses(BackendUnavailable, "CPU", "CUDA graphs"):
        opened(graph(), cuda_graph=True)


def test_weights_lie_as_the_crops_do(graph):
    with opened(graph()) as runner:
        kernels = [p for p in runner._module.parameters() if p.dim() == 4 and p.shape[1] > 1 and p.shape[2] > 1]
        assert kernels
        assert all(p.is_contiguous(memory_format=torch.channels_last) for p in kernels)


def fails(error):
    def backend(graph, example, **options):
        raise error

    return lambda name: backend


def test_what_cannot_be_compiled_is_one_line_and_never_run_eagerly(graph, monkeypatch):
    before = torch.get_num_threads()
    broken = torch._inductor.exc.InvalidCxxCompiler()
    monkeypatch.setattr(torch._dynamo, "lookup_backend", fails(broken))
    with refuses(BackendUnavailable, "torch.compile", "C++ compiler", hint="install g++"):
        opened(graph(), compiled=True, threads=before + 1)
    assert torch.get_num_threads() == before, "a runner that could not be opened changed the process"
    monkeypatch.setattr(torch._dynamo, "lookup_backend", fails(RuntimeError("no such operator\nand more")))
    with refuses(UserError, "torch.compile", "no such operator"):
        opened(graph(), compiled=True)


def test_a_failure_at_a_later_size_is_one_line_too(graph, crops, monkeypatch):
    monkeypatch.setattr(torch._dynamo, "lookup_backend", lambda name: lambda module, example: module.forward)
    with opened(graph(), compiled=True) as runner:
        monkeypatch.setattr(torch._dynamo, "lookup_backend", fails(RuntimeError("disk full")))
        with refuses(UserError, "torch.compile", "disk full"):
            runner(crops[:3])


@pytest.mark.parametrize(
    ("switch", "name"), [("disable", "TORCHDYNAMO_DISABLE"), ("suppress_errors", "TORCHDYNAMO_SUPPRESS_ERRORS")]
)
def test_switches_that_would_leave_it_eager_are_refused(graph, switch, name):
    with torch._dynamo.config.patch({switch: True}), refuses(UserError, name):
        opened(graph(), compiled=True)


def test_a_graph_break_is_no_way_out(graph, monkeypatch):
    pair = graph()
    forward = type(pair[0]).forward

    def breaking(self, images):
        torch._dynamo.graph_break()
        return forward(self, images)

    monkeypatch.setattr(type(pair[0]), "forward", breaking)
    with refuses(UserError, "torch.compile failed"):
        opened(pair, compiled=True)


def test_compiling_is_quiet(graph, monkeypatch, capfd, caplog):
    logger = logging.getLogger("torch._inductor")

    def chatty(name):
        def backend(module, example, **options):
            print("compiling, if you care to know")
            warnings.warn("an internal", stacklevel=1)
            logging.getLogger("torch.utils.cpp_extension").warning("no CUDA runtime")
            assert logger.level == logging.ERROR
            return module.forward

        return backend

    monkeypatch.setattr(torch._dynamo, "lookup_backend", chatty)
    level = logger.level
    with warnings.catch_warnings(record=True) as warned, opened(graph(), compiled=True):
        pass
    out, err = capfd.readouterr()
    assert out == ""
    assert "CUDA runtime" not in err + caplog.text
    assert "an internal" not in [str(warning.message) for warning in warned]
    assert logger.level == level != logging.ERROR


def test_what_fails_when_it_runs_is_no_failure_of_the_compiler(graph, monkeypatch):
    def run(*args):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(torch._dynamo, "lookup_backend", lambda name: lambda module, example: run)
    with pytest.raises(RuntimeError, match="out of memory"):
        opened(graph(), compiled=True)


def test_the_reason_of_a_failed_build():
    assert str(build_failed("it", RuntimeError())) == "it failed (RuntimeError)"
    inner = torch._inductor.exc.InductorError(OSError("disk full\nand more"), None)
    error = torch._dynamo.exc.BackendCompilerFailed(len, inner, None)
    assert str(build_failed("it", error)) == "it failed (OSError: disk full)"
    assert type(build_failed("it", error)) is UserError


@pytest.mark.gpu
@pytest.mark.parametrize("cuda_graph", [False, True])
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("precision", ["fp32", "tf32", "fp16", "bf16"])
def test_every_way_on_a_gpu(graph, crops, expected, precision, compiled, cuda_graph):
    with opened(graph(precision), precision, torch.device("cuda"), compiled=compiled, cuda_graph=cuda_graph) as runner:
        assert (runner.info.device, runner.info.precision) == (nvidia_gpus()[0].name, precision)
        assert ("CUDA graph" in runner.info.provider) == cuda_graph
        check(runner, crops, expected, precision)
        check(runner, crops, expected, precision)  # replayed, after other sizes
        step = runner.bind(crops[:8])
        assert all(0 < ms < 10_000 for ms in (step.device_ms(), *step.transfers_ms()))
        step.enqueue()
        step.enqueue()
        step.wait()
        assert numeric_parity(expected[:8], step._embeddings.float().cpu().numpy()).min_cosine > MIN_COSINE[precision]


@pytest.mark.parametrize("colour", ["rgb", "bgr"])
@pytest.mark.parametrize(
    "options",
    [
        {"input": "float255"},
        {"input": "float", "input_mean": (0.5, 0.4, 0.3), "input_std": (0.2, 0.3, 0.25)},
    ],
    ids=["float255", "other statistics"],
)
def test_crops_fed_in_other_ways_have_the_same_embeddings(trained, crops, expected, options, colour):
    recipe = ExportOptions(input_colour=colour, **options)
    model, config = restore_model(load(trained), trained)
    size, contract, embedding = preprocessing_of(config), recipe.contract, EmbeddingContract(dim=384)
    fed = recipe.fed(size)
    graph = deployed_graph(model, size, contract, embedding, "fp32", fed)
    images = torch.from_numpy(contract.feed(crops, fed))
    assert images.dtype == torch.float32
    if contract.normalised_by == "graph":
        assert images.max() == crops.max()  # as they are
    with torch.inference_mode():
        assert numeric_parity(expected, graph(images).numpy()).min_cosine >= 0.9999999
