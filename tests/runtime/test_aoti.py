"""Packages: right at every batch size, refused before anything of them is loaded, and run on any thread."""

import dataclasses
import json
import logging
import shutil
import zipfile
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from pmm.artifacts.artifact import manifest_path
from pmm.artifacts.native_file import NativeFile
from pmm.data.crops import load_crops
from pmm.data.readers import read_dataset
from pmm.evaluation.parity.numeric import numeric_parity
from pmm.export.aoti import export_aoti
from pmm.export.options import MIN_COSINE, VerifyOptions
from pmm.runtime import aoti
from pmm.runtime.aoti import AotiRunner, this_machine
from pmm.runtime.open import open_runner
from pmm.utils import hardware
from pmm.utils.errors import BackendUnavailable, InvalidFile, InvalidInput, InvalidValue, UserError
from pmm.utils.files import sha256
from pmm.utils.hardware import nvidia_gpus
from tests.conftest import assert_one_line_error, run_here, run_python, run_without_torch
from tests.refusals import refuses

pytestmark = pytest.mark.slow  # a package takes a compiler and ten seconds to make

BATCHES = (1, 3, 64, 37, 2, 15, 16)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def package(shared):
    """One in fp32 for this CPU; read only."""
    return shared.package()


@pytest.fixture(scope="module")
def crops(people):
    split = read_dataset("synthetic", people)
    return load_crops([s.path for s in (*split.query, *split.gallery)[:64]], 128, 64)


@pytest.fixture(scope="module")
def expected(trained, crops):
    with open_runner(trained, device="cpu") as reference:
        return reference(crops)


@pytest.fixture
def copy(package, tmp_path):
    """The package and its manifest, to be damaged."""
    for path in (package, manifest_path(package)):
        shutil.copyfile(path, tmp_path / path.name)
    return tmp_path / package.name


@pytest.fixture
def unloaded(monkeypatch):
    """Nothing of the file may be loaded."""
    monkeypatch.setattr(torch._inductor, "aoti_load_package", lambda *args, **options: pytest.fail("it was loaded"))


def check(runner, crops, expected, precision):
    for batch in BATCHES:
        found = runner(crops[:batch])
        assert found.dtype == np.float32
        assert numeric_parity(expected[:batch], found).min_cosine > MIN_COSINE[precision], batch


def edit(file, /, **changes):
    """The manifest beside the file, with other values."""
    path = manifest_path(file)
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_it_gives_the_checkpoints_embeddings_at_every_batch_size(package, crops, expected):
    with open_runner(package) as runner:
        assert isinstance(runner, AotiRunner)
        check(runner, crops, expected, "fp32")
        assert runner(crops[:0]).shape == (0, 384)
        info = runner.info
    assert (info.backend, info.device, info.precision) == ("aoti", "cpu", "fp32")
    assert info.provider == f"torch {torch.__version__} AOTInductor"


@pytest.mark.parametrize(
    "precision", [pytest.param("fp16", marks=pytest.mark.full), pytest.param("bf16", marks=pytest.mark.slow)]
)
def test_half_precision(shared, crops, expected, precision):
    with open_runner(shared.package(precision), device="cpu") as runner:
        assert runner.info.precision == precision
        check(runner, crops, expected, precision)
        assert numeric_parity(expected, runner(crops)).min_cosine < 1 - 1e-8, "fp32 in disguise"


def test_steps_run_and_do_not_change_the_answer(package, crops):
    with open_runner(package) as runner:
        before = runner(crops)
        step = runner.bind(crops[:4])
        step()
        step.enqueue()
        step.wait()
        assert np.array_equal(runner(crops), before)
        with refuses(InvalidInput, expected="uint8 [B, 128, 64, 3]"):
            runner(crops[:, ::2])
        with refuses(InvalidInput, "float32"):
            runner.bind(crops.astype(np.float32))


def test_any_thread_may_call_it(package, crops):
    with open_runner(package) as runner, ThreadPoolExecutor(4) as pool:
        alone = [runner(crops[k : k + 3]) for k in range(12)]
        found = list(pool.map(lambda k: runner(crops[k : k + 3]), range(12)))
    assert all(np.array_equal(a, b) for a, b in zip(alone, found, strict=True))


def test_threads_are_used_and_given_back(package, crops):
    before = torch.get_num_threads()
    with open_runner(package, threads=before + 1) as runner:
        assert torch.get_num_threads() == before + 1
        runner(crops[:2])
    assert torch.get_num_threads() == before
    code = "".join(
        archive.read(name).decode()
        for archive in [zipfile.ZipFile(package)]
        for name in archive.namelist()
        if name.endswith(".cpp")
    )
    assert "omp parallel" in code
    assert "num_threads(" not in code.replace("omp_get_num_threads(", ""), "as many threads as there were at the export"


def test_a_closed_runner_says_so(package, crops):
    runner = open_runner(package)
    step = runner.bind(crops[:1])
    runner.close()
    runner.close()
    for run in (step, lambda: runner(crops[:1])):
        with refuses(UserError, "closed", hint="open"):
            run()


