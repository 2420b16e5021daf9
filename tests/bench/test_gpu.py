"""The list of steps of `make gpu` cannot rot, and without a GPU the command refuses and writes nothing."""

import dataclasses
import functools
import importlib.util
import json
import re
import subprocess
import sys

import pytest

from pmm import cli, machine
from pmm.bench import gpu
from pmm.bench.ablation import Ablation
from pmm.bench.steps import Outcome, Step
from pmm.kernels import build_info
from pmm.machine import Gpu
from pmm.models.registry import METHODS
from pmm.train import parse
from tests.conftest import ROOT, assert_one_line_error, run_here, run_python

CARD = Gpu("NVIDIA A10 (24 GB)", "8.6")
STEPS = {step.name: step for step in gpu.gpu_steps(CARD)}
COMMANDS = [(step.name, command) for step in STEPS.values() for command in step.commands]


def listed(*folders):
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*"))


def test_without_a_gpu_it_is_one_line_and_nothing_is_written(monkeypatch):
    monkeypatch.setattr(machine, "nvidia_gpus", tuple)
    before = listed("runs", "bench/results")
    for flags in ((), ("--check",), ("--again", "ops")):
        done = run_here("bench/gpu.py", *flags)
        assert_one_line_error(done, "make gpu: error: the CUDA driver sees no NVIDIA GPU here")
        assert (done.returncode, done.stdout) == (1, "")
    assert listed("runs", "bench/results") == before


def test_the_command_itself_needs_no_package():
    script = (
        "import sys; sys.path.insert(0, '.')\n"
        "from pmm import machine; machine.nvidia_gpus = tuple\n"
        "import runpy; runpy.run_path('bench/gpu.py', run_name='__main__')"
    )
    done = run_python("-S", "-c", script)  # without site-packages
    assert_one_line_error(done, "sees no NVIDIA GPU")


def imported(script):
    """A script as a module."""
    spec = importlib.util.spec_from_file_location(f"script_{script.stem}", script)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@functools.cache
def collected(*commands):
    """The tests that pytest's command lines choose, for each of them; collected in one other process."""
    script = f"import pytest\nfor words in {commands!r}:\n    print(end='\\0'); pytest.main([*words, '--collect-only'])"
    done = run_python("-c", script)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.split("\0")[1:]


def words_of(command):
    """Of pytest's command line; where it names no folder, what it is for lies here, and the slow test looks in all."""
    words = command[command.index("pytest") + 1 :]
    return words if "tests/ops" in words else (*words, "tests/ops", "tests/runtime/test_runners.py")


def chosen_by(found, words):
    """Asserts that a command line of pytest chose the tests that it is for."""
    tests = gpu.SANITIZED.split(" or ") if "-k" in words else ("hard_mix", "mixed_cam", "an_engine_on_a_gpu")
    assert [test for test in tests if test not in found] == [], found


@pytest.mark.parametrize(("name", "command"), COMMANDS, ids=[f"{name}-{k}" for k, (name, _) in enumerate(COMMANDS)])
def test_every_command_line_parses(name, command):
    words = list(command)
    if words[0] == "compute-sanitizer":
        words = words[words.index("python") :]
        assert command[:4] in [("compute-sanitizer", "--error-exitcode", "86", "--tool")]
    assert words.pop(0) == "python"
    if words[:2] == ["-m", "pmm.train"]:
        config = parse(words[2:]).config
        assert (config.preset, config.data.dataset, config.model.weights) == ("paper", "synthetic", "auto")
    elif words[0] == "-c":
        compile(words[1], name, "exec")
    elif words[0] == "setup.py":
        done = run_python(*words, "--help", PMM_BUILD_CUDA="0")
        assert done.returncode == 0, done.stderr
        assert "Options for 'BuildKernels' command" in done.stdout
    elif words[:2] == ["-m", "pytest"]:
        where = list(dict.fromkeys(words_of(command) for _, command in COMMANDS if "pytest" in command))
        chosen_by(collected(*where)[where.index(words_of(command))], words)
    else:
        cli.parse_args(imported(ROOT / words[0]).Command, words[1:], prog=words[0], description="")


