"""bench.lab.mix_kernels: its figures are of proved competitors, and what is wrong is refused."""

import json

import pytest
import torch
import torch.nn.functional as F

from bench.lab import mix_variants, training_step
from bench.lab.mix_reference import FORMATS, Maps, clear, clear_cams, defined_adjoint, defined_cells, make_case
from bench.lab.mix_report import DTYPES, LAYOUTS, PHASES, over_limits
from bench.lab.mix_variants import BLOCK, MIX_VARIANTS, ON_EMPTY, K, authors_mix, eager_mix
from pmm.models.registry import build_model
from pmm.models.stages import Head
from pmm.ops import _extension, hard_mix
from pmm.ops.block_ranking import replaced_cells
from pmm.ops.mixed_cam import cam
from tests.conftest import assert_one_line_error, run_here

compiled = pytest.mark.skipif(
    _extension.missing(torch.device("cpu")) is not None, reason="the kernels are not compiled"
)


def bench(tmp_path, *args, **env):
    """`bench.lab.mix_kernels ARGS` at tiny sizes and with one thread, and its report if it wrote one."""
    out = tmp_path / "ops.json"
    args = args if "--threads" in args else ("--threads", "1", *args)  # others have the other cores
    done = run_here("-m", "bench.lab.mix_kernels", "--out", out, *args, PMM_FAST="1", **env)
    return done, json.loads(out.read_text()) if out.exists() else None


MIX = ("--batches", "3", "--dtypes", "float32", "--layouts", "nchw", "--competitors", "authors,eager,ours")


@compiled
def test_every_setting_has_all_its_figures(tmp_path):
    done, report = bench(
        tmp_path, "--batches", "2,3", "--dtypes", "float32,bfloat16", "--competitors", "authors,eager,ours"
    )
    assert done.returncode == 0, done.stderr
    assert report["schema"] == "pmm-ops-bench-1"
    assert report["equal"] is True
    assert report["build"]["compiled"] is True
    assert report["environment"]["threads"] >= 1
    settings = [(s["batch"], s["dtype"], s["layout"]) for s in report["settings"]]
    assert settings == [
        (n, dtype, layout) for n in (2, 3) for dtype in ("float32", "bfloat16") for layout in ("nchw", "channels_last")
    ]
    for setting in report["settings"]:
        assert set(setting["ops"]) == {"mix", "mix+pool"}
        for result in setting["ops"].values():
            rows = {row["name"]: row for row in result["rows"]}
            assert list(rows) == ["authors", "eager", "ours", "kernels", "copy"]
            for name, row in rows.items():
                assert row["status"] == "timed"
                phases = {"copy": ("forward",), "kernels": ("forward", "backward")}.get(name, PHASES)
                assert all(row[phase]["p50_ms"] > 0 and len(row[phase]["samples_ms"]) >= 4 for phase in phases)
                assert row["proof"] or name == "copy"
            assert {(r["of"], r["phase"]) for r in result["ratios"]} == {
                (name, phase) for name in ("authors", "eager") for phase in PHASES
            }
            assert {(s["name"], s["phase"]) for s in result["shares"]} == {
                (name, phase) for name in ("authors", "eager", "ours", "kernels") for phase in ("forward", "backward")
            }
    assert done.stdout.count("| 3 bfloat16 channels_last |") == 2
    assert "share of copy: ours" in done.stdout


@compiled
def test_a_ratio_is_of_the_medians_shown(tmp_path):
    _, report = bench(tmp_path, *MIX, "--samples", "12")
    for result in report["settings"][0]["ops"].values():
        rows = {row["name"]: row for row in result["rows"]}
        for ratio in result["ratios"]:
            ours, other = (rows[name][ratio["phase"]]["p50_ms"] for name in ("ours", ratio["of"]))
            assert ratio["ratio"] == pytest.approx(other / ours)
            assert ratio["interval"][0] <= ratio["interval"][1]
        for share in result["shares"]:
            least = 0.5 if result is report["settings"][0]["ops"]["mix+pool"] else 1
            copy, mine = rows["copy"]["forward"]["p50_ms"], rows[share["name"]][share["phase"]]["p50_ms"]
            assert share["ratio"] == pytest.approx(least * copy / mine)


def off_in_one_cell(x, cam, partner):
    mixed = eager_mix(x, cam, partner).clone()
    mixed[-1, -1, 0, 0] += 1
    return mixed


class OneGradientTooMuch(torch.autograd.Function):
    @staticmethod
    def forward(ctx, mixed):
        return mixed.clone()

    @staticmethod
    def backward(ctx, dy):
        dy = dy.clone()
        dy[0, 0, 0, 0] += 1
        return dy


