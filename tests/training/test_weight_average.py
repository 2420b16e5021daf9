"""The average of the weights over the steps."""

import pytest
import torch
from torch import nn

from pmm.training.weight_average import WeightAverage


def network(value, norm=nn.BatchNorm1d):
    net = nn.Sequential(nn.Linear(2, 2), norm(2))
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.fill_(value)
    return net


def after(net, average, value):
    """The average of the first weight after a step that leaves all weights at `value`."""
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.fill_(value)
    average.update()
    return float(average.module[0].weight[0, 0])


def test_it_is_exponential_and_forgets_the_first_weights_sooner():
    net = network(1.0)
    average = WeightAverage(net, 0.5)
    assert after(net, average, 2.0) == pytest.approx(1 * 2 / 11 + 2 * 9 / 11)  # decay (1 + 1) / (10 + 1)
    for _ in range(20):
        before = float(average.module[0].weight[0, 0])
        last = after(net, average, 3.0)
    assert last == pytest.approx(0.5 * before + 0.5 * 3.0)
    assert average.steps == 21


def test_batch_statistics_are_averaged_and_counters_copied():
    net = network(1.0)
    average = WeightAverage(net, 0.9)
    net(torch.randn(8, 2))
    average.update()
    own = average.module[1]
    torch.testing.assert_close(own.running_mean, net[1].running_mean * 9 / 11)
    assert own.num_batches_tracked == net[1].num_batches_tracked == 1
    assert not own.training
    assert not any(parameter.requires_grad for parameter in average.module.parameters())


def test_a_network_without_counters():
    net = network(1.0, nn.LayerNorm)
    assert after(net, WeightAverage(net, 0.5), 2.0) == pytest.approx(1 * 2 / 11 + 2 * 9 / 11)


def test_it_goes_on_to_the_bit():
    net = network(1.0)
    average = WeightAverage(net, 0.999)
    after(net, average, 2.0)
    state = average.state_dict()
    other = WeightAverage(net, 0.999)
    other.load_state_dict({**state, "model": {key: value.clone() for key, value in state["model"].items()}})
    assert after(net, average, 3.0) == float(average.module[0].weight[0, 0])
    other.update()
    assert all(
        torch.equal(a, b) for a, b in zip(*(m.module.state_dict().values() for m in (average, other)), strict=True)
    )
