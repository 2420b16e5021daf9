"""Time a whole training step of preset paper in bf16 against fp32; the gradients of every layer are compared first.

python -m bench.lab.bf16_step [--batch 8] [--threads N] [--clock cpu] [--out FILE.json]

Both steps are those of `pmm.train` with --amp, on random crops, in turns. Each layer's gradients are compared alone, on
the input and the output's gradient that it has in fp32: this takes the place of the gradients of a whole step, which
say nothing of the arithmetic. Features of a network that has hardly been trained are almost collinear, so rounding is
magnified until other triplets are the hardest. Those gradients are reported, after TRAINED steps in fp32, and judge
nothing.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from bench.lab.mix_report import heading, interval, timing
from pmm.config import fast_mode
from pmm.utils import command_line
from pmm.utils.arguments import Arg
from pmm.utils.errors import InvalidValue
from pmm.utils.files import output_file, write_file
from pmm.utils.hardware import cuda_index, usable_cores

if TYPE_CHECKING:
    from torch import Tensor, nn

    from pmm.training.state import TrainState

PROG = "bench.lab.bf16_step"
OUT = Path("runs/ops-bench/bf16-step.json")
MIN_COSINE = 0.99
"""Of the layers' gradients in bf16 with those in fp32, the median, for the steps to be timed."""
MAX_RATIO = 0.6
"""Time of a step in bf16 over one in fp32, where products in bf16 are at least twice as fast."""
LEAST_SPEEDUP = 2.0
"""Of a product in bf16 on a CPU, for MAX_RATIO to be expected there."""
SCHEMA = "pmm-bf16-step-bench-1"
TRAINED = 10
"""Steps in fp32 before the gradients of a whole step are reported."""
NAMES = {"off": "fp32", "bf16": "bf16"}


@dataclass(frozen=True, kw_only=True)
class Bf16StepCommand:
    """`python -m bench.lab.bf16_step ...`"""

    batch: int = 8
    """Images per step."""
    device: str = "auto"
    """Where to measure: auto, cpu, cuda, or cuda:N for the GPU of that number."""
    threads: Annotated[int, Arg(least=0)] = 0
    """CPU threads (0: all cores)."""
    clock: Literal["wall", "cpu"] = "wall"
    """What is measured: wall time, or the time of this process on all cores, for a machine that others use too."""
    samples: Annotated[int, Arg(least=0)] = 0
    """Steps of each (0: 30)."""
    budget: float = 0.0
    """Most seconds for each, which then has fewer steps (0: 100)."""
    out: Path = OUT
    """JSON file to write."""

    def __post_init__(self) -> None:
        if not self.budget >= 0:
            raise InvalidValue("budget", self.budget, "seconds, or 0 for the default")
        if self.clock == "cpu" and cuda_index(self.device) is not None:
            raise InvalidValue("clock", self.clock, "wall, for a GPU")


def main(prog: str) -> int:
    """Entry point; 1 if gradients in bf16 are others, or a step takes longer than MAX_RATIO allows."""
    command = command_line.parse(Bf16StepCommand, prog=prog, description=__doc__ or "")
    out = output_file(command.out)
    report = bench_bf16(command)
    write_file(out, json.dumps(report, indent=1) + "\n")
    print("\n".join([*lines(report), *missed(report), f"report: {out}"]))
    return int(not report["equal"] or (bool(missed(report)) and not fast_mode()))


def missed(report: dict[str, Any]) -> list[str]:
    """The target that the times miss, in words; on a CPU only where it multiplies fast enough in bf16."""
    ratio, speedup = report.get("ratio", {"ratio": 0.0})["ratio"], report["speedup of a product"]
    slow = ratio > MAX_RATIO and (speedup is None or speedup >= LEAST_SPEEDUP)
    return [f"a step in bf16 takes {ratio:.2f} of one in fp32; expected {MAX_RATIO} at most"] if slow else []


