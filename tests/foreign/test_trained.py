"""Trained networks of other toolkits through the bench with all its gates, int8 for CPUs and TensorRT included.

Two are trained for a few minutes on drawn people, one by torchreid's own engine; one comes with ImageNet's weights and
judges real pedestrians.
"""

import json
import shlex

import pytest

from pmm.artifacts.onnx_file import read_onnx
from pmm.data.synthetic.dataset import draw_people
from pmm.export.onnx import export_onnx
from pmm.export.options import EngineOptions, ExportOptions
from pmm.export.trt import engine_from_onnx
from pmm.utils.hardware import nvidia_gpus
from tests.conftest import run_here
from tests.foreign.conftest import CLIENTS, FOLDER, VIDEO, adopt, run_there
from tests.foreign.networks import EMBEDDER, EMBEDDER_WEIGHTS, TRAINED

pytestmark = pytest.mark.full
SECONDS = 280
"""Of training."""
TRAINERS = {"osnet_x1_0": ("train_torchreid.py", "net.pth.tar"), "vit_tiny": ("train_timm.py", "net.pth")}


@pytest.fixture(scope="session")
def drawn(store):
    """Sixty people to train on, and sixty others to judge by."""
    return store.get("drawn", lambda home: draw_people(home / "data", ids=60, seed=0)) / "data"


@pytest.fixture(scope="session")
def real(store):
    """Real pedestrians, numbered by a tracker."""

    def make(folder):
        assert VIDEO.exists(), f"{VIDEO} is missing: make clients"
        run_there(None, FOLDER / "real_people.py", VIDEO, folder / "data")

    return store.get("real people", make) / "data"


@pytest.fixture(scope="session", params=["osnet_x1_0", "vit_tiny", "embedder"])
def trained(request, store, drawn):
    """The name and the file of a trained network, which knows the data set that it is calibrated on."""
    name, data = request.param, ("--dataset", "market1501", "--root", drawn)

    def make(folder):
        if name == "embedder":
            (weights,) = (CLIENTS / "foreign").glob(f"lib/python*/site-packages/{EMBEDDER_WEIGHTS}")
            adopt(EMBEDDER, folder / "net.pth", "--weights", weights, "--no-antialias", *data)
            return
        script, file = TRAINERS[name]
        run_there(None, FOLDER / script, drawn, folder / file, SECONDS)
        adopt(TRAINED[name], folder / "adopted.pth", "--weights", folder / file, *data)

    folder = store.get(f"trained-{name}", make)
    return name, folder / ("net.pth" if name == "embedder" else "adopted.pth")


def bench(name, file, out, request, *options):
    """The results of the bench by their names, the gates that failed, and what it printed."""
    data = ("--dataset", "folder", "--root", request.getfixturevalue("real")) if name == "embedder" else ()
    done = run_here("bench/run.py", file, "--out", out, *data, *options, PMM_FAST="1")
    report = json.loads((out / "report.json").read_text())
    assert done.returncode == (1 if report["gates"]["failures"] else 0), done.stderr
    print(shlex.join(map(str, options)), done.stdout)
    return {result["name"]: result for result in report["results"]}, report["gates"]["failures"]


def test_the_bench_judges_it_with_all_gates(trained, tmp_path, request):
    name, file = trained
    # on a CPU half precision is torch's bf16 alone; for GPUs all engines are built
    words = ("--backends", "torch,ort-cpu,tensorrt-rtx", "--precisions", "fp32,fp16,bf16,int8")
    results, failures = bench(name, file, tmp_path / "report", request, *words)
    engines = {name: result for name, result in results.items() if result["backend"] == "tensorrt-rtx"}
    assert len(engines) >= 4
    if not nvidia_gpus():  # they are built, and cannot run
        assert {result["status"] for result in engines.values()} == {"unavailable"}
        assert all("built" in result["reason"] or "not installed" in result["reason"] for result in engines.values())
        failures = [failure for failure in failures if failure["result"] not in engines]
    if name == "embedder":  # weights of ImageNet: bf16 without kept layers is refused, and a query is 3 % of 32
        assert {failure["result"] for failure in failures} <= {"torch bf16", "ort-cpu int8"}
        ranking = ("--max-map-drop", "--max-rank1-flips")
        failures = [each for each in failures if each["result"] != "torch bf16" and each["gate"] not in ranking]
    assert not failures
    for backend in ("torch fp32", "torch bf16", "ort-cpu fp32", "ort-cpu int8"):
        assert results[backend]["status"] == "ok", results[backend]["reason"]
    timed = {batch["batch"]: batch for batch in results["ort-cpu int8"]["batches"]}
    assert set(timed) == {1, 8}
    for batch in results["ort-cpu fp32"]["batches"]:
        int8 = timed[batch["batch"]]
        assert int8["speedup"]["value"] > 0
        over = batch["p50_ms"] / int8["p50_ms"]
        print(f"{name}, batch {batch['batch']}: ort-cpu int8 is {int8['speedup']['value']:.2f} times as fast as the "
              f"reference, {over:.2f} times as fast as ort-cpu fp32")  # fmt: skip


def test_an_int8_file_for_tensorrt_passes_its_gate(trained, tmp_path, request):
    _, file = trained
    artifact = export_onnx(file, tmp_path / "int8.onnx", ExportOptions(precision="int8"))
    assert artifact.manifest.precision_found == "int8"
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed (pip install tensorrt-rtx)")
    engine = engine_from_onnx(read_onnx(artifact.path), tmp_path / "int8.plan", EngineOptions(flavor="rtx"))
    assert engine.manifest.precision_found == "int8"
