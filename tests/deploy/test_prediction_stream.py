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


@pytest.mark.parametrize("ahead", [1, THREADS, 4 * THREADS])
def test_work_is_at_most_so_far_ahead_and_an_error_ends_everything(ahead: int) -> None:
    taken: list[int] = []
    results: list[tuple[int, int]] = []

    def items() -> Iterator[int]:
        for item in range(1000):
            taken.append(item)
            yield item

    def work(item: int) -> int:
        if item == 7:
            raise KeyError(item)
        return item

    before = threading.active_count()
    with pytest.raises(KeyError, match="7"):
        results.extend((result, len(taken)) for result in mapped_ahead(work, items(), ahead))
    assert [result for result, _ in results] == list(range(7))
    assert all(count <= result + ahead for result, count in results)
    assert len(taken) <= 7 + ahead
    assert threading.active_count() == before
