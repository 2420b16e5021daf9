"""Programs that know nothing of us read our ONNX files and have our embeddings: what docs/clients.md says of each."""

import dataclasses
import os
import re
import shutil

import numpy as np
import onnx
import onnxruntime
import pytest
from PIL import Image

from bench.lab.exporting import random_checkpoint
from pmm.artifacts.onnx_file import read_onnx
from pmm.data.crops import load_crops
from pmm.evaluation.parity.numeric import numeric_parity
from pmm.export.onnx import export_onnx
from pmm.export.options import MAX_NORM_ERROR, MIN_COSINE, ExportOptions, VerifyOptions
from pmm.runtime.open import open_runner
from tests.clients.readers import (
    EXAMPLES,
    boxmot_client,
    client_folder,
    node_client,
    opencv_cpp_client,
    python_client,
    run,
)
from tests.conftest import ROOT, run_here

pytestmark = pytest.mark.full
PAGE = (ROOT / "docs/clients.md").read_text()
VERSIONS = (ROOT / "Makefile").read_text() + (ROOT / "constraints.txt").read_text()
FOREIGN = [line for block in re.findall(r"```console\n(.*?)```", PAGE, re.DOTALL) for line in block.splitlines()]
"""The commands of the page that are not ours."""
READERS = {
    "ONNX Runtime, Python": lambda home: python_client("plain", "onnxruntime"),
    "ONNX Runtime, node": node_client,
    "OpenVINO": lambda home: python_client("plain", "openvino"),
    "OpenCV, C++": lambda home: opencv_cpp_client(home, next(line for line in FOREIGN if line.startswith("g++ "))),
    "OpenCV 4, Python": lambda home: python_client("opencv410", "opencv"),
    "OpenCV 5, Python": lambda home: python_client("opencv5", "opencv"),
    "BoxMOT": lambda home: boxmot_client(),
}
FILES = {
    "`--input float`": ExportOptions(input="float"),
    "`--input float255`": ExportOptions(input="float255", input_colour="bgr"),
    "bytes (default)": ExportOptions(),
    "`--normalize`": ExportOptions(input="float", normalize=True),
    "`--flip-tta`": ExportOptions(input="float", flip_tta=True),
    "both": ExportOptions(input="float", normalize=True, flip_tta=True),
    "fp16": ExportOptions(input="float", precision="fp16"),
    "int8": ExportOptions(input="float", precision="int8", target="cpu"),
    "int8 for OpenCV": ExportOptions(input="float", precision="int8", target="opencv"),
}
ROWS = [[cell.strip() for cell in line.strip("|").split("|")] for line in re.findall(r"^\|.*\|$", PAGE, re.MULTILINE)]
CELLS = {(row[0], file): cell for row in ROWS[2:] for file, cell in zip(ROWS[0][2:], row[2:], strict=True)}
BATCHES = (1, 2, 5)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Where examples are built."""
    return tmp_path_factory.mktemp("readers")


@pytest.fixture(scope="module")
def images(people, small_config, tmp_path_factory):
    """PNG files of the model's size: with these no client's decoder or resize matters."""
    size, folder = small_config.data, tmp_path_factory.mktemp("images")
    crops = load_crops(sorted((people / "query").iterdir())[::5][: max(BATCHES)], size.height, size.width)
    for number, crop in enumerate(crops):
        Image.fromarray(crop).save(folder / f"{number}.png")
    return sorted(folder.iterdir())


def our_embeddings(artifact, images):
    with open_runner(artifact, device="cpu") as runner:
        return runner([np.asarray(Image.open(path)) for path in images])


def check(theirs, ours, precision, cell="yes"):
    found = numeric_parity(ours, theirs)
    assert found.min_cosine >= (0.9999999 if cell == "yes" else MIN_COSINE[precision])
    assert found.max_norm_error <= (1e-5 if cell == "yes" else MAX_NORM_ERROR[precision])


def test_the_table_names_each_client_and_file_and_their_versions():
    assert set(CELLS) == {(client, file) for client in READERS for file in FILES}
    assert set(CELLS.values()) <= {"yes", "near", "no", "its own"}
    for client, version, *_ in ROWS[2:]:  # OpenCV's in C++ is Debian's
        assert client == "OpenCV, C++" or re.search(rf"[=@ ]{re.escape(version)}\b", VERSIONS), client


@pytest.mark.parametrize(("client", "file"), [cell for cell, word in CELLS.items() if word != "its own"])
def test_a_client_reads_the_files_that_the_page_says(shared, home, images, tmp_path, client, file):
    recipe, cell = FILES[file], CELLS[client, file]
    artifact, command = shared.onnx(recipe), READERS[client](home)
    out = tmp_path / ("theirs.npy" if client == "BoxMOT" else "theirs.csv")
    ours = our_embeddings(artifact, images)
    if client == "BoxMOT":  # which normalises them
        ours /= np.linalg.norm(ours, axis=1, keepdims=True)
    for count in BATCHES:
        done = run(*command, artifact, out, *images[:count], cwd=tmp_path)
        assert (done.returncode != 0) == (cell == "no"), done.stderr
        if cell != "no":
            theirs = np.load(out) if out.suffix == ".npy" else np.loadtxt(out, delimiter=",", ndmin=2)
            check(theirs, ours[:count], recipe.precision, cell)


@pytest.fixture(scope="module")
def gated(people, small_config, tmp_path_factory):
    """Of an untrained backbone whose gates are hard sigmoids."""
    folder = tmp_path_factory.mktemp("gated")
    model = dataclasses.replace(small_config.model, backbone="timm:mobilenetv3_small_100")
    checkpoint = random_checkpoint(dataclasses.replace(small_config, model=model), people, folder / "gated.pth")
    return export_onnx(
        checkpoint, folder / "model.onnx", ExportOptions(input="float"), VerifyOptions(no_verify=True)
    ).path


@pytest.mark.parametrize(("client", "count"), [("OpenCV, C++", 1), ("OpenCV 4, Python", 5), ("OpenCV 5, Python", 5)])
def test_opencv_takes_gates_for_what_they_are(gated, home, images, tmp_path, client, count):
    done = run(*READERS[client](home), gated, tmp_path / "theirs.csv", *images[:count], cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    theirs = np.loadtxt(tmp_path / "theirs.csv", delimiter=",", ndmin=2)
    check(theirs, our_embeddings(gated, images)[:count], "fp32")


def test_opencv_in_cpp_is_the_version_of_the_page():
    header = client_folder("opencv-cpp") / "usr/include/opencv4/opencv2/core/version.hpp"
    version = re.findall(r"#define CV_VERSION_(?:MAJOR|MINOR|REVISION) +(\d+)", header.read_text())
    assert ["OpenCV, C++", ".".join(version)] == next(row[:2] for row in ROWS if row[0] == "OpenCV, C++")


@pytest.mark.parametrize("file", FILES)
def test_tools_that_rewrite_graphs_leave_any_batch_and_our_embeddings(shared, images, tmp_path, file):
    """Polygraphy's sanitize and run, ONNX Runtime's symbolic shape inference and preparation for its quantiser."""
    recipe = FILES[file]
    artifact, tools = shared.onnx(recipe), client_folder("polygraphy") / "bin"
    ours = our_embeddings(artifact, images)
    made = [tmp_path / f"{name}.onnx" for name in ("sanitized", "inferred", "prepared")]
    manifest, crops = read_onnx(artifact).manifest, np.stack([np.asarray(Image.open(path)) for path in images])
    feeds = manifest.input.feed(crops, manifest.preprocessing)
    shape = f"images:{list(feeds.shape)}"
    commands = [
        [tools / "polygraphy", "surgeon", "sanitize", "--fold-constants", artifact, "-o", made[0]],
        [tools / "python", ROOT / "tests/clients/graph_tools.py", artifact, *made[1:]],
        *([tools / "polygraphy", "run", path, "--onnxrt", "--input-shapes", shape] for path in (artifact, made[0])),
    ]
    for command in commands:
        done = run(*command, cwd=tmp_path)
        assert done.returncode == 0, done.stdout + done.stderr
    for path in made:
        proto = onnx.load(path)
        (output,) = proto.graph.output
        dims = [dim.dim_param or dim.dim_value for dim in output.type.tensor_type.shape.dim]
        assert dims == ["batch", ours.shape[1]], path.name
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        for count in BATCHES:
            check(session.run(None, {"images": feeds[:count]})[0], ours[:count], recipe.precision)


@pytest.mark.parametrize(
    "file", ["`--input float`", "`--input float255`", "bytes (default)", "both", "int8", "int8 for OpenCV"]
)
def test_the_examples_pass_the_selftest_by_the_commands_of_the_page(shared, home, tmp_path, file):
    """Word for word, where the packages that it says to install are."""
    for path in (source := shared.onnx(FILES[file])).parent.iterdir():
        if path.name.startswith(source.name):
            shutil.copy(path, tmp_path)
    clients = {"python": "ONNX Runtime, Python", "./opencv_client": "OpenCV, C++", "node": "ONNX Runtime, node"}
    commands = {clients[line.split()[0]]: line for line in FOREIGN if "model.onnx" in line}
    assert len(commands) == len(clients)
    *_, script = node_client(home)
    *_, program = READERS["OpenCV, C++"](home)
    for path in (script, program, EXAMPLES / "client.py"):
        (tmp_path / path.name).symlink_to(path)
    assert run_here("-m", "pmm", "selftest", "model.onnx", "--write-images", "crops", cwd=tmp_path).returncode == 0
    path = f"{client_folder('plain') / 'bin'}:{os.environ['PATH']}"
    for line in (line for client, line in commands.items() if CELLS[client, file] != "no"):
        libraries = {"LD_LIBRARY_PATH": str(client_folder("opencv-cpp") / "lib")} if line.startswith("./") else {}
        done = run("bash", "-c", line, cwd=tmp_path, PATH=path, **libraries)
        assert done.returncode == 0, (line, done.stderr)
        done = run_here("-m", "pmm", "selftest", "model.onnx", "--embeddings", "theirs.csv", cwd=tmp_path)
        assert done.returncode == 0, (line, done.stdout)
        (tmp_path / "theirs.csv").unlink()
