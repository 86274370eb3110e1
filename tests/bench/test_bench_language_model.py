"""bench/language_model.py in a short form: it learns, and the fast scan leads where the step-by-step one does."""

import language_model
import pytest


def test_the_loss_falls_as_with_the_reference() -> None:
    fast, slow = (language_model.train(steps=30, slow=slow, d=32, batch=2, length=24) for slow in (False, True))
    assert fast == pytest.approx(slow, abs=1e-3)
    assert sum(fast[-5:]) < 0.9 * sum(fast[:5])
    assert fast[0] == pytest.approx(5.5, abs=0.5)  # log 256: nothing learnt yet
