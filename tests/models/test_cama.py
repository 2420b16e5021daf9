"""CAMA: the branches, and the penalty property by property, in float64."""

import copy
import dataclasses

import pytest
import torch

from pmm.artifacts import checkpoint
from pmm.artifacts.init_file import read_init_file
from pmm.artifacts.initial_weights import load_initial_weights
from pmm.data.crops import load_crops
from pmm.data.preprocessing import preprocessing_of
from pmm.data.readers import read_dataset
from pmm.data.samples import class_indices
from pmm.models.cama import class_evidence, overlap, soft_mask
from pmm.models.registry import build_model, check_network
from pmm.presets import preset
from pmm.training.losses import reid_losses
from pmm.utils.errors import InvalidValue
from pmm.visualize.cam import to_model
from tests.refusals import refuses

PIDS = torch.tensor([0, 0, 1, 1, 3, 3])
SIZES = [(24, 8, 57), (8, 4, 9)]


def model_of(name="tiny", **model):
    base = preset(name, "cama")
    torch.manual_seed(0)
    model = dataclasses.replace(base.model, **{"num_classes": 4, **model})
    return build_model(dataclasses.replace(base, model=model))


def images_of():
    return torch.randn(6, 3, 128, 64)


def active(rows, columns, cells):
    """A map [1, rows, columns] that is saturated: 50 in `cells`, -50 elsewhere."""
    flat = torch.full((rows * columns,), -50.0, dtype=torch.float64)
    flat[cells] = 50.0
    return flat.reshape(1, rows, columns)


def test_at_751_identities_it_has_58_063_936_parameters():
    with torch.device("meta"):
        model = model_of("paper", num_classes=751)
    assert sum(parameter.numel() for parameter in model.parameters()) == 58_063_936
    assert model.embedding_dim == 3 * 2048


@pytest.mark.parametrize(("rows", "columns", "k"), SIZES)
def test_maps_apart_cost_nothing_and_equal_ones_a_quarter_of_their_cells(rows, columns, k):
    apart = [active(rows, columns, range(place * k, (place + 1) * k)) for place in range(3)]
    assert overlap(apart) < 1e-40
    equal = 0.25 * k / (rows * columns)
    assert overlap([apart[0]] * 3) == pytest.approx(equal)
    for twice in ((0, 0, 1), (0, 1, 0), (1, 0, 0)):
        assert overlap([apart[place] for place in twice]) == pytest.approx(equal / 3), "one pair of three meets"


def test_at_the_next_value_masks_of_maps_apart_would_meet():
    """The trap: with the (k+1)-th value, which lies in the background, disjoint maps would be charged."""
    rows, columns, k = SIZES[1]
    one, other = (active(rows, columns, range(first, first + k)) for first in (0, k))

    def wrong(cam):
        cells = cam.flatten(1)
        return (cells - cells.topk(k + 1, 1).values[:, -1:]).sigmoid()

    assert (wrong(one) * wrong(other)).mean() > 0.3
    assert overlap([one, other]) < 1e-40


