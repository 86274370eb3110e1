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
    lengths = np.linalg.norm((A - B).numpy(), axis=1)
    assert float(reconstruction_loss(A, B)) == pytest.approx(lengths.mean(), rel=1e-5)
    assert float(reconstruction_loss(A, B, "mse")) == pytest.approx(float(((A - B) ** 2).mean()), rel=1e-5)
    with pytest.raises(ValueError, match="l2 or mse"):
        reconstruction_loss(A, B, "l3")


@pytest.mark.parametrize("gamma", [2.0, 0.0])
def test_focal_follows_equation_8(gamma: float) -> None:
    p = LOGITS.softmax(1).numpy()
    p_t = np.where(MASK[:, 0].numpy() == 1, p[:, 1], p[:, 0])
    expected = -((1 - p_t) ** gamma) * np.log(p_t)
    assert float(focal_loss(LOGITS, MASK, gamma)) == pytest.approx(expected.mean(), rel=1e-5)


def test_dice_follows_equation_9_over_the_batch_and_is_defined_without_anomaly() -> None:
    p, nothing = LOGITS.sigmoid()[:, :1], torch.zeros(1, 1, 4, 4)
    expected = 1 - (2 * float((p * MASK).sum()) + 1) / (float(p.sum()) + float(MASK.sum()) + 1)
    assert float(dice_loss(p, MASK)) == pytest.approx(expected, rel=1e-5)
    assert float(dice_loss(MASK, MASK)) == float(dice_loss(nothing, nothing)) == pytest.approx(0)


def test_gradients_stay_finite_where_nothing_differs_and_for_any_confidence() -> None:
    same, logits = A.clone().requires_grad_(), torch.tensor([[1e4, -1e4]]).reshape(1, 2, 1, 1).requires_grad_()
    total_loss({"rec": reconstruction_loss(same, A), "focal": focal_loss(logits, torch.ones(1, 1, 1, 1))}).backward()
    for leaf in (same, logits):
        assert leaf.grad is not None
        assert bool(torch.isfinite(leaf.grad).all())


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_a_pixel_that_is_surely_right_has_no_focal_gradient(gamma: float) -> None:
    logits = torch.tensor([[[[0.0]], [[40.0]]]], requires_grad=True)
    focal_loss(logits, torch.ones(1, 1, 1, 1), gamma).backward()
    assert logits.grad is not None
    assert logits.grad.abs().max() < 1e-17


def test_dice_refuses_a_mask_that_would_broadcast() -> None:
    with pytest.raises(ValueError, match=r"the map is \(2, 1, 3, 3\) and the mask \(2, 3, 3\): expected one shape"):
        dice_loss(torch.zeros(2, 1, 3, 3), torch.zeros(2, 3, 3))
