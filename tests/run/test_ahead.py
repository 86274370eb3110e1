"""Work that runs ahead of whoever takes its results."""

import itertools
import threading
from collections.abc import Iterator

import pytest

from almrr_ref.run.ahead import THREADS, in_batches, mapped_ahead


def test_results_keep_the_order_of_the_items_though_a_later_one_is_done_first() -> None:
    """The first item waits for the second: it would wait for ever if they did not run side by side."""
    second_done = threading.Event()

    def work(item: int) -> int:
        if item == 1:
            second_done.set()
        assert item or second_done.wait(60)
        return item

    assert list(mapped_ahead(work, range(50), ahead=4)) == list(range(50))


@pytest.mark.parametrize("ahead", [1, THREADS, 4 * THREADS])
def test_no_item_is_taken_further_ahead_and_an_error_comes_out_in_its_place_and_ends_everything(ahead: int) -> None:
    taken: list[int] = []

    def items() -> Iterator[int]:
        for item in range(1000):
            taken.append(item)
            yield item

    def work(item: int) -> int:
        if item == 7:
            raise KeyError(item)
        return item

    before = threading.active_count()
    results = mapped_ahead(work, items(), ahead)
    assert [next(results) for _ in range(7)] == list(range(7))
    with pytest.raises(KeyError, match="7"):
        next(results)
    assert len(taken) <= 7 + ahead
    assert threading.active_count() == before


@pytest.mark.parametrize("fine", [0, 3, 20])
def test_items_that_fail_come_behind_the_results_of_those_before(fine: int) -> None:
    def items() -> Iterator[int]:
        yield from range(fine)
        raise OSError("camera unplugged")

    results: list[int] = []
    batches = in_batches(mapped_ahead(abs, items(), ahead=8), 4)
    with pytest.raises(OSError, match="camera unplugged"):
        results.extend(itertools.chain.from_iterable(batches))
    assert results == list(range(fine))


def test_batches_are_of_one_size_but_the_last() -> None:
    assert list(in_batches(range(7), 3)) == [[0, 1, 2], [3, 4, 5], [6]]
    assert list(in_batches(range(6), 3)) == [[0, 1, 2], [3, 4, 5]]
