import numpy as np

from pmm.data.samples import evenly_spaced


def test_crops_are_taken_evenly_from_the_first_to_the_last():
    assert list(evenly_spaced(10, 4)) == [0, 3, 6, 9]
    assert list(evenly_spaced(3, 512)) == [0, 1, 2]
    chosen = np.array(evenly_spaced(12_936, 512))
    assert (chosen[0], chosen[-1], len(set(chosen))) == (0, 12_935, 512)
    assert set(np.diff(chosen)) == {25, 26}
