"""The tests of the ops once more, on code that the sanitizers watch: memory, alignment and integer arithmetic."""

import dataclasses
import re
import shutil

import pytest
import torch

from pmm.models.registry import build_model
from pmm.presets import preset
from pmm.utils.build_info import build_info
from tests.conftest import ROOT, run_python
from tests.ops.emulated import SANITIZERS, build, under_sanitizers
from tests.ops.problems import digest_of_sums

needs_compiler = pytest.mark.skipif(not shutil.which("g++"), reason="no C++ compiler here")
TESTS = [f"tests/ops/test_{op}.py" for op in ("arguments", "hard_mix", "hard_mix_max_pool", "layouts", "mixed_cam")]
MORE_EXAMPLES = ("--hypothesis-profile", "slow")
OLD_PROCESSOR = "-DPMM_CLONES="  # as on one that has none of the newer instruction sets


def library(folder, *flags, **env):
    """The package's library, built into `folder` with more flags."""
    folders = ("--build-lib", folder / "lib", "--build-temp", folder / "temp")
    compiler = " ".join(["g++", *flags])
    done = run_python(ROOT / "setup.py", "build_ext", *folders, CXX=compiler, PMM_BUILD_CUDA="0", **env)
    assert done.returncode == 0, done.stderr
    return str(folder / "lib/pmm/_C.so")


def assert_pass(*selection, run=under_sanitizers, **env):
    """These tests pass where `env` says which kernels they run on; those of a library sum to the bits of this one."""
    if "PMM_TEST_LIBRARY" in env:
        assert build_info()["compiled"]
        env.update(PMM_REQUIRE_EXT="1", PMM_TEST_BITS=digest_of_sums("cpu"))
    done = run("-m", "pytest", "-p", "no:cacheprovider", *TESTS, *selection, **env)
    assert done.returncode == 0, done.stdout[-10_000:] + done.stderr[-10_000:]
    counts = re.search(r"\b(\d+) passed", done.stdout)
    assert counts is not None
    assert int(counts[1]) > 100


@needs_compiler
@pytest.mark.slow
def test_the_cpu_kernels_and_that_an_old_processor_gives_the_same_bits(tmp_path):
    """Without the tests of what is in Python alone: arguments, and the ways of torch to trace and to differentiate."""
    watched = library(tmp_path, *SANITIZERS, "-g1", "-fno-omit-frame-pointer", OLD_PROCESSOR, CXXFLAGS="-O1")
    assert_pass("-m", "not full", "-k", "not argument and not check and not compile", PMM_TEST_LIBRARY=watched)


@needs_compiler
@pytest.mark.full
def test_the_cpu_kernels_as_they_are_shipped(tmp_path):
    watched = library(tmp_path, *SANITIZERS, "-g", "-fno-omit-frame-pointer")
    assert_pass(*MORE_EXAMPLES, PMM_TEST_LIBRARY=watched)


@needs_compiler
@pytest.mark.full
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_on_an_old_processor(tmp_path, threads):
    plain = library(tmp_path, OLD_PROCESSOR)
    assert_pass(*MORE_EXAMPLES, run=run_python, PMM_TEST_LIBRARY=plain, OMP_NUM_THREADS=str(threads))


@needs_compiler
@pytest.mark.full
def test_the_cuda_kernels_executed_on_the_cpu(tmp_path):
    assert_pass(*MORE_EXAMPLES, PMM_TEST_KERNELS=str(build(tmp_path)))


COMPILERS = ["aot_eager", pytest.param("inductor", marks=pytest.mark.full)]


@pytest.mark.slow
@pytest.mark.parametrize("backend", COMPILERS)
def test_a_training_step_of_the_model_is_one_graph(backend):
    """The mix inside torch.compile: one graph, the same loss and gradient as without."""
    base = preset("tiny")
    model = build_model(dataclasses.replace(base, model=dataclasses.replace(base.model, num_classes=6))).train()
    images, pids = torch.randn(8, 3, 96, 32), torch.arange(8) // 2
    state = {key: value.clone() for key, value in model.state_dict().items()}

    def step(run):
        model.load_state_dict(state)
        model.zero_grad()
        torch.manual_seed(3)
        output = run(images, pids)
        loss = sum(z.logsumexp(1).mean() for z in output.logits) + sum(f.square().mean() for f in output.features)
        loss.backward()
        return loss.detach(), torch.cat([p.grad.flatten() for p in model.parameters()])

    loss, gradient = step(model)
    with torch._inductor.config.patch(fallback_random=True):  # so that both draw the same partners
        compiled_loss, compiled_gradient = step(torch.compile(model, fullgraph=True, backend=backend))
    torch.testing.assert_close(compiled_loss, loss, rtol=1e-4, atol=1e-5)
    assert torch.cosine_similarity(gradient, compiled_gradient, 0) > 0.999
