"""Predictions in a stream: work runs ahead, results keep their order, an error comes out, nothing starts after it."""

import threading
from collections.abc import Iterator

import pytest

from almrr_ref.deploy.inference import THREADS, mapped_ahead


def test_results_keep_the_order_of_the_items_though_a_later_one_is_done_first() -> None:
    """The first item waits for the second: it would wait for ever if they did not run side by side."""
    second_done = threading.Event()

    def work(item: int) -> int:
        if item == 0:
            assert second_done.wait(60)
        if item == 1:
            second_done.set()
        return item

    assert list(mapped_ahead(work, range(50), ahead=4)) == list(range(50))


def test_items_are_taken_at_most_so_far_ahead() -> None:
    taken: list[int] = []

    def items() -> Iterator[int]:
        for item in range(100):
            taken.append(item)
            yield item

    for result in mapped_ahead(lambda item: item, items(), ahead=5):
        assert len(taken) <= result + 5
    assert len(taken) == 100


@pytest.mark.parametrize("ahead", [1, THREADS, 4 * THREADS])
def test_an_error_comes_out_in_place_of_its_result_and_ends_everything(ahead: int) -> None:
    begun: list[int] = []

    def work(item: int) -> int:
        begun.append(item)
        if item == 7:
            raise KeyError(item)
        return item

    before = threading.active_count()
    with pytest.raises(KeyError, match="7"):
        list(mapped_ahead(work, range(1000), ahead))
    assert len(begun) <= 7 + ahead
    assert threading.active_count() == before