@compiled
@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (off_in_one_cell, "the forward result is not the definition's (1 of 9216 values differ, by 1 at most)"),
        (lambda *inputs: OneGradientTooMuch.apply(eager_mix(*inputs)), "the gradient is not the definition's (1 of"),
        (lambda *inputs: eager_mix(*inputs).double(), "torch.float64 [3, 16, 24, 8] instead of torch.float32"),
    ],
    ids=["forward", "gradient", "dtype"],
)
def test_a_wrong_competitor_is_refused(tmp_path, monkeypatch, wrong, said):
    monkeypatch.setitem(MIX_VARIANTS["mix"], "eager", lambda: wrong)
    done, report = bench(tmp_path, *MIX)
    assert done.returncode == 1
    assert said in done.stderr
    assert report["equal"] is False
    rows = {row["name"]: row for row in report["settings"][0]["ops"]["mix"]["rows"]}
    assert rows["eager"]["status"] == "wrong"
    assert not set(rows["eager"]) & set(PHASES)
    assert rows["ours"]["status"] == "timed"
    assert "| wrong |" in done.stdout


@compiled
def test_wrong_kernels_are_refused(tmp_path, monkeypatch):
    right = _extension.kernels(torch.device("cpu"))

    class Wrong:
        def __getattr__(self, name):
            return getattr(right, name)

        def adjoint(self, dy, replaced, partner, dx):
            right.adjoint(dy, replaced, partner, dx)
            dx[0, 0, 0, 0] += 1

    monkeypatch.setattr(_extension, "kernels", lambda device: Wrong())
    done, report = bench(tmp_path, *MIX)
    assert done.returncode == 1
    status = {row["name"]: row["status"] for row in report["settings"][0]["ops"]["mix"]["rows"]}
    assert status == {"authors": "timed", "eager": "timed", "ours": "wrong", "kernels": "wrong", "copy": "timed"}
    assert report["settings"][0]["ops"]["mix"]["ratios"] == []


@compiled
def test_a_compiler_that_fails_is_a_row_that_says_why(tmp_path, monkeypatch):
    def fails(*inputs):
        raise RuntimeError("no g++ here\nand more")

    monkeypatch.setattr(mix_variants, "compiled", lambda mix: fails)
    done, report = bench(tmp_path, *MIX[:-1], "compiled,ours")
    assert done.returncode == 0, done.stderr
    row = report["settings"][0]["ops"]["mix"]["rows"][0]
    assert (row["status"], row["reason"]) == ("unavailable", "RuntimeError: no g++ here")
    assert "| unavailable |" in done.stdout


@compiled
def test_steps_of_every_way(tmp_path):
    done, report = bench(tmp_path, "--step")
    assert done.returncode == 0, done.stderr
    assert report["equal"] is True
    assert report["step"]["batch"] == 8
    rows = {row["name"]: row for row in report["rows"]}
    assert list(rows) == ["no mixing", "ours", "eager", "authors"]
    assert all(row["step"]["p50_ms"] > 0 and row["proof"] for row in rows.values())
    pairs = [(ratio["of"], ratio["over"]) for ratio in report["ratios"]]
    assert pairs == [
        *((name, "ours") for name in ("no mixing", "eager", "authors")),
        *((name, "no mixing") for name in ("ours", "eager", "authors")),
    ]
    assert "| authors |" in done.stdout


def test_only_ours_runs_our_kernels(monkeypatch):
    def forbidden(device):
        raise AssertionError("a kernel was asked for")

    monkeypatch.setattr(_extension, "kernels", forbidden)
    model = build_model(training_step.step_config(8, "resnet10")).train()
    images, pids = torch.randn(8, 3, 192, 64), torch.arange(8) // 4
    for name, way in training_step.WAYS.items():
        if name == "ours":
            with pytest.raises(AssertionError, match="a kernel was asked for"):
                way(model, images, pids, None)
        else:
            way(model, images, pids, None)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_competitors_keep_the_layout(layout):
    """One that does not would pay for it in what follows, and its own reads would be scattered."""
    x = torch.randn(3, 4, 24, 8).contiguous(memory_format=FORMATS[layout])
    for mix in (authors_mix, eager_mix):
        assert mix(x, torch.rand(3, 24, 8), torch.tensor([1, 2, 0])).stride() == x.stride()


@compiled
def test_a_way_that_trains_something_else_is_refused(tmp_path, monkeypatch):
    ways = {"ours": training_step.with_our_kernels, "eager": training_step.without_mixing}
    monkeypatch.setattr(training_step, "WAYS", ways)
    done, report = bench(tmp_path, "--step")
    assert done.returncode == 1
    assert report["equal"] is False
    assert {row["name"]: row["status"] for row in report["rows"]} == {"ours": "timed", "eager": "wrong"}
    assert "step: eager has another result" in done.stderr


@compiled
@pytest.mark.slow
def test_a_ranking_that_is_decided_otherwise_once_is_no_other_result(tmp_path, monkeypatch):
    """As a near-tie among hundreds of rankings is, which sums in another order decide."""
    calls = []

    def way(*arguments):
        calls.append(arguments)
        return (training_step.without_mixing if len(calls) == 1 else training_step.with_our_kernels)(*arguments)

    monkeypatch.setattr(training_step, "WAYS", {"ours": training_step.with_our_kernels, "eager": way})
    done, report = bench(tmp_path, "--step")
    assert (done.returncode, report["equal"], done.stderr) == (0, True, "")
    assert {row["name"]: row["status"] for row in report["rows"]} == {"ours": "timed", "eager": "timed"}


