"""Checkpoint -> package: proved before it gets its name, kept while it is what would be made, nothing left behind."""

import dataclasses
import json
import shutil
import tempfile

import pytest
import torch

from pmm.artifacts import native_file
from pmm.artifacts.artifact import Artifact, manifest_path, selftest_paths
from pmm.artifacts.checkpoint import load, restore_model
from pmm.artifacts.manifest import EmbeddingContract, InputContract, Manifest
from pmm.artifacts.onnx_file import read_onnx
from pmm.data.preprocessing import preprocessing_of
from pmm.export import aoti as module
from pmm.export import parity_check
from pmm.export.aoti import describe_package, export_aoti, export_aoti_cached, exported_precision
from pmm.export.options import MIN_COSINE, ExportOptions, VerifyOptions
from pmm.export.parity_check import ParityFailed
from pmm.runtime import aoti as runtime
from pmm.runtime import torch_runner
from pmm.runtime.aoti import AotiRunner, this_machine
from pmm.runtime.deployed_graph import TRUNK_TYPES, deployed_graph
from pmm.utils.errors import BackendUnavailable, InvalidFile, InvalidValue
from pmm.utils.files import sha256
from tests.conftest import assert_one_line_error, run_here, run_python
from tests.refusals import refuses
from tests.runtime.small import small_graph

pytestmark = pytest.mark.slow  # a package takes a compiler and ten seconds to make

CPU = torch.device("cpu")


def written(name):
    """The package, its manifest and its selftest."""
    return {name, f"{name}.json", f"{name}.selftest.json", f"{name}.selftest.npz"}


@pytest.fixture(scope="module")
def package(shared):
    """One in fp32 for this CPU; read only."""
    path = shared.package()
    return Artifact(path, Manifest.from_json(manifest_path(path).read_text(), "x"))


@pytest.fixture
def built(package, monkeypatch):
    """Compiling takes half a minute: here it gives the code of `package`. Lists the manifests it was given."""
    asked = []

    def build(program, manifest, out):
        asked.append(manifest)
        shutil.copyfile(package.path, out)

    monkeypatch.setattr(module, "_build", build)
    monkeypatch.setattr(native_file, "_copy_inside", lambda path, content: asked[-1] if asked else package.manifest)
    return asked


@pytest.fixture
def program(trained):
    """Call it with a precision for the exported graph."""
    model, config = restore_model(load(trained), trained)
    size = preprocessing_of(config)

    def build(precision):
        graph = deployed_graph(model, size, InputContract(), EmbeddingContract(dim=384), precision)
        return module._traced(graph, torch.zeros(2, 128, 64, 3, dtype=torch.uint8))

    return build


def test_the_manifest_says_what_is_in_the_file(trained, package):
    manifest = package.manifest
    assert manifest.sha256 == sha256(package.path)
    assert manifest.checkpoint_sha256 == sha256(trained)
    assert (manifest.precision, manifest.precision_found, manifest.precision_share) == ("fp32", "fp32", {"fp32": 1.0})
    assert manifest.package == this_machine(CPU)
    assert manifest.package.precision_read_from == "exported graph"
    assert (manifest.opset, manifest.engine, manifest.quantization) == (0, None, None)
    assert (manifest.preprocessing.height, manifest.preprocessing.width) == (128, 64)
    assert manifest.embedding == EmbeddingContract(dim=384)
    assert manifest.versions["torch"] == torch.__version__
    assert manifest.versions["pmm kernels in training"] == load(trained)["versions"]["pmm kernels"]
    assert manifest.parity["min_cosine"] > 0.99999
    assert manifest.parity["batches"] == [1, 3, 60]
    assert manifest.parity["ran_on"] == f"torch {torch.__version__} AOTInductor"
    inside = native_file._copy_inside(package.path, package.path.read_bytes())
    assert dataclasses.replace(inside, sha256=manifest.sha256, parity=manifest.parity) == manifest


@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=pytest.mark.slow)])
def test_multiplications_are_counted_as_in_the_onnx_file(shared, program, precision):
    found = exported_precision(program(precision))
    file = read_onnx(shared.onnx(ExportOptions(precision=precision))).manifest
    assert found.total == file.macs
    assert found.share == file.precision_share
    assert found.precision == precision