def bench_bf16(command: Bf16StepCommand) -> dict[str, Any]:
    """Compare the gradients of each layer, then time a step in each precision, from the same weights, in turns.

    Raises BackendUnavailable on a device that emulates bf16, InvalidValue for a batch that is not identities times
    images.
    """
    import torch

    from bench.lab.mix_timing import name_of, stopwatch
    from bench.lab.training_step import random_crops, step_config, step_plan
    from pmm.bench.latency import measure
    from pmm.bench.statistics import median_ratio
    from pmm.models.registry import build_model
    from pmm.runtime.eager import torch_device
    from pmm.training.precision import bf16_speedup, describe_precision
    from pmm.training.state import in_train_mode, make_train_state
    from pmm.training.step import set_deterministic, train_step

    device, threads = torch_device(command.device), command.threads or usable_cores()
    torch.set_num_threads(threads)
    plan = step_plan(command.samples, command.budget)
    steps: dict[str, Callable[[], object]] = {}
    states: dict[str, TrainState] = {}
    computed: dict[str, str] = {}
    layers: dict[str, float] = {}
    for amp, name in NAMES.items():
        config = step_config(command.batch, "resnet10" if fast_mode() else "resnet50", amp)  # type: ignore[arg-type]
        set_deterministic(device, config.recipe.deterministic)
        torch.manual_seed(0)
        states[name] = state = in_train_mode(make_train_state(build_model(config), config, device, 1), 1)
        steps[name] = partial(train_step, state, random_crops(config, device))
        if amp == "off":
            with layers_compared(state.model, layers):
                steps[name]()
        computed[name] = describe_precision(config, device)
    median = statistics.median(layers.values())
    report: dict[str, Any] = {
        **heading(name_of(device), threads, plan),
        "schema": SCHEMA,
        "step": {"preset": config.preset, "backbone": config.model.backbone, "batch": command.batch},
        "clock": command.clock,
        "deterministic": config.recipe.deterministic,
        "precisions": computed,
        "speedup of a product": bf16_speedup() if device.type == "cpu" else None,
        "cosines": {"median": median, "least": min(layers.values()), "layers": layers},
        "whole step": whole_step(states, steps, 1 if fast_mode() else TRAINED),
        "equal": median >= MIN_COSINE,
    }
    if not report["equal"]:
        return report
    times = measure(steps, plan, stopwatch=_cpu_ms if command.clock == "cpu" else stopwatch(device))
    ratio = median_ratio(times["bf16"], times["fp32"], block=plan.block)
    return report | {"rows": {name: timing(found) for name, found in times.items()}, "ratio": interval(ratio)}


def whole_step(
    states: Mapping[str, TrainState], steps: Mapping[str, Callable[[], object]], trained: int
) -> dict[str, float]:
    """The cosines of the weights' gradients of a whole step in bf16 with those in fp32, after `trained` steps in fp32:
    the median, and the least."""
    import torch

    for _ in range(trained):
        steps["fp32"]()
    start = {key: value.clone() for key, value in states["fp32"].model.state_dict().items()}
    found = []
    for name, state in states.items():
        state.model.load_state_dict(start)
        steps[name]()
        found.append([weight.grad.flatten() for weight in state.model.parameters() if weight.grad is not None])
    cosines = [float(torch.cosine_similarity(one, other, 0)) for one, other in zip(*found, strict=True)]
    return {"trained": trained, "median": statistics.median(cosines), "least": min(cosines)}


@contextmanager
def layers_compared(model: nn.Module, cosines: dict[str, float]) -> Iterator[None]:
    """During a step of `model` in fp32, add to `cosines` for each convolution and linear layer the cosine of its
    weight's gradients in fp32 and in bf16."""
    import torch

    def compare(name: str, layer: nn.Module, x: Tensor, gradient: Tensor) -> None:
        found = []
        for half in (False, True):
            with torch.enable_grad(), torch.autocast(x.device.type, torch.bfloat16, enabled=half, cache_enabled=False):
                output = layer.forward(x)
            (of_weight,) = torch.autograd.grad(output, layer.weight, gradient.to(output.dtype))  # type: ignore[arg-type]
            found.append(of_weight.flatten())
        cosines[name] = float(torch.cosine_similarity(found[0], found[1], 0))

    def watch(name: str) -> Callable[..., None]:
        def hook(layer: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
            output.register_hook(partial(compare, name, layer, inputs[0].detach()))

        return hook

    handles = [
        layer.register_forward_hook(watch(name))
        for name, layer in model.named_modules()
        if isinstance(layer, torch.nn.Conv2d | torch.nn.Linear)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def lines(report: dict[str, Any]) -> list[str]:
    """The report in words."""
    step, cosines = report["step"], report["cosines"]
    head = f"training step of {step['preset']}, {step['backbone']}, batch {step['batch']}, on {report['device']}"
    found = [
        head,
        f"gradients of each layer alone, cosine with fp32: median {cosines['median']:.5f}, "
        f"least {cosines['least']:.5f}; this takes the place of those of a whole step, in which rounding is magnified "
        f"until other triplets are the hardest (after {report['whole step']['trained']} steps their median is "
        f"{report['whole step']['median']:.5f})",
    ]
    if not report["equal"]:
        return [*found, f"not timed: the median is below {MIN_COSINE}"]
    ratio, speedup = report["ratio"], report["speedup of a product"]
    found += [f"{name}: {row['p50_ms']:.0f} ms ({report['clock']} time)" for name, row in report["rows"].items()]
    bounds = f" ({ratio['interval'][0]:.2f}-{ratio['interval'][1]:.2f})" if ratio["interval"] else ""
    found.append(f"bf16 over fp32: {ratio['ratio']:.2f}{bounds}")
    if speedup is not None and speedup < 1:
        found.append(f"this CPU multiplies in bf16 at {speedup:.2f} times the speed of fp32: --amp auto trains in fp32")
    return found


def _cpu_ms(step: Callable[[], object]) -> float:
    begin = time.process_time()
    step()
    return 1000 * (time.process_time() - begin)


if __name__ == "__main__":
    command_line.run(main, prog=PROG)