@pytest.mark.slow
def test_all_tests_are_collected():
    ((_, command),) = [(name, command) for name, command in COMMANDS if name == "tests"]
    (found,) = collected(command[3:])
    chosen_by(found, command)


def test_steps_use_what_earlier_steps_make_and_write_into_their_own_folders():
    made = set()
    folder = gpu.folder_of(CARD).relative_to(ROOT).as_posix()
    for step in STEPS.values():
        assert set(step.uses) <= made, step.name
        made |= set(step.makes)
        assert all(path == gpu.KERNELS or path.startswith(f"{folder}/{step.name}/") for path in step.makes), step.name
        assert step.limit_s <= 600


def test_the_kernels_are_required_wherever_they_matter():
    for name in ("tests", "sanitizer", "ops-float32", "ops-step", "training"):
        assert STEPS[name].env["PMM_REQUIRE_EXT"] == "1"
        assert gpu.KERNELS in STEPS[name].uses
    assert STEPS["build"].env["TORCH_CUDA_ARCH_LIST"] == "8.6"


def test_the_ablation_takes_every_method_at_full_size_and_a_seed_more_with_each_step():
    found = []
    for step in (step for name, step in STEPS.items() if name.startswith("ablation-")):
        ((_, script, *words),) = step.commands
        found.append(cli.parse_args(imported(ROOT / script).Command, words, prog=script, description="").options)
    assert [options.seeds for options in found] == [1, 2, 3, 4, 5]
    assert len({dataclasses.replace(options, seeds=1) for options in found}) == 1  # so that each goes on from the last
    ablation = Ablation(found[0])
    ablation.check_models()
    assert ablation.against == "paper/baseline:amp=bf16"
    configs = ablation.configs.values()
    assert {config.model.method for config in configs} == set(METHODS) - {"cutout-sample"}
    assert {config.recipe.amp for config in configs} == {"bf16"}
    assert {config.model.backbone for config in configs} == {"resnet50"}
    assert [config.preset for config in configs].count("strong") == 1


def test_an_engine_is_asked_for_only_where_it_can_prove_itself():
    assert "tensorrt|tensorrt_rtx" in STEPS["engine"].needs
    hopper = {step.name: step for step in gpu.gpu_steps(Gpu("NVIDIA H200", "9.0"))}
    assert "tensorrt" in hopper["engine"].needs
    assert hopper["bench-torch"].commands[0][2].startswith("runs/gpu/nvidia-h200/")


def test_missing_packages_are_one_line():
    steps = [dataclasses.replace(STEPS["tests"], needs=("json", "no_pytest")), STEPS["build"]]
    steps[1] = dataclasses.replace(steps[1], needs=("no_pytest", "no_a|no_b"))
    assert gpu.packages(steps) == "packages: no_pytest is missing: no tests, build; no_a or no_b is missing: no build"
    assert gpu.packages([dataclasses.replace(steps[0], needs=())]) == "packages: nothing is missing"


