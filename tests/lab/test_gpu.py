"""The list of tasks of `make gpu` cannot rot, and without a GPU the command refuses and writes nothing."""

import dataclasses
import functools
import importlib
import json
import re
import runpy
import subprocess
import sys

import pytest

from bench.lab import gpu, gpu_table, gpu_tasks
from pmm.ablation.study import Ablation
from pmm.models.registry import METHODS
from pmm.training.flags import parse
from pmm.utils import command_line, hardware, task_runner
from pmm.utils.build_info import build_info
from pmm.utils.hardware import Gpu
from pmm.utils.task_runner import Task, TaskOutcome
from tests.conftest import ROOT, assert_one_line_error, run_here, run_python

CARD = Gpu("NVIDIA A10 (24 GB)", "8.6")
TASKS = {task.name: task for task in gpu_tasks.gpu_tasks(CARD)}
COMMANDS = [(task.name, command) for task in TASKS.values() for command in task.commands]


def listed(*folders):
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*"))


def test_without_a_gpu_it_is_one_line_and_nothing_is_written(monkeypatch):
    see(monkeypatch)
    before = listed("runs", "bench/results")
    for flags in ((), ("--check",), ("--again", "ops")):
        done = run_here("-m", "bench.lab.gpu", *flags)
        assert_one_line_error(done, "make gpu: error: no NVIDIA GPU is visible", "CUDA_VISIBLE_DEVICES")
        assert (done.returncode, done.stdout) == (1, "")
    assert listed("runs", "bench/results") == before


def test_the_command_itself_needs_no_package():
    script = (
        "import sys; sys.path.insert(0, '.')\n"
        "from pmm.utils import hardware; hardware.nvidia_gpus = tuple\n"
        "import runpy; runpy.run_module('bench.lab.gpu', run_name='__main__')"
    )
    done = run_python("-S", "-c", script)  # without site-packages
    assert_one_line_error(done, "no NVIDIA GPU")


def parsed(words):
    """The command line `SCRIPT ...` or `-m MODULE ...`, by the flags of the module that it runs."""
    target, *rest = words[1:] if words[0] == "-m" else words
    main = importlib.import_module(target).main if words[0] == "-m" else runpy.run_path(str(ROOT / target))["main"]
    (flags,) = (kind for name, kind in vars(sys.modules[main.__module__]).items() if name.endswith("Command"))
    return command_line.parse_args(flags, rest, prog=target, description="")


@functools.cache
def collected(*commands):
    """The tests that pytest's command lines choose, for each of them; collected in one other process."""
    script = f"import pytest\nfor words in {commands!r}:\n    print(end='\\0'); pytest.main([*words, '--collect-only'])"
    done = run_python("-c", script)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.split("\0")[1:]


def out_of(name):
    """The folder of a task."""
    return f"{gpu_table.folder_of(CARD).relative_to(ROOT).as_posix()}/{name}"


def words_of(command):
    """Of pytest's command line; where it names no folder, what it is for lies here, and the slow test looks in all."""
    words = command[command.index("pytest") + 1 :]
    return words if "--ignore" not in words else (*words, "tests/runtime/test_runners.py")


def chosen_by(found, words):
    """Asserts that a command line of pytest chose the tests that it is for."""
    ours = ("hard_mix", "mixed_cam") if "--ignore" not in words else ("an_engine_on_a_gpu",)
    tests = gpu_tasks.SANITIZED.split(" or ") if "-k" in words else ours
    assert [test for test in tests if test not in found] == [], found


@pytest.mark.parametrize(
    ("name", "command"),
    [  # tests are collected for a few seconds
        pytest.param(*each, marks=pytest.mark.slow if "pytest" in each[1] else ()) for each in COMMANDS
    ],
    ids=[f"{name}-{k}" for k, (name, _) in enumerate(COMMANDS)],
)
def test_every_command_line_parses(name, command):
    words = list(command)
    if words[0] == "compute-sanitizer":
        words = words[words.index("python") :]
        assert command[:4] in [("compute-sanitizer", "--error-exitcode", "86", "--tool")]
    assert words.pop(0) == "python"
    if words[:2] == ["-m", "pmm.train"]:
        config = parse(words[2:]).config
        assert (config.preset, config.data.dataset, config.model.weights) == ("paper", "synthetic", "auto")
    elif words[:3] == ["-m", "pmm", "info"]:
        assert words[3:] == [f"{out_of(name)}/model.plan"]
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
        parsed(words)


@pytest.mark.slow
def test_all_tests_are_collected():
    ((_, command),) = [(name, command) for name, command in COMMANDS if name == "tests"]
    (found,) = collected(command[3:])
    chosen_by(found, command)


