"""Curves: every figure of metrics.jsonl where its epoch is; files that are none are refused."""

import dataclasses
import json

import pytest
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from pmm.presets import preset
from pmm.utils.errors import InvalidFile, InvalidValue
from pmm.visualize.curves import MAX_RUNS, Panels, curves_picture, read_run
from pmm.visualize.style import LINES
from tests.refusals import refuses


def records(epochs=4, stages=3, validation=True, shift=0.0):
    found = []
    for epoch in range(1, epochs + 1):
        record = {"epoch": epoch}
        for stage in range(1, stages + 1):
            record |= {f"triplet{stage}": 2 / epoch + stage + shift, f"cross_entropy{stage}": 5 / epoch + stage + shift}
        record |= {"loss": 10 / epoch, "lr": 1e-3 * epoch, "seconds": 1.5}
        if validation and epoch % 2 == 0:
            record |= {"val_mAP": 0.8 - 0.1 * epoch, "val_rank1": 0.9}
        found.append(record)
    return found


def write(folder, lines):
    folder.mkdir(parents=True)
    text = "".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines)
    (folder / "metrics.jsonl").write_text(text)
    return folder


def colours(picture):
    return {colour for _, colour in picture.getcolors(1 << 24)}


def configured(folder, method, epochs):
    """A run's folder, with the configuration of a method."""
    base = preset("tiny", method)
    config = dataclasses.replace(base, recipe=dataclasses.replace(base.recipe, epochs=epochs))
    (folder / "config.json").write_text(json.dumps(config.to_dict()))
    return folder


def rgb(colour):
    return tuple(round(255 * part) for part in to_rgb(colour))


def test_a_run_is_read_figure_by_figure(tmp_path):
    run = read_run(write(tmp_path / "first", records()))
    assert run.name == "first"
    assert run.curves["lr"] == ((1, 2, 3, 4), (1e-3, 2e-3, 3e-3, 4e-3))
    assert run.curves["val_mAP"][0] == (2, 4)
    assert run.per_head("triplet") == ["triplet1", "triplet2", "triplet3"]
    many = read_run(write(tmp_path / "many", [{"epoch": 1, "loss": 1.0, **{f"triplet{n}": n for n in (10, 2, 1)}}]))
    assert many.per_head("triplet") == ["triplet1", "triplet2", "triplet10"]


def test_a_run_that_is_writing_and_figures_that_are_not_finite(tmp_path):
    lines = [*records(2), {"epoch": 3, "loss": float("nan"), "lr": 1.0}, '{"epoch": 4, "lo']
    run = read_run(write(tmp_path / "run", lines))
    assert run.curves["loss"][0] == (1, 2)
    assert run.curves["lr"][0] == (1, 2, 3)


NO_EPOCHS = (
    "nonsense",
    "",
    "[1]",
    '{"loss": 1}',
    '{"epoch": 1.5, "loss": 1}',
    '{"epoch": 2, "loss": "x"}',
    '{"epoch": 2, "loss": null}',
)


@pytest.mark.parametrize("bad", NO_EPOCHS)
def test_a_line_that_is_no_epoch_is_named(tmp_path, bad):
    with refuses(InvalidFile, path=tmp_path / "run/metrics.jsonl", problem="line 2 "):
        read_run(write(tmp_path / "run", [records(1)[0], bad + "\n", records(3)[2]]))
    with refuses(InvalidFile, path=tmp_path / "alone/metrics.jsonl", problem="line 1 "):
        read_run(write(tmp_path / "alone", [bad + "\n"]))


def test_what_is_no_run(tmp_path):
    with refuses(InvalidFile, path=tmp_path / "nowhere", problem="no such run", expected="runs/NAME"):
        read_run(tmp_path / "nowhere")
    with refuses(InvalidFile, path=tmp_path / "metrics.jsonl", expected="the metrics of a run of pmm train"):
        read_run(tmp_path)
    with refuses(InvalidFile, path=tmp_path / "empty/metrics.jsonl", problem="no epoch"):
        read_run(write(tmp_path / "empty", []))
    run = read_run(write(tmp_path / "run", records()))
    with refuses(InvalidValue, value=MAX_RUNS + 1, expected=f"{MAX_RUNS} at most", hint="--runs"):
        curves_picture([run] * (MAX_RUNS + 1))


def drawn(method, *runs):
    """What one panel shows: x, y, colour and stroke of each line."""
    figure = Figure()
    axes = figure.add_subplot()
    getattr(Panels(runs), method[0])(axes, *method[1:])
    lines = [
        (list(line.get_xdata()), list(line.get_ydata()), line.get_color(), line.get_linestyle()) for line in axes.lines
    ]
    return lines, [text.get_text() for text in axes.texts]


def test_one_runs_stages_differ_in_colour(tmp_path):
    run = read_run(write(tmp_path / "run", records()))
    lines, _ = drawn(("losses", "triplet"), run)
    assert [line[0] for line in lines] == [[1, 2, 3, 4]] * 3
    assert [line[1][3] for line in lines] == [1.5, 2.5, 3.5]
    assert [line[2] for line in lines] == list(LINES[:3])
    lines, texts = drawn(("accuracy",), run)
    assert lines[0][:2] == ([2, 4], pytest.approx([60, 40]))
    assert lines[1][:2] == ([2, 4], pytest.approx([90, 90]))
    assert lines[2][:2] == ([2], pytest.approx([60])), "the dot is at the best epoch"
    assert texts == ["best 60.0%, epoch 2"]
    lines, _ = drawn(("rate",), run)
    assert lines[0][1] == [1e-3, 2e-3, 3e-3, 4e-3]
    assert lines[0][2] not in LINES, "the rate belongs to no stage"


