"""The tests of the ops once more, on code that the sanitizers watch: memory, alignment and integer arithmetic."""

import dataclasses
import re
import shutil

import pytest
import torch

from pmm.config import preset
from pmm.kernels import LIBRARY
from pmm.models.registry import build_model
from tests.conftest import ROOT, run_python
from tests.ops.emulated import SANITIZERS, build, under_sanitizers

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not shutil.which("g++"), reason="no C++ compiler here")]
TESTS = [f"tests/ops/test_{op}.py" for op in ("arguments", "hard_mix", "hard_mix_max_pool", "layouts", "mixed_cam")]


def passes(**env):
    """Whether these tests pass where `env` says which kernels they run on."""
    done = under_sanitizers("-m", "pytest", "-p", "no:cacheprovider", *TESTS, **env)
    assert done.returncode == 0, done.stdout[-10_000:] + done.stderr[-10_000:]
    counts = re.search(r"^(\d+) passed", done.stdout, re.MULTILINE)
    return counts is not None and int(counts[1]) > 100


def test_the_cuda_kernels_executed_on_the_cpu(tmp_path):
    assert passes(PMM_TEST_KERNELS=str(build(tmp_path)))


def library(folder, *flags):
    """The package's library, built into `folder` with more flags."""
    folders = ("--build-lib", folder / "lib", "--build-temp", folder / "temp")
    compiler = " ".join(["g++", *flags])
    done = run_python(ROOT / "setup.py", "build_ext", *folders, CXX=compiler, PMM_BUILD_CUDA="0")
    assert done.returncode == 0, done.stderr
    return folder / "lib/pmm/_C.so"


def test_the_cpu_kernels(tmp_path):
    watched = library(tmp_path, *SANITIZERS, "-g", "-fno-omit-frame-pointer")
    assert passes(PMM_TEST_LIBRARY=str(watched), PMM_REQUIRE_EXT="1")


CAMS = """
import hashlib, torch
torch.ops.load_library({library!r})
torch.manual_seed(0)
for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
    for layout in (torch.contiguous_format, torch.channels_last):
        x = torch.randn(4, 700, 13, 9).to(dtype).contiguous(memory_format=layout)
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        cam, replaced = torch.empty(4, 13, 9, dtype=wide), torch.rand(4, 13, 9) < 0.3
        torch.ops.pmm_kernels.mixed_cam(x, replaced, torch.tensor([1, 2, 3, 0]), torch.randn(4, 700, dtype=wide), cam)
        dx = torch.empty_like(x)
        torch.ops.pmm_kernels.adjoint(x, replaced, torch.tensor([1, 0, 0, 0]), dx)
        print(dtype, layout, hashlib.sha256(cam.numpy().tobytes() + dx.double().numpy().tobytes()).hexdigest())
"""


def test_sums_have_the_same_bits_on_every_processor_and_any_number_of_threads(tmp_path):
    """The instruction sets that a processor may lack, down to none of the newer ones; the same tests pass there."""
    plain = library(tmp_path, "-DPMM_CLONES=")
    found = {
        run_python("-c", CAMS.format(library=str(path)), OMP_NUM_THREADS=threads).stdout
        for path, threads in ((plain, "1"), (LIBRARY, "1"), (LIBRARY, "2"), (LIBRARY, "5"))
    }
    assert len(found) == 1
    assert len(found.pop().splitlines()) == 8
    done = run_python("-m", "pytest", "-p", "no:cacheprovider", *TESTS, PMM_TEST_LIBRARY=str(plain))
    assert done.returncode == 0, done.stdout[-10_000:]


def test_inductor_compiles_a_training_step_of_the_model_whole():
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
        compiled_loss, compiled_gradient = step(torch.compile(model, fullgraph=True))
    torch.testing.assert_close(compiled_loss, loss, rtol=1e-4, atol=1e-5)
    assert torch.cosine_similarity(gradient, compiled_gradient, 0) > 0.999