class Products(torch.nn.Module):
    """One of each kind on windows, of which an image of 8 x 8 has four."""

    def __init__(self):
        super().__init__()
        self.conv, self.wider = torch.nn.Conv2d(3, 8, 1), torch.nn.ConvTranspose2d(3, 2, 2, 2)
        self.linear, self.query = torch.nn.Linear(8, 4), torch.nn.Linear(8, 8)

    def forward(self, images):
        windows = self.conv(images).reshape(-1, 4, 16, 2).transpose(1, 2).reshape(-1, 16, 8)
        weights = torch.softmax(windows @ windows.transpose(1, 2), -1)
        windows = torch.bmm(weights, windows)
        windows = torch.nn.functional.scaled_dot_product_attention(self.query(windows), windows, windows)
        windows = torch.einsum("nlc,dc->nld", windows, self.linear.weight)
        sums = torch.addmm(self.linear.bias, windows.reshape(images.shape[0], -1, 4).mean(1), self.linear.weight[:, :4])
        return torch.cat([sums, self.wider(images).mean((2, 3))], 1)


def test_all_products_are_counted_for_one_image():
    for dtype in (torch.float32, torch.bfloat16):
        images = torch.zeros(2, 3, 8, 8, dtype=dtype)
        found = exported_precision(module._traced(Products().to(dtype), images))
        convolutions, attention = 64 * 8 * 3 + 64 * 3 * 2 * 4, 4 * 16 * 16 * 8
        linear = 4 * 16 * 8 * 8 + 4 * 16 * 4 * 8 + 4 * 4
        name = "fp32" if dtype is torch.float32 else "bf16"
        assert found.macs == {name: convolutions + 2 * attention + 2 * attention + linear}


def test_a_product_that_cannot_be_counted_is_refused():
    class Net(torch.nn.Module):
        def forward(self, x):
            return torch.nn.functional.bilinear(x, x, x[None])

    program = torch.export.export(Net(), (torch.zeros(2, 2),))
    with pytest.raises(ValueError, match=r"aten\.bilinear\.default is not counted"):
        exported_precision(program)


def test_what_is_asked_of_inductor(program, package, monkeypatch, tmp_path):
    """Whatever the machine of the export was told: threads are the runner's, and no folder is named by line tables."""
    seen = {}

    def compile_and_package(given, *, package_path, inductor_configs):
        seen.update(inductor_configs)
        assert not package_path.startswith(str(tmp_path)), "half a file where others look for whole ones"
        shutil.copyfile(package.path, package_path)

    monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", compile_and_package)
    module._build(program("fp32"), package.manifest, tmp_path / "m.pt2")
    assert sha256(tmp_path / "m.pt2") == package.manifest.sha256
    assert Manifest.from_json(seen.pop("aot_inductor.metadata")["pmm_manifest"], "x") == package.manifest
    assert seen == {"cpp.dynamic_threads": True, "aot_inductor.enable_line_tables": False}


def test_embeddings_that_moved_leave_no_file(trained, built, tmp_path, monkeypatch):
    run = AotiRunner._run

    def moved(self, images):
        found = run(self, images).clone()
        found[:, ::2] += 5
        return found

    monkeypatch.setattr(AotiRunner, "_run", moved)
    with refuses(ParityFailed, "has cosine 0.", "for fp32", "nothing was written", path=tmp_path / "m.pt2"):
        export_aoti(trained, tmp_path / "m.pt2")
    assert not list(tmp_path.iterdir())


