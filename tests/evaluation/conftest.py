"""Ranks by numpy, and by compiled functions."""

import pytest

from pmm.evaluation import distances, ranks
from pmm.evaluation.compiled import rank_kernel


@pytest.fixture(scope="module", params=["numpy", "compiled"])
def in_numpy_and_compiled(request):
    """For a module whose tests hold for both; gives whether it is compiled."""
    compiled = request.param == "compiled"
    if compiled and rank_kernel() is None:
        pytest.skip("no compiled ranks here")
    with pytest.MonkeyPatch.context() as patch:
        if not compiled:
            for module in (distances, ranks):
                patch.setattr(module, "rank_kernel", lambda: None)
        yield compiled