def test_the_sources_count_and_not_what_lies_beside_them(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    for name in ("setup.py", "pmm/a.py", "cpp_ext/cuda/b.cu", "bench/results/r.json", "README.md"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("1")
    first = gpu.dependencies()
    assert json.loads(json.dumps(first)) == first
    for name in ("bench/results/r.json", "README.md"):
        (tmp_path / name).write_text("2")
        assert gpu.dependencies() == first
    for name in ("setup.py", "pmm/a.py", "cpp_ext/cuda/b.cu"):
        before = gpu.dependencies()
        (tmp_path / name).write_text("2")
        assert gpu.dependencies() != before


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """A repository with a card and three steps; the second fails until the file `mended` is there."""
    python = ("python", "-c")
    steps = [
        Step(
            name="first",
            commands=((*python, "open('a.json', 'w').write('[1]'); open('b.jsonl', 'w').write('1\\n2\\n')"),),
            makes=("a.json", "b.jsonl"),
        ),
        Step(name="second", commands=((*python, "print('the reason'); open('mended')"),), uses=("a.json",)),
        Step(name="third", commands=((*python, ""),), needs=("no-such-program",), optional=True),
    ]
    for name in ("ROOT", "RESULTS"):
        monkeypatch.setattr(gpu, name, tmp_path / ("results" if name == "RESULTS" else ""))
    (tmp_path / "setup.py").touch()
    monkeypatch.setattr(gpu, "gpu_steps", lambda found: steps)
    monkeypatch.setattr(machine, "nvidia_gpus", lambda: (CARD,))
    return tmp_path


def test_from_a_failure_to_results_named_after_the_card(fake):
    done = run_here("bench/gpu.py")
    assert_one_line_error(done, "not proved: second (failed, exit code 1: python -c")
    assert "second.log:" in done.stdout
    assert "the reason" in done.stdout
    day = r"\d{4}-\d\d-\d\d-nvidia-a10-24-gb-"
    assert sorted(re.sub(day, "", path.name) for path in (fake / "results").iterdir()) == ["first.json", "third.json"]
    (fake / "mended").touch()
    done = run_here("bench/gpu.py")
    assert done.returncode == 0, done.stderr
    assert "first: at most" not in done.stdout
    found = {re.fullmatch(day + r"(\w+)\.json", path.name)[1]: path for path in (fake / "results").iterdir()}
    first, second, third = (json.loads(found[name].read_text()) for name in ("first", "second", "third"))
    assert first["files"] == {"a.json": [1], "b.jsonl": [1, 2]}
    assert first["environment"]["kernels"] == build_info()
    assert "driver" in first["environment"]
    assert first["environment"]["commit"]
    assert first["commands"] == gpu.gpu_steps(CARD)[0].lines()
    assert (first["status"], second["status"], third["status"]) == ("passed", "passed", "not present")
    assert "the reason" in second["said"]
    assert third["note"] == "without no-such-program"


def test_steps_can_be_chosen_and_repeated(fake):
    done = run_here("bench/gpu.py", "--only", "first")
    assert (done.returncode, done.stderr) == (0, "")
    assert "second" not in done.stdout
    assert "first: at most 600 s" in done.stdout
    assert "first: at most" not in run_here("bench/gpu.py", "--only", "first").stdout
    assert "first: at most" in run_here("bench/gpu.py", "--only", "first", "--again", "first").stdout
    unknown = run_here("bench/gpu.py", "--again", "frist")
    assert_one_line_error(unknown, "unknown step frist; known: first, second, third")


def test_what_is_needed_and_missing_is_not_proved(fake, monkeypatch):
    needs = Step(name="needs", commands=(("python", "-c", ""),), needs=("no-such-program",))
    monkeypatch.setattr(gpu, "gpu_steps", lambda found: [needs])
    assert_one_line_error(run_here("bench/gpu.py"), "not proved: needs")
    assert not (fake / "results").exists()


def test_a_failure_leaves_no_result(fake):
    assert gpu.write_result(Outcome(step=STEPS["build"], status="failed"), CARD) is None
    assert not (fake / "results").exists()


def test_make_gpu_asks_for_a_gpu_first_and_installs_nothing_into_another_python():
    def shown(*words):
        command = ["make", "--no-print-directory", "-n", "gpu", *words]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        return [line.strip() for line in done.stdout.splitlines()]

    assert shown("PYTHON=/opt/python3", "AGAIN=ops bench", "ONLY=ops bench build") == [
        "PYTHONPATH=. python3 bench/gpu.py --check",
        "PYTHONPATH=. /opt/python3 bench/gpu.py --only ops bench build --again ops bench",
    ]
    first, second, *_, last = shown()
    assert first == "PYTHONPATH=. python3 bench/gpu.py --check"
    assert second.endswith("setup")
    assert last == "PYTHONPATH=. .venv/bin/python bench/gpu.py"