def test_another_precision_than_asked_for_leaves_no_file(trained, built, tmp_path, monkeypatch):
    monkeypatch.setitem(TRUNK_TYPES, "fp16", torch.float32)
    with refuses(InvalidFile, "100.0% fp32", "in fp16", path=tmp_path / "m.pt2"):
        export_aoti(trained, tmp_path / "m.pt2", "fp16")
    assert not built
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_had_is_refused_before_the_work(trained, built, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for precision, device, kind, facts in (
        ("int8", "cpu", InvalidValue, ("precision is 'int8'", "fp32, tf32, fp16 or bf16")),
        ("tf32", "cpu", BackendUnavailable, ("TF32", "CPU")),
        ("fp32", "cuda", BackendUnavailable, ("--device cuda", "torch")),
    ):
        with refuses(kind, *facts):
            export_aoti(trained, tmp_path / "m.pt2", precision, device)
    with refuses(InvalidValue, name="device", value="tpu"):
        export_aoti(trained, tmp_path / "m.pt2", device="tpu")
    state = load(trained)
    state["config"]["data"]["root"] = str(tmp_path / "gone")
    torch.save(state, tmp_path / "moved.pth")
    with refuses(InvalidFile, "to verify", "--verify-root DIR", hint="--no-verify"):
        export_aoti(tmp_path / "moved.pth", tmp_path / "m.pt2")
    assert not built
    assert [path.name for path in tmp_path.iterdir()] == ["moved.pth"]
    (tmp_path / "adopted.onnx").write_bytes(b"")
    with refuses(InvalidFile, path=tmp_path / "adopted.onnx", expected="pmm adopt (.pth)", hint="pmm export trt"):
        export_aoti(tmp_path / "adopted.onnx", tmp_path / "m.pt2")


def test_an_unverified_package_was_at_least_loaded(trained, built, tmp_path, monkeypatch):
    unverified = VerifyOptions(no_verify=True)
    made = export_aoti(trained, tmp_path / "m.pt2", verification=unverified)
    assert made.manifest.parity is None
    assert describe_package(made).endswith("parity NOT verified (--no-verify)")
    monkeypatch.setattr(runtime, "_load_package", lambda *args: lambda images: images)
    with refuses(InvalidFile, path=tmp_path / "other.pt2", expected="by its manifest"):
        export_aoti(trained, tmp_path / "other.pt2", verification=unverified)
    assert {path.name for path in tmp_path.iterdir()} == written("m.pt2")


def test_tf32_is_a_way_to_run_fp32(trained, built, tmp_path, monkeypatch):
    """On a machine that has it: here a CPU takes the part, and computes as ever."""
    monkeypatch.setattr(torch_runner, "check_modes", lambda *args, **modes: None)
    monkeypatch.setattr(torch_runner, "_obeys_tf32_setting", lambda device: True)
    allowed = []
    build, run = module._build, AotiRunner._run
    state = lambda: (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32)  # noqa: E731
    monkeypatch.setattr(module, "_build", lambda *args: allowed.append(state()) or build(*args))
    monkeypatch.setattr(AotiRunner, "_run", lambda self, images: allowed.append(state()) or run(self, images))
    made = export_aoti(trained, tmp_path / "m.pt2", "tf32").manifest
    assert (made.precision, made.precision_found, made.precision_share) == ("tf32", "tf32", {"tf32": 1.0})
    assert made.parity["least_allowed"] == MIN_COSINE["tf32"]
    assert set(allowed) == {(True, True)}
    with AotiRunner(tmp_path / "m.pt2") as runner:
        assert runner.info.precision == "tf32"


def test_a_checkpoint_that_changes_meanwhile_is_noticed(trained, built, tmp_path, monkeypatch):
    checkpoint = tmp_path / "best.pth"
    shutil.copyfile(trained, checkpoint)
    build = module._build

    def slow(program, manifest, out):
        build(program, manifest, out)
        checkpoint.write_bytes(trained.read_bytes() + b"more")

    monkeypatch.setattr(module, "_build", slow)
    with refuses(InvalidFile, "changed", path=checkpoint):
        export_aoti(checkpoint, tmp_path / "m.pt2")
    assert [path.name for path in tmp_path.iterdir()] == ["best.pth"]


def test_a_verified_package_is_used_again_and_only_then(trained, package, built, tmp_path, monkeypatch):
    monkeypatch.setattr(parity_check, "VERIFY_CROPS", 16)
    out = tmp_path / "m.pt2"
    export_aoti(trained, out, verification=VerifyOptions(no_verify=True))
    first = export_aoti_cached(trained, out)
    assert first.manifest.parity is not None
    built.clear()
    kept = export_aoti_cached(trained, out)
    assert kept == first
    assert not built
    selftest_paths(out)[0].unlink()  # as of an earlier version
    export_aoti_cached(trained, out)
    assert len(built) == 1
    built.clear()
    for changes in ({"torch": "9.9"}, {"instructions": ()}, {"gpu": "another"}):
        real = this_machine(CPU)
        with monkeypatch.context() as patch:
            patch.setattr(runtime, "this_machine", lambda place, c=changes, r=real: dataclasses.replace(r, **c))
            export_aoti_cached(trained, out)
        assert len(built) == 1, f"made on a machine with other {changes}, and used again"
        export_aoti_cached(trained, out)
        built.clear()
    out.write_bytes(b"damaged")
    assert export_aoti_cached(trained, out).manifest.sha256 == package.manifest.sha256
    assert built
    for changes in ({"checkpoint_sha256": "0" * 64}, {"precision": "bf16"}, {"versions": {}}, {"parity": None}):
        other = dataclasses.replace(kept.manifest, **changes)
        manifest_path(out).write_text(other.to_json())
        built[:] = [other]  # the copy inside
        export_aoti_cached(trained, out)
        assert len(built) == 2, f"made with other {changes}, and used again"


def test_no_compiler_is_one_line_and_leaves_nothing(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    error = torch._inductor.exc.InductorError(torch._inductor.exc.InvalidCxxCompiler(), None)

    def broken(*args, **options):
        raise error

    monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", broken)
    out = tmp_path / "out" / "m.pt2"
    done = run_here("export/to_aoti.py", trained, "-o", out)
    assert_one_line_error(done, "AOTInductor", "C++ compiler", "install g++", "CXX")
    assert [path.name for path in tmp_path.rglob("*")] == ["out"]


def test_the_command(trained, built, tmp_path):
    checkpoint = tmp_path / "best.pth"
    shutil.copyfile(trained, checkpoint)
    done = run_here("export/to_aoti.py", checkpoint, "--verify-root", load(trained)["config"]["data"]["root"])
    assert done.returncode == 0, done.stderr
    (first,) = done.stdout.splitlines()
    assert first.startswith(f"{tmp_path}/best-cpu.pt2: fp32 (100.00% fp32 of 0.0")
    assert f"torch {torch.__version__} AOTInductor for this kind of CPU" in first
    assert "parity on 64 crops: min cosine " in first
    assert {path.name for path in tmp_path.iterdir()} == {"best.pth", *written("best-cpu.pt2")}
    run_here("export/to_aoti.py", checkpoint, "--precision", "bf16", "--no-verify")
    assert json.loads((tmp_path / "best-cpu-bf16.pt2.json").read_text())["precision_share"]["bf16"] > 0.98
    for args, said in (
        ((checkpoint, "-o", checkpoint), "is the file to read; give another name"),
        ((checkpoint, "-o", tmp_path / "m.onnx"), "expected a name that ends in .pt2"),
        ((checkpoint, "--precision", "int8"), "int8"),
        ((tmp_path / "none.pth",), "none.pth: it does not exist"),
    ):
        assert_one_line_error(run_here("export/to_aoti.py", *args), said)
    checkpoint.write_bytes(trained.read_bytes()[:1000])
    assert_one_line_error(run_here("export/to_aoti.py", checkpoint), "best.pth: truncated, or not a checkpoint")


@pytest.mark.slow
def test_a_real_build_is_quiet_and_leaves_only_the_package(trained, tmp_path):
    out, scratch, cache = (tmp_path / name for name in ("out/m.pt2", "scratch", "cache"))
    scratch.mkdir()
    own = {"TMPDIR": str(scratch), "TORCHINDUCTOR_CACHE_DIR": str(cache)}
    done = run_python("export/to_aoti.py", trained, "-o", out, **own)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 1
    assert done.stderr == ""
    assert {path.name for path in out.parent.iterdir()} == written("m.pt2")
    # headers that torch compiles once for all it will ever build
    left = [path for path in scratch.rglob("*") if path.is_file() and "precompiled_headers" not in path.parts]
    assert not left
    # and what it builds once to see which instructions compiler and CPU have
    sources = list(cache.rglob("*.cpp"))
    assert sources
    assert all("_chk_kernel" in path.read_text() for path in sources)
    probes = {path.stem for path in sources}
    others = [path for path in cache.rglob("*") if path.is_file() and path.suffix != ".lock"]
    assert {path.name.split(".")[0] for path in others} == probes
    assert str(scratch).encode() not in manifest_path(out).read_bytes()


@pytest.mark.slow
def test_what_was_compiled_before_an_export_still_runs(trained, package, tmp_path):
    """The export empties torch's caches in memory."""
    import numpy as np

    from pmm.runtime.torch_graph import GraphRunner

    size, images = package.manifest.preprocessing, np.random.default_rng(0).integers(0, 256, (5, 128, 64, 3), np.uint8)
    with GraphRunner(small_graph(size), size, CPU, compiled=True) as runner:
        with GraphRunner(small_graph(size), size, CPU) as eager:
            many = np.repeat(images, 5, 0)
            expected = eager(many)
        before = runner(images)
        example = torch.zeros(2, 128, 64, 3, dtype=torch.uint8)
        module._build(module._traced(small_graph(size), example), package.manifest, tmp_path / "m.pt2")
        assert np.array_equal(runner(images), before)
        np.testing.assert_allclose(runner(many), expected, rtol=1e-4, atol=1e-4)
