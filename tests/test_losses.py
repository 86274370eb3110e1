"""The losses against their formulas, written out in numpy."""

import numpy as np
import pytest
import torch

from almrr_ref.losses import dice_loss, focal_loss, reconstruction_loss, total_loss

GENERATOR = torch.Generator().manual_seed(0)
A, B = (torch.randn(2, 5, 3, 4, generator=GENERATOR) for _ in range(2))
LOGITS = 3 * torch.randn(2, 2, 3, 4, generator=GENERATOR)
MASK = (torch.rand(2, 1, 3, 4, generator=GENERATOR) > 0.6).float()


def test_reconstruction_is_the_mean_length_of_the_error_vectors() -> None:
    lengths = [np.linalg.norm((A - B)[i, :, y, x].numpy()) for i in range(2) for y in range(3) for x in range(4)]
    assert float(reconstruction_loss(A, B)) == pytest.approx(np.mean(lengths), rel=1e-5)
    assert float(reconstruction_loss(A, B, "mse")) == pytest.approx(float(((A - B) ** 2).mean()), rel=1e-5)


def test_reconstruction_has_a_finite_gradient_where_nothing_differs() -> None:
    same = A.clone().requires_grad_()
    reconstruction_loss(same, A).backward()
    assert same.grad is not None
    assert bool(torch.isfinite(same.grad).all())


@pytest.mark.parametrize(("gamma", "alpha"), [(2.0, None), (0.0, None), (1.5, 0.25)])
def test_focal_follows_equation_8(gamma: float, alpha: float | None) -> None:
    p = LOGITS.softmax(1).numpy()
    m = MASK[:, 0].numpy()
    p_t = np.where(m == 1, p[:, 1], p[:, 0])
    weight = 1.0 if alpha is None else np.where(m == 1, alpha, 1 - alpha)
    expected = (-weight * (1 - p_t) ** gamma * np.log(p_t)).mean()
    assert float(focal_loss(LOGITS, MASK, gamma, alpha)) == pytest.approx(expected, rel=1e-5)


def test_focal_stays_finite_for_any_confidence() -> None:
    logits = torch.tensor([[1e4, -1e4]]).reshape(1, 2, 1, 1).requires_grad_()
    loss = focal_loss(logits, torch.ones(1, 1, 1, 1))
    loss.backward()
    assert np.isfinite(float(loss.detach()))
    assert logits.grad is not None
    assert bool(torch.isfinite(logits.grad).all())


def test_dice_is_zero_for_a_perfect_map_and_defined_without_anomaly() -> None:
    assert float(dice_loss(MASK, MASK)) == pytest.approx(0)
    assert float(dice_loss(torch.zeros(1, 1, 4, 4), torch.zeros(1, 1, 4, 4))) == pytest.approx(0)
    inside = float((LOGITS.sigmoid()[:, :1] * MASK).sum())
    expected = 1 - (2 * inside + 1) / (float(LOGITS.sigmoid()[:, :1].sum()) + float(MASK.sum()) + 1)
    assert float(dice_loss(LOGITS.sigmoid()[:, :1], MASK)) == pytest.approx(expected, rel=1e-5)


def test_total_is_the_plain_sum() -> None:
    assert float(total_loss({"rec": torch.tensor(1.0), "focal": torch.tensor(2.0), "dice": torch.tensor(4.0)})) == 7
