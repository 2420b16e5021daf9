"""What every method must do, whichever is registered: no test here names one."""

import dataclasses
import json
import signal

import pytest
import torch

from pmm.artifacts.checkpoint import load
from pmm.config import Config, ModelConfig
from pmm.models.backbone import map_size
from pmm.models.registry import METHODS, build_model, check_method_flags, check_network, deployed, method_of
from pmm.presets import PRESETS, preset
from pmm.recipe import RecipeConfig
from pmm.training.flags import TrainOptions
from pmm.training.launch import train
from pmm.training.losses import reid_losses
from pmm.utils.errors import ConflictingOptions, InvalidValue, TrainingInterrupted
from tests.conftest import ROOT, run_here
from tests.refusals import refuses

pytestmark = pytest.mark.parametrize("method", METHODS)

IMAGES, PIDS = torch.Size((6, 3, 64, 32)), torch.tensor([0, 0, 1, 1, 3, 3])


def config_of(method, name="tiny", **model):
    base = preset(name, method)
    model = dataclasses.replace(base.model, num_classes=4, **model)
    data = dataclasses.replace(base.data, height=64, width=32)
    return dataclasses.replace(base, model=model, data=data)


def model_of(method, name="tiny", **model):
    torch.manual_seed(0)
    return build_model(config_of(method, name, **model))


def test_every_key_it_reads_is_one_of_the_configuration(method):
    fields = (*dataclasses.fields(ModelConfig), *dataclasses.fields(RecipeConfig))
    assert set(METHODS[method].config_keys) <= {field.name for field in fields}


def test_a_flag_that_it_does_not_read_is_refused(method):
    config = config_of(method)
    flags = {"--" + key.replace("_", "-") for each in METHODS.values() for key in each.config_keys}
    read = {"--" + key.replace("_", "-") for key in METHODS[method].config_keys}
    check_method_flags(config, read | {"--epochs", "--method"})
    for flag in flags - read:
        users = [name for name in METHODS if flag[2:].replace("-", "_") in METHODS[name].config_keys]
        with refuses(ConflictingOptions, *users, options=(flag, "--method"), problem=method, hint="leave it out"):
            check_method_flags(config, {flag})


def test_blocks_must_fit_the_map_if_it_ranks_them(method):
    config = config_of(method, k=9, block=(1, 1))  # on a 4x2 map
    if METHODS[method].ranks_blocks:
        with refuses(InvalidValue, "8 at most", "1x1", "4x2", "64x32", name="--k", value=9):
            build_model(config)
        for block in ((5, 2), (4, 3)):
            with refuses(InvalidValue, "4 2 at most", "64x32", name="--block", value="{} {}".format(*block)):
                check_network(config_of(method, k=9, block=block))
        assert build_model(config_of(method, k=1, block=(5, 3)))  # as once it was trained
        check_network(config_of(method, k=1, block=(4, 2)))
        check_network(config_of(method, k=0, block=(5, 3)))
    else:
        assert build_model(config)


@pytest.mark.parametrize("size", [(128, 64), (96, 48), (101, 37)])
def test_every_size_follows_from_the_input(method, size):
    rows, _ = map_size("resnet10", *size)
    torch.manual_seed(0)
    config = config_of(method, block=(2, 1), parts=rows)
    data = dataclasses.replace(config.data, height=size[0], width=size[1])
    model = build_model(dataclasses.replace(config, data=data))
    output = model(torch.randn(6, 3, *size), PIDS)
    assert all(f.shape[0] == 6 for f in output.features)
    assert all(z.shape == (6, 4) for z in output.logits)
    sum(reid_losses(output, PIDS, label_smoothing=0.1).values()).backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert all(p.grad is not None and p.grad.isfinite().all() for p in trained)
    model.eval()
    with torch.inference_mode():
        assert model(torch.randn(6, 3, *size)).shape == (6, model.embedding_dim)


def test_the_same_generator_gives_the_same_output(method):
    model, images = model_of(method), torch.randn(IMAGES)
    first, again = (model(images, PIDS, torch.Generator().manual_seed(3)) for _ in range(2))
    torch.manual_seed(11)  # and without one the global generator
    one = model(images, PIDS)
    torch.manual_seed(11)
    for a, b in ((first, again), (one, model(images, PIDS))):
        assert all(map(torch.equal, a.features + a.logits, b.features + b.logits))
        for mine, others in zip(a.mixed, b.mixed, strict=True):
            assert mine is others is None or all(map(torch.equal, mine, others))
    assert all(p.grad is None for p in model.parameters())


