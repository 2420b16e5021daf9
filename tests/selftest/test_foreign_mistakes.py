"""Each mistake, made by a client that knows nothing of us, is named from its embeddings alone: of a trained and of an
untrained model, and of files that take floats and bytes."""

import itertools
from pathlib import Path

import pytest
import torch

from pmm.export.onnx import export_onnx
from pmm.export.options import ExportOptions, VerifyOptions
from pmm.selftest.run import judge_embeddings, open_selftest, write_images
from tests.selftest.foreign import CLIENTS, ROUNDED, open_bare

INEXACT = {"area", "bgr_area", "padded"}
"""OpenCV and PIL round, and centre, in their own way."""
BOTH = [(kind, trained) for kind in CLIENTS for trained in (True, False)]
MORE = (
    {"normalize": True, "flip_tta": True},
    {"precision": "fp16"},
    {"precision": "int8"},
    {"precision": "int8", "target": "cpu"},
)


@pytest.fixture(scope="module")
def models(trained, tmp_path_factory):
    """A checkpoint by whether it was trained."""
    from pmm.artifacts import checkpoint
    from pmm.artifacts.trained_model import read_model

    network = read_model(trained).model
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for module in network.modules():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
    path = tmp_path_factory.mktemp("untrained") / "untrained.pth"
    torch.save({**checkpoint.load(trained), "model": network.state_dict()}, path)
    return {True: trained, False: path}


def verdicts(artifact: Path, kind: str, folder: Path):
    """Of a client that does it right, and of one for each mistake."""
    paths = write_images(open_selftest(artifact), folder)
    client, mistakes = CLIENTS[kind]
    session = open_bare(artifact)
    right = judge_embeddings(artifact, client(session, paths))
    return right, {name: judge_embeddings(artifact, client(session, paths, name)) for name in mistakes}


@pytest.mark.parametrize(("kind", "trained_before"), BOTH)
def test_in_fp32_every_mistake_is_named(models, shared, kind, trained_before, tmp_path):
    options, out = ExportOptions(input=kind), tmp_path / "model.onnx"
    if trained_before:
        out = shared.onnx(options)
    else:
        export_onnx(models[False], out, options, VerifyOptions(no_verify=True))
    right, wrong = verdicts(out, kind, tmp_path / "crops")
    assert right.passed
    assert right.undecidable == ()
    if kind == "float":
        session, paths = open_bare(out), sorted((tmp_path / "crops").iterdir())
        for rounding in ROUNDED:
            verdict = judge_embeddings(out, CLIENTS[kind][0](session, paths, rounding))
            assert (verdict.passed, len(verdict.advice)) == (True, 1)
    assert {name: verdict.mistakes for name, verdict in wrong.items()} == {name: (name,) for name in wrong}
    assert not any(verdict.passed or verdict.or_one_of for verdict in wrong.values())
    assert all(verdict.exact for name, verdict in wrong.items() if name not in INEXACT)
    assert all(len(verdict.advice) == 1 and "; " in verdict.advice[0] for verdict in wrong.values())


@pytest.mark.slow
@pytest.mark.parametrize(("way", "options"), itertools.product(BOTH, MORE), ids=str)
def test_with_other_contracts_and_precisions_none_gets_another_name(models, way, options, tmp_path):
    kind, trained_before = way
    out = tmp_path / "model.onnx"
    export_onnx(models[trained_before], out, ExportOptions(input=kind, **options), VerifyOptions(no_verify=True))
    right, wrong = verdicts(out, kind, tmp_path / "crops")
    assert right.passed
    harmless = {name for name in open_selftest(out).vectors.impossible if name in wrong}
    assert harmless == ({"mirrored"} if options.get("flip_tta") else set())
    for name, verdict in wrong.items():
        if verdict.passed:
            assert name in (*verdict.undecidable, *harmless)
        elif verdict.mistakes:
            assert name in (verdict.mistakes[0], *verdict.or_one_of)
    named = [name for name, verdict in wrong.items() if verdict.mistakes[:1] == (name,)]
    assert len(named) >= len(wrong) - 2, "8 bits clip pixels of 0..255 like those that were not divided"
    if "precision" not in options:
        assert named == [name for name in wrong if name not in harmless]