def test_maps_of_nothing_cost_a_quarter_with_finite_gradients():
    cams = [torch.zeros(2, 8, 4, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    penalty = overlap(cams)
    assert penalty.item() == pytest.approx(0.25)
    penalty.backward()
    assert cams[0].grad is None
    assert all(cam.grad.isfinite().all() for cam in cams[1:])


def test_a_constant_added_changes_nothing_and_gradients_sum_to_0():
    cams = [torch.randn(4, 8, 4, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    torch.testing.assert_close(overlap([cam + 5 for cam in cams]), overlap(cams))
    overlap(cams).backward()
    for cam in cams[1:]:
        assert cam.grad.flatten(1).sum(1).abs().max() < 1e-12
        assert cam.grad.abs().max() > 1e-5


def test_the_mask_is_at_the_kth_value():
    cam = torch.randn(3, 8, 4, dtype=torch.float64)
    mask = soft_mask(cam)
    assert (mask >= 0.5).sum(1).tolist() == [9, 9, 9]


def test_the_order_of_branches_decides_who_gives_way_not_the_value():
    cams = [torch.randn(4, 8, 4, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    torch.testing.assert_close(overlap(cams), overlap(cams[::-1]))
    assert [grad is None for grad in torch.autograd.grad(overlap(cams), cams, allow_unused=True)] == [True, False]
    assert [grad is None for grad in torch.autograd.grad(overlap(cams[::-1]), cams, allow_unused=True)] == [False, True]


def test_the_first_branch_gets_nothing_from_the_penalty():
    model = model_of()
    output = model(images_of(), PIDS)
    own = [*model.backbone.layer4.parameters(), *model.necks[0].parameters(), *model.classifiers[0].parameters()]
    own = [parameter for parameter in own if parameter.requires_grad]
    grads = torch.autograd.grad(output.penalties["overlap"], own, allow_unused=True, retain_graph=True)
    assert all(grad is None or not grad.any() for grad in grads)
    others = [p for place in (1, 2) for p in model.classifiers[place].parameters()]
    others += model.backbone.branches.parameters()
    for later in torch.autograd.grad(output.penalties["overlap"], others):
        assert later.any(), "evidence is a matter of the map and of the classifier"


def test_without_a_neck_the_evidence_sums_to_the_logit():
    maps, weights = torch.randn(5, 16, 8, 4, dtype=torch.float64), torch.randn(5, 16, dtype=torch.float64)
    logits = (maps.mean((2, 3)) * weights).sum(1)
    torch.testing.assert_close(class_evidence(maps, weights).mean((1, 2)), logits)


def test_the_evidence_is_that_for_the_identity_of_the_crop():
    model, pids = model_of(), torch.tensor([0, 1, 3])
    maps = [torch.randn(3, model.backbone.channels, 4, 2) for _ in range(3)]
    with torch.no_grad():
        cams = model.cams(maps, pids)
        for classifier, one, cam in zip(model.classifiers, maps, cams, strict=True):
            for sample, pid in enumerate(pids.tolist()):
                expected = (classifier.weight[pid][:, None, None] * one[sample]).sum(0)
                torch.testing.assert_close(cam[sample], expected, rtol=1e-4, atol=1e-5)


def test_without_the_penalty_each_branch_is_a_baseline_of_its_own():
    """One branch's gradients do not change with what the others are."""
    model = model_of(penalty=0.0)
    other = copy.deepcopy(model)
    for parameter in (*other.backbone.branches[0].parameters(), *other.classifiers[1].parameters()):
        torch.nn.init.normal_(parameter)
    images, grads = images_of(), []
    for each in (model, other):
        output = each(images, PIDS)
        assert not output.penalties
        losses = reid_losses(output, PIDS, label_smoothing=0.0)
        assert list(losses) == ["cross_entropy1", "cross_entropy2", "cross_entropy3"]
        sum(losses.values()).backward()
        grads.append([p.grad for part in (each.backbone.layer4, each.classifiers[0]) for p in part.parameters()])
    assert all(map(torch.equal, *grads))


def test_the_penalty_has_its_weight():
    images = images_of()
    one, five = (model_of(penalty=weight)(images, PIDS).penalties["overlap"] for weight in (1.0, 5.0))
    torch.testing.assert_close(5 * one, five)
    losses = reid_losses(model_of()(images, PIDS), PIDS, label_smoothing=0.0)
    assert "overlap" in losses


def test_evidence_is_summed_in_float32_under_mixed_precision():
    """Else a map's k-th largest value is one of a handful, and the masks of a third of the cells meet at 0.5."""
    maps, weights = torch.randn(5, 16, 8, 4), torch.randn(5, 16)
    with torch.autocast("cpu", torch.bfloat16):
        found = class_evidence(maps.bfloat16(), weights)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, class_evidence(maps.bfloat16(), weights))


def test_the_bias_of_the_necks_stays_0():
    model = model_of()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, 0.1)
    for _ in range(2):
        sum(reid_losses(model(images_of(), PIDS), PIDS, label_smoothing=0.0).values()).backward()
        optimizer.step()
    assert not any(neck.bias.any() for neck in model.necks)
    assert all((neck.weight != 1).any() for neck in model.necks)


def hard_overlap(penalty, images, pids):
    """The share of the most active 30 % of the cells that two branches have in common, after 25 steps."""
    model = model_of(penalty=penalty, num_classes=int(pids.max()) + 1).train()
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 5e-3)
    for _ in range(25):
        optimizer.zero_grad()
        batch = torch.randint(len(pids), (24,), generator=generator)
        sum(reid_losses(model(images[batch], pids[batch]), pids[batch], label_smoothing=0.0).values()).backward()
        optimizer.step()
    model.eval()
    with torch.no_grad():
        masks = [soft_mask(cam) >= 0.5 for cam in model.cams(model.backbone(images), pids)]
    pairs = [masks[a] & masks[b] for b in range(3) for a in range(b)]
    return float(torch.stack(pairs).sum() / (3 * masks[0].sum()))


def test_after_a_short_training_branches_with_the_penalty_share_fewer_cells(people):
    config = preset("tiny", "cama")
    samples = read_dataset("synthetic", people).train[:48]
    index = class_indices(samples)
    pids = torch.tensor([index[sample.pid] for sample in samples])
    size = preprocessing_of(config)
    images = to_model(model_of(), load_crops([sample.path for sample in samples], size), size)
    without, penalised = hard_overlap(0.0, images, pids), hard_overlap(5.0, images, pids)
    assert penalised < without - 0.1


@pytest.mark.parametrize(
    ("of", "kept"),
    [("file", set()), ("cama", {0, 1}), ("two branches", {0})],
)
def test_a_training_starts_from_any_file(tmp_path, of, kept):
    """Branches that the file lacks begin as copies of the layer that it has, and the table says so."""
    base = preset("tiny", "cama")
    config = dataclasses.replace(base, model=dataclasses.replace(base.model, num_classes=4, weights="none"))
    branches = 2 if of == "two branches" else 3
    saved = dataclasses.replace(config, model=dataclasses.replace(config.model, branches=branches))
    source = build_model(saved)
    path = tmp_path / "init.pth"
    if of == "file":
        names = {name: value for name, value in source.backbone.state_dict().items() if "branches" not in name}
        torch.save(names, path)
    else:
        torch.nn.init.normal_(source.backbone.branches[0].conv1.weight)
        nothing = dict.fromkeys(checkpoint.KEYS)
        checkpoint.save(path, {**nothing, "format": checkpoint.FORMAT, "model": source.state_dict(), "epoch": 1,
                               "config": saved.to_dict(), "best": -1.0, "versions": {}})  # fmt: skip
    torch.manual_seed(8)
    model = build_model(config)
    table = load_initial_weights(model, config, read_init_file(path, "resnet10"))
    first = source.backbone.layer4.state_dict()
    for place, branch in enumerate(model.backbone.branches):
        expected = source.backbone.branches[place].state_dict() if place in kept else first
        assert all(torch.equal(expected[name], value) for name, value in branch.state_dict().items())
    assert ("copies of what was taken" in table) == (len(kept) < 2)


@pytest.mark.parametrize("loaded", [True, False])
def test_all_branches_begin_with_the_layer_of_the_file(loaded):
    model = model_of()
    for parameter in model.backbone.layer4.parameters():
        torch.nn.init.normal_(parameter)
    names = set(model.state_dict()) if loaded else {name for name in model.state_dict() if "branches" not in name}
    before = copy.deepcopy(model.backbone.branches.state_dict())
    copies = model.weights_loaded(names)
    assert copies == set() if loaded else copies == {name for name in model.state_dict() if "branches" in name}
    first = model.backbone.layer4.state_dict()
    for branch in model.backbone.branches:
        assert all(torch.equal(first[key], value) for key, value in branch.state_dict().items()) != loaded
    if loaded:
        assert all(torch.equal(before[key], value) for key, value in model.backbone.branches.state_dict().items())


def test_a_backbone_without_a_last_layer_of_its_own_is_refused():
    base = preset("tiny", "cama")
    config = dataclasses.replace(base, model=dataclasses.replace(base.model, backbone="timm:resnet18"))
    with refuses(InvalidValue, "resnet50", name="--backbone", value="timm:resnet18"):
        check_network(config)
    with refuses(InvalidValue, name="penalty", value=-1.0):
        model_of(penalty=-1.0)


def test_the_embedding_has_length_1_and_each_branch_its_share():
    model = model_of().eval()
    with torch.no_grad():
        model.necks[1].weight.mul_(10)
        parts = model(images_of()).reshape(6, 3, -1)
    torch.testing.assert_close(parts.norm(dim=2), torch.full((6, 3), 3**-0.5))
