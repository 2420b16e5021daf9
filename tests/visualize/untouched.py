"""A model that must be left as it was."""

from contextlib import contextmanager

import torch


@contextmanager
def untouched(model):
    """Mode of each module, weights, buffers, gradients and torch's generator are the same afterwards."""
    model.train()
    model.backbone.eval()  # one mode for all would not be what was
    modes = [module.training for module in model.modules()]
    state = {key: value.clone() for key, value in model.state_dict().items()}
    generator = torch.get_rng_state()
    yield
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(torch.get_rng_state(), generator)
    assert torch.is_grad_enabled()