def test_steps_use_what_earlier_steps_make_and_write_into_their_own_folders():
    made = set()
    for task in TASKS.values():
        assert set(task.inputs) | set(task.optional_inputs) <= made | {gpu_tasks.KERNELS}, task.name
        made |= set(task.outputs)
        own = [path for path in task.outputs if path != gpu_tasks.KERNELS]
        assert all(path.startswith(f"{out_of(task.name)}/") for path in own), task.name
        assert task.limit_s <= 600


def test_the_kernels_are_required_where_they_are_measured_and_taken_where_they_speed_up():
    for name in ("tests-ops", "memcheck", "racecheck", "ops-float32", "ops-step"):
        assert TASKS[name].env["PMM_REQUIRE_EXT"] == "1"
        assert gpu_tasks.KERNELS in TASKS[name].inputs
    for name in ("tests", "throughput-bf16", "training", "ablation-1"):
        assert "PMM_REQUIRE_EXT" not in TASKS[name].env
        assert (TASKS[name].inputs, TASKS[name].optional_inputs) == ((), (gpu_tasks.KERNELS,))
    assert "TORCH_CUDA_ARCH_LIST" not in TASKS["build"].env, "the default has PTX too"
    assert ("nvcc" in TASKS["build"].requires, TASKS["build"].optional) == (True, True)


def test_the_ablation_takes_every_method_at_full_size_and_a_seed_more_with_each_step(monkeypatch):
    monkeypatch.setattr(hardware, "nvidia_gpus", lambda: (CARD,))
    found = []
    for task in (task for name, task in TASKS.items() if name.startswith("ablation-")):
        ((_, *words),) = task.commands
        found.append(parsed(words).options)
    assert [options.seeds for options in found] == [1, 1, 2, 2, 3, 3, 4, 4, 5, 5]
    assert len({dataclasses.replace(each, seeds=1, methods="") for each in found}) == 1  # each goes on from the last
    assert all(whole.methods.startswith(half.methods) for half, whole in zip(found[::2], found[1::2], strict=True))
    Ablation(found[0]).check_models()
    ablation = Ablation(found[1])
    ablation.check_models()
    assert ablation.against == "paper/baseline:amp=bf16"
    configs = ablation.configs.values()
    assert {config.model.method for config in configs} == set(METHODS) - {"cutout-sample"}
    assert {config.recipe.amp for config in configs} == {"bf16"}
    assert {config.model.backbone for config in configs} == {"resnet50"}
    assert [config.preset for config in configs].count("strong") == 1


def test_what_a_card_cannot_do_is_ruled_out_with_the_reason():
    assert [task.name for task in TASKS.values() if task.unsupported] == []
    hopper = {task.name: task for task in gpu_tasks.gpu_tasks(Gpu("NVIDIA H200", "9.0"))}
    unsupported = {name for name, task in hopper.items() if task.unsupported}
    assert unsupported == {name for name in TASKS if "-rtx-" in name}
    assert len(unsupported) == 10
    assert "compute capability 9.0" in hopper["engine-rtx-fp16"].unsupported
    assert hopper["bench-torch"].commands[0][2].startswith("runs/gpu/nvidia-h200/")
    turing = {task.name: task for task in gpu_tasks.gpu_tasks(Gpu("Tesla T4", "7.5"))}
    for name in ("ops-bfloat16", "throughput-bf16", "bench-tensorrt-tf32", "engine-bf16", "bench-ort-cuda-bf16"):
        assert "7.5" in turing[name].unsupported
    assert not turing["engine-fp16"].unsupported
    assert "fp16" in turing["training"].commands[0]
    assert "fp32,fp16" in turing["bench-torch"].commands[0]


def test_every_precision_has_an_engine_and_a_bench_of_its_own():
    for precision in ("fp32", "tf32", "fp16", "bf16", "int8"):
        for name in (f"engine-{precision}", f"engine-rtx-{precision}", f"bench-tensorrt-{precision}"):
            assert TASKS[name].optional
            assert ("tensorrt_rtx" if "rtx" in name else "tensorrt") in TASKS[name].requires
        build, show, check = TASKS[f"engine-{precision}"].commands
        command = parsed(build[1:])
        assert (command.engine.flavor, command.engine.tf32) == ("tensorrt", precision == "tf32")
        assert command.onnx.precision == ("fp32" if precision == "tf32" else precision)
        assert show[-1] == str(command.out) == check[check.index("engine") + 1]
        assert TASKS[f"bench-tensorrt-{precision}"].kept_files == ("artifacts",)


def test_another_gpu_is_the_only_one_that_its_steps_see(monkeypatch):
    for visible, seen in (("", "1"), ("3, 5", "5"), ("GPU-aa,GPU-bb", "GPU-bb")):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        found = gpu_tasks.gpu_tasks(CARD, 1)
        assert {task.env["CUDA_VISIBLE_DEVICES"] for task in found} == {seen}
        assert "CUDA_VISIBLE_DEVICES" not in gpu_tasks.gpu_tasks(CARD)[0].env


