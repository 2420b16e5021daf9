"""Threads that share one computation, and BLAS's own beside them."""

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from threadpoolctl import ThreadpoolController

from pmm.utils import threads
from pmm.utils.threads import in_threads, single_blas_thread


def blas_threads():
    np.zeros((2, 2)) @ np.zeros((2, 2))
    return [library.num_threads for library in ThreadpoolController().select(user_api="blas").lib_controllers]


def test_parts_are_done_at_once_and_given_back_in_order():
    meeting = threading.Barrier(3, timeout=10)

    def work(part):
        meeting.wait()
        return part * 10

    before = threading.active_count()
    assert in_threads(work, [1, 2, 3]) == [10, 20, 30]
    assert threading.active_count() == before
    assert in_threads(len, []) == []
    with pytest.raises(ZeroDivisionError):
        in_threads(lambda part: 1 // part, [1, 0])


def test_blas_has_its_threads_again_after_the_last_of_overlapping_blocks():
    threads._blas.cache_clear()  # which knows what was loaded when it was first asked
    before, inside, leave = blas_threads(), threading.Barrier(2, timeout=10), threading.Event()

    def first():
        with single_blas_thread():
            inside.wait()
            leave.wait(10)

    with ThreadPoolExecutor(1) as pool:
        done = pool.submit(first)
        inside.wait()
        with single_blas_thread():
            assert set(blas_threads()) <= {1}
        assert set(blas_threads()) <= {1}, "the other block has not ended"
        leave.set()
        done.result(10)
    assert blas_threads() == before