def test_a_changed_byte_is_refused_before_anything_is_loaded(copy, unloaded):
    content = bytearray(copy.read_bytes())
    content[len(content) // 2] ^= 1
    copy.write_bytes(content)
    with refuses(InvalidFile, "sha256", path=copy):
        open_runner(copy)


def test_a_package_without_its_manifest_is_refused(copy, unloaded):
    edit(copy, package=None)
    with refuses(InvalidFile, "manifest", "without the section 'package'", path=copy):
        open_runner(copy)
    manifest_path(copy).unlink()
    with refuses(InvalidFile, "model.pt2.json", "executable code", path=copy):
        open_runner(copy)
    with refuses(InvalidFile, "not exist", path=copy.with_name("gone.pt2")):
        open_runner(copy.with_name("gone.pt2"))


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("preprocessing", "height", 256),
        ("embedding", "dim", 3),
        ("package", "torch", "2.0"),
        ("input", "colour", "bgr"),
    ],
)
def test_a_manifest_that_was_edited_is_found_out(copy, unloaded, name, key, value):
    was = json.loads(manifest_path(copy).read_text())[name]
    edit(copy, **{name: {**was, key: value}})
    with refuses(InvalidFile, f"{name} ", "changed", path=copy):
        open_runner(copy)


def test_files_that_are_no_packages_of_ours_are_refused(copy, unloaded):
    manifest = json.loads(manifest_path(copy).read_text())
    for content in (b"no archive", b""):
        copy.write_bytes(content)
        manifest_path(copy).write_text(json.dumps({**manifest, "sha256": sha256(copy)}))
        with refuses(InvalidFile, "truncated", path=copy, hint="pmm export aoti"):
            open_runner(copy)
    for entries in ({}, {"model/x.wrapper_metadata.json": "{}"}, {"model/x.wrapper_metadata.json": "{"}):
        with zipfile.ZipFile(copy, "w") as archive:
            for name, text in entries.items():
                archive.writestr(name, text)
        manifest_path(copy).write_text(json.dumps({**manifest, "sha256": sha256(copy)}))
        with refuses(InvalidFile, "no manifest", path=copy):
            open_runner(copy)


@pytest.mark.parametrize(
    ("here", "facts"),
    [
        ({"torch": "9.9"}, ("torch is 9.9", "built with 2.")),
        ({"platform": "linux-riscv64"}, ("this is linux-riscv64", "built for linux-")),
        ({"instructions": ("sse2",)}, ("this CPU has no ",)),
    ],
)
def test_a_package_for_another_machine_is_refused(package, unloaded, monkeypatch, here, facts):
    real = this_machine(CPU)
    monkeypatch.setattr(aoti, "this_machine", lambda device: dataclasses.replace(real, **here))
    with refuses(InvalidFile, *facts, path=package, hint="pmm export aoti"):
        open_runner(package)


def test_this_machine_is_described_as_it_is():
    here = this_machine(CPU)
    assert (here.device, here.torch, here.gpu, here.compute_capability) == ("cpu", torch.__version__, "", "")
    assert here.instructions == tuple(sorted(here.instructions))
    assert {name for name, value in torch.cpu.get_capabilities().items() if value is True} == set(here.instructions)


def test_devices_are_the_packages_or_refused(package, unloaded, monkeypatch):
    for device in ("cuda", "cuda:1"):
        with refuses(InvalidFile, "built for cpu", f"--device is {device}", path=package, hint="pmm export aoti"):
            open_runner(package, device=device)
    with refuses(InvalidValue, value="gpu", expected="auto, cpu, cuda"):
        open_runner(package, device="gpu")
    with refuses(BackendUnavailable, "CPU", "CUDA graphs"):
        AotiRunner(package, cuda_graph=True)
    contract = dataclasses.replace(this_machine(CPU), device="cuda", gpu="a GPU", compute_capability="9.0")
    monkeypatch.setattr(aoti, "read_native", lambda path, kind: NativeFile(package, b"", None, contract))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with refuses(BackendUnavailable, "built for a GPU", "no usable CUDA GPU", path=package):
        open_runner(package)
    with refuses(InvalidFile, "built for cuda", "--device is cpu", path=package):
        open_runner(package, device="cpu")


def test_a_package_is_loaded_on_the_gpu_that_was_chosen(package, monkeypatch):
    """`device_index` as torch/_inductor/__init__.py has it: -1 is the process's own."""
    here = [hardware.Gpu("NVIDIA One", "8.0"), hardware.Gpu("NVIDIA Two", "9.0")]
    monkeypatch.setattr(hardware, "nvidia_gpus", lambda: tuple(here))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    contract = this_machine(torch.device("cuda", 1))
    assert (contract.device, contract.gpu, contract.compute_capability) == ("cuda", "NVIDIA Two", "9.0")
    assert this_machine(torch.device("cuda")).gpu == "NVIDIA One"
    asked = []
    monkeypatch.setattr(torch._inductor, "aoti_load_package", lambda path, **options: asked.append(options))
    for device in ("auto", "cuda", "cuda:1"):
        place = aoti._package_device(package, contract, device)
        aoti._load_package(package, b"", place, cuda_graph=False)
    assert [options["device_index"] for options in asked] == [-1, 0, 1]
    with refuses(BackendUnavailable, "GPU 2"):
        aoti._package_device(package, contract, "cuda:2")