def test_runs_differ_in_colour_and_their_stages_in_stroke(tmp_path):
    runs = [read_run(write(tmp_path / name, records(stages=n, shift=n))) for name, n in (("a", 1), ("b", 3))]
    lines, _ = drawn(("losses", "cross_entropy"), *runs)
    assert [line[2] for line in lines] == [LINES[0], *[LINES[1]] * 3]
    assert [line[3] for line in lines] == ["-", "-", "--", ":"]
    assert lines[1][1][0] == 9.0
    picture = curves_picture(runs)
    assert picture.mode == "RGB"
    assert {rgb(LINES[0]), rgb(LINES[1])} <= colours(picture)
    assert rgb(LINES[2]) not in colours(picture)


def test_runs_of_one_name_are_numbered(tmp_path):
    run = read_run(write(tmp_path / "run", records()))
    long = dataclasses.replace(run, name="a-name-that-is-much-too-long-for-a-legend-7")
    names = [each.name for each in Panels([run, long, run]).runs]
    assert names[0] == "run (1)"
    assert names[2] == "run (2)"
    assert len(names[1]) <= 26
    assert names[1].endswith("legend-7")


def test_a_single_epoch_and_no_held_out_identities(tmp_path):
    run = read_run(write(tmp_path / "run", records(1, validation=False)))
    assert drawn(("accuracy",), run) == ([], ["no identities were held out"])
    figure = Figure()
    Panels([run]).losses(axes := figure.add_subplot(), "triplet")
    assert {line.get_marker() for line in axes.lines} == {"."}, "one point makes no line"
    assert rgb(LINES[0]) in colours(curves_picture([run]))


def without_triplets(**more):
    return [
        {key: value for key, value in record.items() if not key.startswith("triplet")} | more for record in records()
    ]


@pytest.mark.parametrize(
    ("more", "panels"),
    [({}, []), ({"overlap": 0.4}, ["overlap"]), ({"least_part": 0.2, "overlap": 1.0}, ["overlap", "least_part"])],
)
def test_a_loss_that_a_method_has_not_has_no_panel(tmp_path, more, panels):
    run = read_run(write(tmp_path / "run", without_triplets(**more)))
    assert Panels([run]).names() == ["cross_entropy", *panels, "accuracy", "rate"]
    other = read_run(write(tmp_path / "other", records()))
    assert Panels([run, other]).names() == ["cross_entropy", "triplet", *panels, "accuracy", "rate"]
    for name in panels:
        assert drawn(("draw", name), run)[0][0][:2] == ([1, 2, 3, 4], [more[name]] * 4)
    assert curves_picture([run]).width == curves_picture([other]).width


def test_the_line_of_a_phase_is_where_it_begins(tmp_path):
    folder = configured(write(tmp_path / "run", without_triplets()), "aos", 4)
    run = read_run(folder)
    assert run.head == "classifier"
    assert run.phases == ((2, "occluded crops"),)
    figure = Figure()
    Panels([run]).phases(axes := figure.add_subplot(), named=True)
    assert axes.lines[0].get_xdata() == [2.5, 2.5]
    assert [text.get_text() for text in axes.texts] == ["occluded crops"]
    Panels([run, run]).phases(several := figure.add_subplot(), named=True)
    assert not several.lines, "whose would it be"


def test_the_best_is_one_of_the_last_phase(tmp_path):
    run = read_run(configured(write(tmp_path / "run", records(8)), "aos", 8))
    lines, texts = drawn(("accuracy",), run)
    assert lines[2][:2] == ([6], pytest.approx([20])), "mAP falls from epoch 2 on"
    assert texts == ["best 20.0%, epoch 6"]
    begun = read_run(configured(write(tmp_path / "begun", records(4)), "aos", 8))
    assert len(drawn(("accuracy",), begun)[0]) == 2


@pytest.mark.parametrize(("method", "head"), [("pmm", "stage I"), ("pcb", "part 1"), ("cama", "branch 1")])
def test_classifiers_have_the_names_of_the_method(tmp_path, method, head):
    run = read_run(configured(write(tmp_path / "run", records()), method, 4))
    figure = Figure()
    Panels([run]).legend(figure)
    assert figure.legends[0].get_texts()[0].get_text() == head
    other = read_run(write(tmp_path / "other", records()))
    Panels([run, other]).legend(figure)
    assert (figure.legends[1].get_texts()[2].get_text() == "classifier 1") == (method != "pmm")


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"model": {"method": "another"}}'])
def test_a_configuration_that_cannot_be_read_hides_no_curve(tmp_path, content):
    folder = write(tmp_path / "run", records())
    (folder / "config.json").write_text(content)
    assert read_run(folder).curves["lr"][0] == (1, 2, 3, 4)
