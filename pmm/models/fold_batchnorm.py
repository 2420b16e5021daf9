"""Batch-norm folded into the convolution or linear layer before it, in fp32, before anything is cast or traced."""

from __future__ import annotations

from itertools import pairwise

from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)


def fold_batch_norms(module: nn.Module) -> nn.Module:
    """Fold, in place, every batch-norm of an eval-mode module.

    Pairs are neighbours in a Sequential, or attributes convN and bnN, as in torchvision's ResNets. Raises ValueError if
    a batch-norm is left over: the graph would not be the one that was promised.
    """
    for child in [module, *module.modules()]:
        names = list(child._modules)
        pairs = list(pairwise(names)) if isinstance(child, nn.Sequential) else []
        pairs += [(name, name.replace("conv", "bn")) for name in names if name.startswith("conv")]
        for first, second in pairs:
            layer, norm = child._modules.get(first), child._modules.get(second)
            if isinstance(norm, nn.BatchNorm2d) and isinstance(layer, nn.Conv2d):
                child._modules[first], child._modules[second] = fuse_conv_bn_eval(layer, norm), nn.Identity()
            elif isinstance(norm, nn.BatchNorm1d) and isinstance(layer, nn.Linear):
                child._modules[first], child._modules[second] = fuse_linear_bn_eval(layer, norm), nn.Identity()
    left = [name for name, child in module.named_modules() if isinstance(child, _BATCH_NORMS)]
    if left:
        raise ValueError(f"batch-norm without a layer to fold it into: {', '.join(left)}")
    return module
