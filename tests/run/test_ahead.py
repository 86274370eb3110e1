"""Work that runs ahead of whoever takes its results."""

import threading
from collections.abc import Iterator

import pytest

from almrr_ref.run.ahead import THREADS, mapped_ahead


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
