"""pmm info says what a file is and what the machine has, without telling whose machine it is."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import shutil
from importlib import metadata
from pathlib import Path

import numpy as np
import onnx
import pytest

import pmm
from pmm.artifacts import describe
from pmm.artifacts.artifact import manifest_path, read_manifest
from pmm.artifacts.batch_profiles import BatchProfile, BatchProfiles
from pmm.artifacts.native_contracts import EngineContract
from pmm.export.onnx import export_onnx
from pmm.utils import environment, hardware
from pmm.utils.build_info import build_version, describe_search_build
from pmm.utils.facts import aligned, plain
from pmm.utils.files import sha256
from tests.conftest import assert_one_line_error, run_here, run_python


@pytest.fixture(scope="module")
def artifact(trained, tmp_path_factory):
    return export_onnx(trained, tmp_path_factory.mktemp("artifact") / "model.onnx").path


def ask(*args, **env):
    done = run_here("-m", "pmm", "info", *args, "--json", **env)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def values(text, part="file"):
    """key -> value of one part of the aligned text."""
    block = next(block for block in text.split("\n\n") if block.startswith(f"{part}:"))
    lines = [line.split(maxsplit=1) for line in block.strip().splitlines()[1:]]
    return {line[0]: line[1] for line in lines}


def test_the_machine_alone():
    facts = ask()
    assert list(facts) == ["environment"]
    here = facts["environment"]
    assert here["pmm"] == pmm.__version__
    assert here["python"] == platform.python_version()
    assert here["versions"]["numpy"] == np.__version__
    assert here["versions"]["torch"] == metadata.version("torch")
    assert here["cores"] == len(os.sched_getaffinity(0))
    assert len(here["gpus"]) == len(here["compute_capabilities"])
    assert here["cuda"].keys() >= {"driver", "torch"}
    assert here["commit"]
    done = run_here("-m", "pmm", "info")
    lines = done.stdout.splitlines()
    assert lines[0] == "environment:"
    assert len({len(line) - len(line.lstrip()) for line in lines[1:]}) == 1
    assert values(done.stdout, "environment")["python"] == platform.python_version()
    assert "versions.numpy" in values(done.stdout, "environment")
    assert values(done.stdout, "environment")["cuda.torch"] == here["cuda"]["torch"]


def test_the_kernels_are_facts_in_json_and_one_line_in_text(built_with):
    facts = {"compiler": "g++ 12.2.0", "cuda": "13.0", "architectures": ["9.0"], "sources": "0123456789ab"}
    built_with(**facts)
    assert ask()["environment"]["kernels"] == {"compiled": True, **facts}
    printed = values(run_here("-m", "pmm", "info").stdout, "environment")
    assert printed["kernels"] == "compiled (g++ 12.2.0; CUDA 13.0 for 9.0; sources 0123456789ab)"
    assert printed["search_kernel"] == describe_search_build()
    assert not [key for key in printed if key.startswith(("kernels.", "search_kernel."))]


def test_a_checkpoint(trained, small_config, tmp_path):
    facts = ask(trained)["file"]
    assert facts["kind"] == "checkpoint"
    assert (facts["method"], facts["backbone"], facts["backbone_weights"]) == ("pmm", "resnet10", "none")
    assert facts["crop"] == {"height": 128, "width": 64}
    assert facts["embedding_dim"] == 384
    assert facts["epoch"] in (1, 2)
    assert facts["epochs"] == small_config.recipe.epochs == 2
    assert 0 < facts["best_held_out_mAP"] <= 1
    assert facts["trained_on"]["dataset"] == "synthetic"
    assert facts["trained_on"]["identities"] == 9  # of twelve, a quarter is held out
    assert not facts["resumable"]
    assert facts["made_with"]["pmm"] == pmm.__version__
    assert facts["made_with"]["pmm kernels"] == build_version()
    assert facts["sha256"] == sha256(trained)
    assert facts["training_crops"]["crops"] > 9
    assert ask(trained.with_name("last.pth"))["file"]["resumable"]

    import torch

    saved = torch.load(trained, weights_only=True)
    state = saved["model"]
    assert "weights" not in facts
    saved["config"]["recipe"]["ema"] = 0.99
    torch.save(saved, tmp_path / "averaged.pth")
    assert "averages" in ask(tmp_path / "averaged.pth")["file"]["weights"]
    running = ("running_mean", "running_var", "num_batches_tracked")
    assert facts["parameters"] == sum(v.numel() for key, v in state.items() if not key.endswith(running))


def test_an_onnx_file_of_ours(trained, artifact):
    facts = ask(artifact)["file"]
    assert (facts["kind"], facts["written_by_pmm"]) == ("ONNX file", True)
    assert facts["inputs"] == ["uint8 images [batch, 128, 64, 3]"]
    assert facts["outputs"] == ["float32 embeddings [batch, 384]"]
    assert facts["operators"]["Conv"] == sum(node.op_type == "Conv" for node in onnx.load(artifact).graph.node) > 5
    assert facts["manifest"]["checkpoint_sha256"] == sha256(trained)
    assert facts["manifest"]["precision_found"] == "fp32"
    assert facts["manifest"]["parity"]["min_cosine"] > 0.9999
    printed = values(run_here("-m", "pmm", "info", artifact).stdout)
    assert printed["written_by_pmm"] == "yes"
    assert printed["manifest.embedding.dim"] == "384"
    assert printed["manifest.embedding.flip_tta"] == "no"
    table = facts["manifest"]["for_clients"]
    assert table["input"]["shape"] == ["batch", 128, 64, 3]
    steps = [printed[f"manifest.for_clients.{number}"] for number in range(1, len(table["steps"]) + 1)]
    assert steps == table["steps"]
    assert float(printed["manifest.crop_statistics.crops"]) == table["training_crops"]["crops"]
    assert float(printed["manifest.parity.min_cosine"]) == facts["manifest"]["parity"]["min_cosine"]
    assert "engine" not in facts["manifest"]


def test_a_copied_onnx_file_says_that_nothing_was_verified(artifact, tmp_path):
    copy = shutil.copy(artifact, tmp_path / "copy.onnx")
    assert ask(copy)["file"]["manifest"]["parity"] is None
    assert values(run_here("-m", "pmm", "info", copy).stdout)["manifest.parity"] == "not verified"


def foreign(path: Path, domain: str = "") -> Path:
    helper = onnx.helper
    graph = helper.make_graph(
        [helper.make_node("Relu", ["x"], ["y"]), helper.make_node("Relu", ["y"], ["z\x1b[31m"])],
        "graph",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT16, ["n", 3])],
        [helper.make_tensor_value_info("z\x1b[31m", onnx.TensorProto.FLOAT16, ["n", None])],
    )
    model = helper.make_model(graph, producer_name="another tool", opset_imports=[helper.make_opsetid(domain, 13)])
    onnx.save(model, path)
    return path


def test_an_onnx_file_of_others(tmp_path):
    facts = ask(foreign(tmp_path / "other.onnx"))["file"]
    assert facts["written_by_pmm"] is False
    printed = values(run_here("-m", "pmm", "info", tmp_path / "other.onnx").stdout)
    assert printed["written_by_pmm"].startswith("no: it has no manifest (other.onnx.json)")
    assert facts["producer"] == "another tool"
    assert facts["inputs"] == ["float16 x [n, 3]"]
    assert facts["outputs"] == [r"float16 z\x1b[31m [n, ?]"], "a name must not reach the terminal as a command"
    assert facts["operators"] == {"Relu": 2}
    assert facts["opsets"] == {"ai.onnx": 13}
    assert "manifest" not in facts


def test_an_engine_is_described_by_its_manifest_and_never_loaded(artifact, tmp_path):
    engine = tmp_path / "model.plan"
    engine.write_bytes(b"no engine at all, which nobody may notice by loading it")
    facts = ask(engine)["file"]
    assert facts["kind"] == "engine"
    assert facts["written_by_pmm"] is False
    contract = EngineContract(
        flavor="rtx", version="1.7.1", batch=BatchProfiles((BatchProfile(most=16),)), onnx_sha256="0" * 64,
        platform="linux-x86_64", gpu="", compute_capability="", hardware_compatibility="none", driver="",
        flags=("tf32 off",), precision_read_from="parsed network",
    )  # fmt: skip
    manifest = read_manifest(artifact, sha256(artifact))
    assert manifest
    manifest = dataclasses.replace(manifest, engine=contract, sha256=sha256(engine))
    manifest_path(engine).write_text(manifest.to_json())
    facts = ask(engine)["file"]
    assert facts["written_by_pmm"] is True
    assert facts["manifest"]["engine"]["version"] == "1.7.1"
    assert values(run_here("-m", "pmm", "info", engine).stdout)["manifest.engine.batch.profiles.1.most"] == "16"
    engine.write_bytes(b"another one")
    assert_one_line_error(run_here("-m", "pmm", "info", engine), "the file was changed or replaced")


def test_a_gallery_without_the_folder_it_was_made_of(artifact, people, tmp_path):
    out = tmp_path / "gallery"
    flags = ("-o", out, "--names", "market1501", "--store", "fp16")
    assert run_here("-m", "pmm", "embed", artifact, people / "query", *flags).returncode == 0
    facts = ask(out)["file"]
    assert (facts["kind"], facts["dimensions"], facts["stored"]) == ("gallery", 384, "fp16")
    assert (facts["name"], facts["metric"], facts["removed"]) == ("gallery", "euclidean", 0)
    assert facts["crops"] == len(list((people / "query").glob("*.jpg")))
    assert facts["columns"]["camera"] == "text"
    assert facts["made_by"]["artifact_sha256"] == sha256(artifact)
    assert facts["made_by"]["artifact"] == artifact.name
    printed = run_here("-m", "pmm", "info", out).stdout
    assert not [folder for folder in (people, artifact.parent) if str(folder) in printed]
    assert_one_line_error(run_here("-m", "pmm", "info", tmp_path), "no manifest.json", "a gallery")


@pytest.mark.parametrize("suffix", [".pth", ".onnx", ".npz", ".plan", ".engine"])
def test_damaged_missing_and_empty_files_are_one_line(tmp_path, suffix):
    path = tmp_path / f"model{suffix}"
    assert_one_line_error(run_here("-m", "pmm", "info", path), f"model{suffix}: it does not exist")
    path.write_bytes(b"")
    assert_one_line_error(run_here("-m", "pmm", "info", path), f"model{suffix}: it is empty")
    path.write_bytes(b"\x80\x05damaged" * 9)
    if suffix in (".plan", ".engine"):
        manifest_path(path).write_text("{")
    done = run_here("-m", "pmm", "info", path)
    assert_one_line_error(done, f"model{suffix}")
    assert not done.stdout


def test_unknown_kinds_and_flags_are_one_line(tmp_path):
    assert_one_line_error(run_here("-m", "pmm", "info", tmp_path / "a.txt"), "a.txt: it does not exist", ".pth", ".npz")
    (tmp_path / "a.txt").write_text("text")
    done = run_here("-m", "pmm", "info", tmp_path / "a.txt")
    assert_one_line_error(done, "neither its content nor its name", ".pth", ".onnx", ".plan, .engine", ".pt2", ".npz")
    assert_one_line_error(run_here("-m", "pmm", "info", "--jsn"), "unknown flag --jsn")


def test_nothing_says_whose_machine_it_is(trained, tmp_path, monkeypatch):
    """A home, a host and a user with names that nothing else has."""
    home = tmp_path / "home" / "zaphod"
    home.mkdir(parents=True)
    system, _, *rest = os.uname()
    monkeypatch.setattr(os, "uname", lambda: os.uname_result((system, "heartofgold", *rest)))
    monkeypatch.setattr(platform, "_uname_cache", None)
    monkeypatch.setattr(platform, "_platform_cache", {})
    assert platform.node() == "heartofgold"
    checkpoint = shutil.copy(trained, home / "best.pth")
    monkeypatch.setitem(
        describe.DESCRIBE, "checkpoint", lambda path: {"kind": "checkpoint", "told": [f"found in {path}"]}
    )
    for flags in ((), ("--json",)):
        done = run_here("-m", "pmm", "info", checkpoint, *flags, HOME=str(home), USER="zaphod")
        assert "found in ~/best.pth" in done.stdout, done.stderr
        assert "zaphod" not in done.stdout
        assert "heartofgold" not in done.stdout


def test_two_onnxruntimes_are_told(monkeypatch):
    assert not environment.problems() or "both installed" in environment.problems()[0]
    monkeypatch.setattr(hardware, "installed_version", lambda name: "1.22.0")
    assert "onnxruntime and onnxruntime-gpu are both installed" in ask()["environment"]["problems"][0]
    monkeypatch.setattr(hardware, "installed_version", lambda name: "1.22.0" if name == "onnxruntime" else None)
    assert ask()["environment"]["problems"] == []


def test_values_print_as_what_they_are():
    told = {
        "part": {"zero": 0, "no": False, "unknown": None, "none": [], "text": "", "list": [1, 2], "nan": float("nan")}
    }
    printed = values("\n".join(aligned(plain(told))), "part")
    assert printed == {
        "zero": "0", "no": "no", "unknown": "unknown", "none": "none", "text": "none", "list": "1, 2", "nan": "nan",
    }  # fmt: skip


@pytest.mark.slow
def test_torch_is_loaded_for_a_checkpoint_only(artifact, trained):
    for file, loaded in ((artifact, "False"), (trained, "True")):
        script = "import sys; from pmm.commands import info; info.main('pmm info'); print('torch' in sys.modules)"
        done = run_python("-c", script, file)
        assert done.stdout.splitlines()[-1] == loaded, done.stderr
