from collections import Counter

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from pmm.data.sampler import PKSampler
from pmm.utils.errors import InvalidInput, InvalidValue
from tests.conftest import examples
from tests.refusals import refuses


@examples(60)
@given(
    st.lists(st.integers(1, 7), min_size=2, max_size=12), st.integers(2, 4), st.integers(2, 5), st.integers(0, 2**31)
)
def test_batches_are_p_by_k(counts, p, k, seed):
    labels = [label for label, count in enumerate(counts) for _ in range(count)]
    if len(counts) < p:
        too_few = refuses(InvalidInput, f"has {len(counts)} identities", expected="2 or more")
        too_large = refuses(
            InvalidValue, f"has {len(counts)} identities", value=p * k, expected=f"{len(counts) * k} or "
        )
        with too_few if len(counts) < 2 else too_large:
            PKSampler(labels, p, k, seed)
        return
    sampler = PKSampler(labels, p, k, seed)
    batches = list(sampler)
    assert len(batches) == len(sampler) == len(counts) // p
    seen = []
    for batch in batches:
        of_batch = Counter(labels[index] for index, _, _ in batch)
        assert sorted(of_batch.values()) == [k] * p
        seen += of_batch
        for label in of_batch:
            images = [index for index, _, _ in batch if labels[index] == label]
            assert len(set(images)) == k or counts[label] < k
    assert len(seen) == len(set(seen))  # an identity comes once per epoch
    positions = [position for batch in batches for _, _, position in batch]
    assert positions == list(range(len(positions)))
    assert batches == list(sampler)


def test_epochs_and_seeds_differ():
    labels = [label for label in range(20) for _ in range(4)]
    sampler = PKSampler(labels, 4, 2, seed=0)
    first = list(sampler)
    sampler.epochs = range(1, 2)
    assert [i for b in list(sampler) for i, _, _ in b] != [i for b in first for i, _, _ in b]
    assert list(PKSampler(labels, 4, 2, seed=1)) != first


def test_market_has_23_iterations_an_epoch():
    assert len(PKSampler([label for label in range(751) for _ in range(4)], 32, 4, 0)) == 23


def test_epochs_follow_each_other_in_the_order_of_each_alone():
    labels = [label for label in range(7) for _ in range(3)]
    sampler = PKSampler(labels, 2, 2, seed=5)
    sampler.epochs, sampler.first = range(3, 6), 1
    expected = []
    for epoch in (3, 4, 5):
        rng = np.random.default_rng([5, 2, epoch])
        people = rng.permutation(7)[:6]
        picks = [3 * person + rng.choice(3, 2, replace=False) for person in people]
        batches = [[*picks[place], *picks[place + 1]] for place in (0, 2, 4)]
        keys = [[(index, epoch, 4 * n + place) for place, index in enumerate(batch)] for n, batch in enumerate(batches)]
        expected += keys[1:] if epoch == 3 else keys
    assert list(sampler) == expected
    assert len(sampler) == 3
