"""The folder of pmm ship where it will run: an environment without torch accepts it, and nothing else in its place."""

import json
import os
import shutil

import pytest

from pmm.artifacts.bundle import SEAL, read_bundle
from tests.conftest import ROOT, assert_one_line_error, run_here
from tests.wheel import Environment, built_wheel

pytestmark = pytest.mark.full


@pytest.fixture(scope="module")
def serving(store, tmp_path_factory):
    """The wheel, and what pip installed of pmm/serving-requirements.txt."""
    clients = ROOT / os.environ.get("PMM_CLIENTS", ".venv-clients") / "serving"
    assert (clients / ".installed").exists(), f"{clients} is missing: make clients"
    made = Environment.with_wheel(tmp_path_factory.mktemp("env") / "env", built_wheel(store))
    made.add_all(clients)
    return made


@pytest.fixture(scope="module")
def shipped(trained, people, tmp_path_factory):
    """As a user makes it; and another one of the same model, in int8."""
    home = tmp_path_factory.mktemp("shipped")
    folders = {"fp32": home / "ship", "int8": home / "other"}
    for precision, out in folders.items():
        words = ("--target", "ort-cpu", "--precisions", precision, "--root", people, "-o", out, "--seconds", "1")
        gates = ("--min-cosine", "off", "--max-norm-error", "off", "--max-map-drop", "1", "--max-rank1-flips", "off")
        done = run_here("-m", "pmm", "ship", trained, *words, *gates, PMM_FAST="1")
        assert done.returncode == 0, done.stderr
    return folders


def test_a_copy_is_accepted_without_torch_and_names_no_folder_of_here(serving, shipped, tmp_path):
    copy = shutil.copytree(shipped["fp32"], tmp_path / "handed over")
    done = serving.run("python", "-c", "import torch", cwd=tmp_path)
    assert "ModuleNotFoundError" in done.stderr
    done = serving.run("pmm", "selftest", copy.name, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "passed" in done.stdout
    here = [str(shipped["fp32"].parent).encode(), str(ROOT).encode(), os.path.expanduser("~").encode() + b"/"]
    for path in copy.rglob("*"):
        assert not path.is_file() or not any(folder in path.read_bytes() for folder in here), path


def other_content(folders, name):
    content = (folders["int8"] / name).read_bytes()
    assert content != (folders["fp32"] / name).read_bytes()
    return content


def test_each_damage_is_named_in_one_line(serving, shipped, tmp_path):
    names = sorted(read_bundle(shipped["fp32"]).files)
    assert {"model.onnx", "model.onnx.json", "thresholds.json", "model.onnx.selftest.npz", "README.md"} <= set(names)
    assert {path.relative_to(shipped["fp32"]).as_posix() for path in shipped["fp32"].rglob("*") if path.is_file()} == {
        *names, SEAL
    }  # fmt: skip
    damages = {f"another {name}": (name, other_content(shipped, name)) for name in names
               if name.startswith(("model", "thresholds", "README", "report/report.json"))}  # fmt: skip
    damages |= {f"no {name}": (name, None) for name in names}
    damages |= {f"added {name}": (name, b"{}") for name in ("model.onnx.extra", "report/more.html", "run.sh")}
    measured = json.loads((shipped["fp32"] / "thresholds.json").read_text())
    points = [{**point, "distance": point["distance"] * 0.9} for point in measured["points"]]
    damages["lower thresholds"] = ("thresholds.json", json.dumps({**measured, "points": points}).encode())
    for place, (name, content) in enumerate(damages.values()):
        copy = shutil.copytree(shipped["fp32"], tmp_path / str(place))
        if content is None:
            (copy / name).unlink()
        else:
            (copy / name).write_bytes(content)
    for place, (damage, (name, _)) in enumerate(damages.items()):
        done = serving.run("pmm", "selftest", str(place), cwd=tmp_path)
        assert_one_line_error(done, f"{place}/{name}: "), damage


@pytest.mark.parametrize("content", [None, b"{}", b"no json"])
def test_a_folder_without_its_seal_is_no_folder_of_ours(serving, shipped, tmp_path, content):
    copy = shutil.copytree(shipped["fp32"], tmp_path / "copy")
    (copy / SEAL).unlink() if content is None else (copy / SEAL).write_bytes(content)
    done = serving.run("pmm", "selftest", "copy", cwd=tmp_path)
    assert_one_line_error(done, "copy")