def test_missing_packages_are_one_line():
    tasks = [dataclasses.replace(TASKS["tests"], requires=("json", "no_pytest")), TASKS["build"]]
    tasks[1] = dataclasses.replace(tasks[1], requires=("no_pytest", "no_a|no_b"))
    assert (
        gpu_table.packages(tasks)
        == "packages: no_pytest is missing: no tests, build; no_a or no_b is missing: no build"
    )
    assert gpu_table.packages([dataclasses.replace(tasks[0], requires=())]) == "packages: nothing is missing"


def test_the_sources_count_and_not_what_lies_beside_them(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_table, "ROOT", tmp_path)
    for name in ("setup.py", "pmm/a.py", "cpp_ext/cuda/b.cu", "bench/results/r.json", "README.md"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("1")
    first = gpu_table.dependencies()
    assert json.loads(json.dumps(first)) == first
    for name in ("bench/results/r.json", "README.md"):
        (tmp_path / name).write_text("2")
        assert gpu_table.dependencies() == first
    for name in ("setup.py", "pmm/a.py", "cpp_ext/cuda/b.cu"):
        before = gpu_table.dependencies()
        (tmp_path / name).write_text("2")
        assert gpu_table.dependencies() != before


def see(monkeypatch, *cards):
    """The GPUs of this machine."""
    for module in (hardware, gpu):
        monkeypatch.setattr(module, "nvidia_gpus", lambda: cards)


FOUND = json.dumps({"schema": "pmm-gpu-check-1", "found": {"ms": 12.345, "same bits": True, "why": "a | b"}})
EPOCHS = r'{"images_per_s": 10.0}\n{"images_per_s": 20.0}\n'


def table_of(folder):
    """The rows of the one table in bench/results: task, status, what and figures."""
    ((path),) = (folder / "results").glob("*.md")
    assert re.fullmatch(r"\d{4}-\d\d-\d\d-nvidia-a10-24-gb\.md", path.name)
    head, rows = path.read_text().split("|---|---|---:|---|---|\n")
    assert head.startswith("NVIDIA A10 (24 GB) (compute capability 8.6), driver ")
    cells = [re.split(r"(?<!\\) ?\| ?", line) for line in rows.splitlines() if line.startswith("|")]
    return [(task, status, what, figures) for _, task, status, _, what, figures, _ in cells]


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """A repository with a card and three tasks; the second fails until the file `mended` is there."""
    python = ("python", "-c")
    tasks = [
        Task(
            name="first",
            commands=((*python, f"open('a.json', 'w').write('{FOUND}'); open('b.jsonl', 'w').write('{EPOCHS}')"),),
            outputs=("a.json", "b.jsonl"),
        ),
        Task(name="second", commands=((*python, "print('the reason'); open('mended')"),), inputs=("a.json",)),
        Task(name="third", commands=((*python, ""),), requires=("no-such-program",), optional=True),
    ]
    monkeypatch.setattr(gpu_table, "RESULTS", tmp_path / "results")
    for module in (gpu_table, gpu):
        monkeypatch.setattr(module, "ROOT", tmp_path)
    (tmp_path / "setup.py").touch()
    monkeypatch.setattr(gpu, "gpu_tasks", lambda found, index=None: tasks)
    see(monkeypatch, CARD)
    return tmp_path


def test_from_a_failure_to_results_named_after_the_card(fake):
    done = run_here("-m", "bench.lab.gpu")
    assert_one_line_error(done, "second (failed, exit code 1: python -c")
    assert "second.log:" in done.stdout
    assert "the reason" in done.stdout
    day = r"\d{4}-\d\d-\d\d-nvidia-a10-24-gb-"
    assert [re.sub(day, "", path.name) for path in (fake / "results").glob("*.json")] == ["first.json"]
    of_first = [
        ("first", "passed", "ms", "12.3"),
        ("", "", "same bits", "yes"),
        ("", "", "why", r"a \| b"),
        ("", "", "2 epochs", "median 15 images/s"),
    ]
    rows = table_of(fake)
    assert rows[:4] == of_first
    assert rows[4][:2] == ("second", "failed")
    assert rows[4][3].startswith("exit code 1: python -c")
    assert rows[5:] == [("third", "not proved", "", "without no-such-program")]
    assert all(figures in done.stdout for *_, figures in rows)
    assert "1 of 3 tasks proved" in done.stdout
    (fake / "mended").touch()
    done = run_here("-m", "bench.lab.gpu")
    assert done.returncode == 0, done.stderr
    assert "first: at most" not in done.stdout
    assert table_of(fake)[:6] == [*of_first, ("second", "passed", "", ""), rows[5]]
    found = {re.fullmatch(day + r"(\w+)\.json", path.name)[1]: path for path in (fake / "results").glob("*.json")}
    first, second = (json.loads(found[name].read_text()) for name in ("first", "second"))
    assert first["files"] == {"a.json": json.loads(FOUND), "b.jsonl": [{"images_per_s": 10.0}, {"images_per_s": 20.0}]}
    assert first["environment"]["kernels"] == build_info()
    assert "driver" in first["environment"]
    assert first["environment"]["commit"]
    assert first["commands"] == gpu.gpu_tasks(CARD)[0].lines()
    assert (first["status"], second["status"], set(found)) == ("passed", "passed", {"first", "second"})
    assert "the reason" in second["said"]


def test_what_is_interrupted_leaves_a_table_of_what_is_proved_and_goes_on(fake, monkeypatch):
    (fake / "mended").touch()
    with monkeypatch.context() as patch:
        patch.setattr(task_runner, "_call", interrupted_at("print('the reason')"))
        done = run_here("-m", "bench.lab.gpu")
    assert done.returncode == 130
    rows = table_of(fake)
    assert rows[0] == ("first", "passed", "ms", "12.3")
    assert rows[4:] == [("second", "not run", "", "not reached"), ("third", "not run", "", "not reached")]
    assert run_here("-m", "bench.lab.gpu").returncode == 0
    assert table_of(fake)[4] == ("second", "passed", "", "")


def interrupted_at(word):
    def call(command, *arguments):
        if word in command[-1]:
            raise KeyboardInterrupt
        return really(command, *arguments)

    really = task_runner._call
    return call


def test_a_step_that_is_chosen_alone_costs_the_table_nothing(fake):
    (fake / "mended").touch()
    run_here("-m", "bench.lab.gpu")
    before = table_of(fake)
    assert run_here("-m", "bench.lab.gpu", "--only", "second", "--again", "second").returncode == 0
    assert table_of(fake)[:5] == before[:5]


def test_steps_can_be_chosen_and_repeated(fake):
    done = run_here("-m", "bench.lab.gpu", "--only", "first")
    assert (done.returncode, done.stderr) == (0, "")
    assert "second: at most" not in done.stdout
    assert "first: at most 600 s" in done.stdout
    assert "first: at most" not in run_here("-m", "bench.lab.gpu", "--only", "first").stdout
    assert "first: at most" in run_here("-m", "bench.lab.gpu", "--only", "first", "--again", "first").stdout
    unknown = run_here("-m", "bench.lab.gpu", "--again", "frist")
    assert_one_line_error(unknown, "--again is 'frist'", "first, second or third", "did you mean first?")


def test_another_gpu_gives_its_name_to_folder_and_results(fake, monkeypatch):
    (fake / "mended").touch()
    see(monkeypatch, Gpu("A", "8.6"), CARD)
    done = run_here("-m", "bench.lab.gpu", "--device", "cuda:1")
    assert (done.returncode, done.stdout.splitlines()[0].partition(":")[0]) == (0, CARD.name)
    assert table_of(fake)
    assert_one_line_error(run_here("-m", "bench.lab.gpu", "--device", "cuda:2"), "GPU 2", "2 visible")
    assert_one_line_error(
        run_here("-m", "bench.lab.gpu", "--device", "cpu"), "--device is 'cpu'; expected cuda or cuda:N"
    )


def test_what_is_needed_and_missing_is_not_proved(fake, monkeypatch):
    needs = Task(name="needs", commands=(("python", "-c", ""),), requires=("no-such-program",))
    monkeypatch.setattr(gpu, "gpu_tasks", lambda found, index: [needs])
    assert_one_line_error(run_here("-m", "bench.lab.gpu"), "needs (not proved, without no-such-program)")
    assert table_of(fake) == [("needs", "not proved", "", "without no-such-program")]
    assert not list((fake / "results").glob("*.json"))


def test_a_failure_leaves_no_result(fake):
    assert gpu_table.write_result(TaskOutcome(task=TASKS["build"], status="failed"), CARD) is None
    assert not (fake / "results").exists()


def test_make_gpu_asks_for_a_gpu_first_and_installs_nothing_into_another_python():
    def shown(*words):
        command = ["make", "--no-print-directory", "-n", "gpu", *words]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        return [line.strip() for line in done.stdout.splitlines()]

    assert shown("PYTHON=/opt/python3", "AGAIN=ops bench", "ONLY=ops bench build", "DEVICE=cuda:1") == [
        "PYTHONPATH=. python3 -m bench.lab.gpu --check",
        "PYTHONPATH=. /opt/python3 -m bench.lab.gpu --device cuda:1 --only ops bench build --again ops bench",
    ]
    first, second, *_, last = shown()
    assert first == "PYTHONPATH=. python3 -m bench.lab.gpu --check"
    assert second.endswith("setup")
    assert last == "PYTHONPATH=. .venv/bin/python -m bench.lab.gpu"