@pytest.mark.parametrize(
    ("mixing", "speedup", "missed"),
    [(1.03, 3.0, []), (0.99, 9.0, []), (1.04, 3.1, ["our step"]), (1.0, 2.9, ["the authors'"]),
     (None, None, ["our step", "the authors'"])],
)  # fmt: skip
def test_limits_of_a_training_step(mixing, speedup, missed):
    rows = {("ours", "no mixing"): mixing, ("authors", "ours"): speedup, ("eager", "ours"): 1.0}
    report = {"ratios": [{"of": a, "over": b, "ratio": r} for (a, b), r in rows.items() if r is not None]}
    lines = over_limits(report)
    assert [line.startswith(start) for line, start in zip(lines, missed, strict=True)] == [True] * len(missed)


@compiled
@pytest.mark.slow
def test_limits_that_are_missed_fail_the_command(tmp_path):
    done, report = bench(tmp_path, "--step", "--limits", "--samples", "2")
    assert (done.returncode == 0) == (over_limits(report) == [])
    assert ("limit: " in done.stderr) == (over_limits(report) != [])


@pytest.mark.parametrize("shape", [(4, 5, 24, 8), (3, 2, 7, 5), (1, 1, 3, 2)])
def test_the_authors_procedure_is_the_reference(shape):
    """Also with edge blocks; K blocks are all there are on the smallest map."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator)
    n, _, h, w = shape
    cam = torch.rand(n, h, w, generator=generator)
    partner = torch.randint(n, (n,), generator=generator)
    if h * w > BLOCK[0] * BLOCK[1]:
        mixed, replaced = hard_mix(x, cam, partner, BLOCK, K, on_empty=ON_EMPTY)
    else:
        replaced = torch.ones(n, h, w, dtype=torch.bool)
        mixed = x[partner]
    assert torch.equal(authors_mix(x, cam, partner), mixed)
    assert torch.equal(defined_cells(cam), replaced)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_truth_is_the_references(dtype, layout):
    case = make_case(5, dtype, layout, Maps(channels=3), torch.device("cpu"))
    assert case.x.is_contiguous(memory_format=FORMATS[layout])
    assert clear(case.cam).all()
    assert torch.equal(case.replaced, replaced_cells(case.cam, BLOCK, K, ON_EMPTY))
    x = case.x.detach().double().requires_grad_()
    (dx,) = torch.autograd.grad(torch.where(case.replaced[:, None], x[case.partner], x), x, case.dy[0].double())
    assert torch.equal(case.dx[0].double(), dx)
    assert torch.equal(case.dx[1], defined_adjoint(case.dy[1], case.replaced, case.partner.tolist()))


def test_near_ties_are_drawn_again():
    cams = torch.rand(1, 24, 8)
    cams[0, :3, :2] = cams[0, 3:6, :2] = cams[0, 6:9, :2] = cams[0, 9:12, :2] = 2
    assert clear(cams).tolist() == [False]
    assert clear(clear_cams(50, 24, 8, torch.Generator().manual_seed(0))).all()


def test_the_cam_by_backward_is_the_closed_form():
    torch.manual_seed(0)
    head = Head(6, 8, 4, fan="fan_out").train()
    maps, pids = torch.randn(5, 6, 4, 3, requires_grad=True), torch.tensor([0, 3, 1, 1, 2])
    average = maps.mean((2, 3))
    found = training_step._cam_by_backward(maps, head(average)[1], pids)
    torch.testing.assert_close(found, cam(maps, head.cam_weights(average, pids, 12)))
    largest = F.adaptive_max_pool2d(maps, 1).flatten(1)
    found = training_step._cam_by_backward(maps, head(largest)[1], pids)
    torch.testing.assert_close(found, cam(maps, head.cam_weights(largest, pids, 12)))


@compiled
@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (("--batches", "0"), ("--batches is '0'", "at least 1")),
        (("--dtypes", "float64"), ("--dtypes is 'float64'", "float32, float16 or bfloat16")),
        (("--layouts", "nhwc"), ("--layouts is 'nhwc'", "channels_last")),
        (("--competitors", "theirs"), ("--competitors is 'theirs'", "authors")),
        (("--threads", "-1"), ("--threads is -1",)),
        (("--step", "--step-batch", "6"), ("--step-batch is 6", "multiple of 4")),
        (("--step", "--batches", "32"), ("--batches", "no effect with --step")),
        (("--step-batch", "8"), ("--step-batch", "no effect without --step")),
        (("--budget", "-1"), ("--budget is -1.0",)),
        (("--step-size", "6"), ("unknown flag --step-size",)),
    ],
)
def test_bad_input_is_one_line(tmp_path, args, expected):
    done, report = bench(tmp_path, *args)
    assert_one_line_error(done, *expected)
    assert report is None


@pytest.mark.parametrize("args", [(), ("--step",)], ids=["mix", "step"])
def test_without_kernels_there_is_nothing_to_prove(tmp_path, built_with, args):
    built_with()
    done, report = bench(tmp_path, *args)
    assert_one_line_error(done, "cpu", "not compiled", "pip install")
    assert report is None
