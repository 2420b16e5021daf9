import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pmm.ops import sample_partners


@given(st.lists(st.integers(0, 3), max_size=12), st.integers(0, 2**31))
def test_partner_is_another_identity_where_there_is_one(pids, seed):
    pids = torch.tensor(pids, dtype=torch.int64)
    partner = sample_partners(pids, torch.Generator().manual_seed(seed))
    assert partner.dtype == torch.int64
    for i, j in enumerate(partner.tolist()):
        if (pids != pids[i]).any():
            assert pids[j] != pids[i]
        else:
            assert j == i


def test_uniform_over_the_other_identities_entries():
    pids = torch.tensor([5, 9, 5, 1, 9, 9])
    generator = torch.Generator().manual_seed(0)
    draws = torch.stack([sample_partners(pids, generator) for _ in range(6000)])
    for i in range(6):
        allowed = (pids != pids[i]).nonzero().flatten().tolist()
        counts = torch.bincount(draws[:, i], minlength=6).double()
        expected = 6000 / len(allowed)
        # chi-square with at most 4 degrees of freedom: 23.5 is its 99.99th percentile
        assert ((counts[allowed] - expected) ** 2 / expected).sum() < 23.5
        assert counts.sum() == counts[allowed].sum()
    together = (draws[:, 0] * 6 + draws[:, 2]).bincount(minlength=36)
    assert (together > 0).sum() == 16  # anchors of one identity draw independently


def test_generator_decides():
    pids = torch.arange(50)
    a, b, c = (sample_partners(pids, torch.Generator().manual_seed(s)) for s in (1, 1, 2))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


def test_shape_is_checked():
    with pytest.raises(ValueError, match=r"it must be \[N\]"):
        sample_partners(torch.zeros(2, 2))


def test_compiled_it_draws_the_same_for_every_batch_size():
    compiled = torch.compile(sample_partners, fullgraph=True, backend="aot_eager", dynamic=True)
    for n in (6, 8, 12, 31):
        pids = torch.arange(n) // 3
        draws = []
        for draw in (sample_partners, compiled):
            torch.manual_seed(n)
            draws.append(draw(pids))
        assert torch.equal(*draws)