@pytest.mark.parametrize(
    "returned", [torch.zeros(2, 3), torch.zeros(2, 384, dtype=torch.float64), torch.zeros(1, 384)], ids=str
)
def test_what_it_returns_must_be_what_was_promised(package, monkeypatch, returned):
    before = torch.get_num_threads()
    monkeypatch.setattr(aoti, "_load_package", lambda *args: lambda images: returned)
    with refuses(InvalidFile, str(returned.dtype), path=package, expected="([2, 384], torch.float32)"):
        open_runner(package, threads=before + 1)
    assert torch.get_num_threads() == before


def test_what_torch_cannot_load_is_one_line(package, monkeypatch):
    def broken(*args, **options):
        raise RuntimeError("cannot open shared object\nand more")

    monkeypatch.setattr(torch._inductor, "aoti_load_package", broken)
    with refuses(InvalidFile, "(cannot open shared object)", path=package, hint="pmm export aoti"):
        open_runner(package)


def test_what_is_loaded_is_what_was_hashed(package, copy, monkeypatch):
    """Changed after the check: the bytes that were checked are run."""
    real = torch._inductor.aoti_load_package

    def load(path, **options):
        assert sha256(path) == sha256(package)
        return real(path, **options)

    monkeypatch.setattr(aoti, "check_origin", lambda *args: copy.write_bytes(b"another package"))
    monkeypatch.setattr(torch._inductor, "aoti_load_package", load)
    with open_runner(copy):
        pass


def test_an_unverified_package_is_said_to_be_one(copy, caplog):
    with caplog.at_level(logging.WARNING, "pmm"):
        open_runner(copy).close()
        assert "verified" not in caplog.text
        edit(copy, parity=None)
        AotiRunner(copy, warn=False).close()
        assert "verified" not in caplog.text
        open_runner(copy).close()
    assert "model.pt2: its embeddings were never verified against the checkpoint" in caplog.text


def test_running_it_needs_no_compiler_and_leaves_nothing_behind(package, tmp_path):
    script = (
        "import sys; import numpy as np; from pmm.runtime.open import open_runner\n"
        "with open_runner(sys.argv[1]) as runner:\n"
        "    print(runner(np.zeros((3, 128, 64, 3), np.uint8)).shape)"
    )
    cache = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache"), "TMPDIR": str(tmp_path)}
    done = run_python("-c", script, package, CXX="no-such-compiler", **cache)
    assert done.stdout.strip() == "(3, 384)", done.stderr
    assert done.stderr == ""
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_it_is_described_without_torch_and_never_loaded(package, copy):
    done = run_without_torch("-m", "pmm", "info", package, "--json")
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)["file"]
    assert (facts["kind"], facts["written_by_pmm"]) == ("AOTInductor package", True)
    assert facts["manifest"]["package"]["torch"] == torch.__version__
    assert facts["manifest"]["parity"]["min_cosine"] > 0.99999
    copy.write_bytes(b"changed")
    assert_one_line_error(run_here("-m", "pmm", "info", copy), "the file was changed or replaced")
    manifest_path(copy).unlink()
    done = run_here("-m", "pmm", "info", copy, "--json")
    assert json.loads(done.stdout)["file"]["written_by_pmm"] is False
    assert_one_line_error(run_here("-m", "pmm", "info", copy.with_name("none.pt2")), "none.pt2: it does not exist")
    copy.write_bytes(b"")
    assert_one_line_error(run_here("-m", "pmm", "info", copy), "model.pt2: it is empty")


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "tf32", "fp16", "bf16"])
def test_a_package_on_a_gpu(trained, crops, expected, tmp_path, precision):
    artifact = export_aoti(trained, tmp_path / "model.pt2", precision, "cuda", VerifyOptions())
    assert artifact.manifest.package.gpu == nvidia_gpus()[0].name
    for cuda_graph in (False, True):
        with AotiRunner(artifact.path, "cuda", cuda_graph=cuda_graph) as runner:
            assert (runner.info.device, runner.info.precision) == (nvidia_gpus()[0].name, precision)
            check(runner, crops, expected, precision)
            step = runner.bind(crops[:8])
            assert all(0 < ms < 10_000 for ms in (step.device_ms(), *step.transfers_ms()))
            found = step._embeddings.float().cpu().numpy()
            assert numeric_parity(expected[:8], found).min_cosine > MIN_COSINE[precision]
    with refuses(InvalidFile, "built for cuda", "--device is cpu", path=artifact.path):
        open_runner(artifact.path, device="cpu")