def test_mixed_labels_are_of_another_identity_and_their_shares_are_shares(method):
    mixed = [m for m in model_of(method)(torch.randn(IMAGES), PIDS).mixed if m is not None]
    for labels in mixed:
        assert labels.partner_pids.dtype == torch.int64
        assert (labels.partner_pids != PIDS).all()
        assert set(labels.partner_pids.tolist()) <= set(PIDS.tolist())
        assert labels.anchor_share.shape == (6,)
        assert 0 <= labels.anchor_share.min() <= labels.anchor_share.max() <= 1


def test_a_batch_of_one_identity_is_mixed_with_itself_alone(method):
    model = model_of(method)
    output = model(torch.randn(IMAGES), torch.zeros(6, dtype=torch.int64))
    assert all(f.isfinite().all() for f in output.features)
    assert all((labels.partner_pids == 0).all() for labels in output.mixed if labels is not None)


def test_at_test_nothing_is_random_and_no_sample_sees_another(method):
    model, images = model_of(method).eval(), torch.randn(IMAGES)
    with torch.inference_mode():
        together = model(images)
        assert torch.equal(together, model(images))
        alone = torch.cat([model(image[None]) for image in images])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


def test_the_deployed_network_gives_the_same_embedding(method):
    model = model_of(method)
    model(torch.randn(8, 3, 128, 64), torch.arange(8) // 2)  # moves the running statistics
    model.eval()
    images = torch.randn(5, 3, 128, 64)
    with torch.inference_mode():
        torch.testing.assert_close(deployed(model)(images), model(images), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_training_is_one_graph_to_the_compiler(method):
    """Nothing that is drawn is read back, so a GPU does not wait. The trunk, which all have, test_strong.py has too."""
    model = model_of(method)
    model.backbone.trunk = torch.nn.Conv2d(3, 64, 16, stride=16)
    graphs = torch._dynamo.explain(model)(torch.randn(IMAGES), PIDS)
    assert graphs.graph_break_count == 0


@pytest.mark.parametrize("name", PRESETS)
def test_it_takes_every_preset(method, name):
    with torch.device("meta"):
        model = build_model(preset(name, method))
    assert model.embedding_dim > 0


@pytest.mark.slow
def test_a_resumed_run_ends_with_the_bits_of_an_uninterrupted_one(method, shared, tmp_path, monkeypatch):
    """In make test, test_train.py shows it of pmm, with all that a loader of several processes adds."""
    import pmm.training.trainer

    whole = shared.run(method)
    original, calls = pmm.training.trainer.train_step, []

    def stops_in_the_second(state, *args, **kwargs):
        calls.append(1)
        if len(calls) == state.steps_per_epoch + 1:
            signal.raise_signal(signal.SIGTERM)
        return original(state, *args, **kwargs)

    config, out = Config.from_dict(load(whole)["config"]), tmp_path / "run"
    assert config.model.method == method
    monkeypatch.setattr(pmm.training.trainer, "train_step", stops_in_the_second)
    with pytest.raises(TrainingInterrupted):
        train(config, out, TrainOptions(device="cpu"))
    state = load(out / "last.pth")
    assert (state["epoch"], state["progress"]["steps"]) == (1, 1)
    monkeypatch.undo()
    train(config, out, TrainOptions(device="cpu", resume=True))
    found, expected = (load(path)["model"] for path in (out / "last.pth", whole.with_name("last.pth")))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in found)


def test_the_page_of_methods_has_its_command(method):
    assert f"--method {method}" in (ROOT / "docs/methods.md").read_text()
    assert method_of(config_of(method)) is METHODS[method]


@pytest.mark.full
def test_the_bench_measures_it(method, shared, tmp_path):
    done = run_here(
        "bench/run.py", shared.run(method), "--backends", "torch,ort-cpu", "--precisions", "fp32,int8", "--out",
        tmp_path / "report", PMM_FAST="1",
    )  # fmt: skip
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    assert report["checkpoint"]["method"] == method, done.stderr
    results = {result["name"]: result for result in report["results"]}
    assert results["ort-cpu fp32"]["status"] == results["ort-cpu int8"]["status"] == "ok", results
    assert results["ort-cpu fp32"]["min_cosine"] >= 0.99999
