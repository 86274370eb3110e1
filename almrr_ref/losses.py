"""The training losses, ALMRR Eqs. (7)-(11).

Deviations: Eq. (7) is averaged over positions and images (the text says "averaged", the formula sums); the focal loss
takes logits, which is the same function but finite for any confidence; dice is taken over the whole batch, because
for a single clean image, whose mask is empty, it would be 1 whatever the map says.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def reconstruction_loss(reconstructed: Tensor, clean: Tensor, kind: str = "l2") -> Tensor:
    """Distance of the reconstruction from the clean features: two (b, c, h, w) -> scalar. Eq. (7).

    Args:
        reconstructed: F_hat, (b, c, h, w).
        clean: phi, (b, c, h, w).
        kind: "l2", the mean over positions of the length of the error vector; "mse", the mean square over everything.
    """
    square = (reconstructed - clean).float().square()
    if kind == "mse":
        return square.mean()
    return square.sum(dim=1).add(1e-12).sqrt().mean()  # the tiny term keeps the gradient finite where the error is 0


def focal_loss(logits: Tensor, mask: Tensor, gamma: float = 2.0, alpha: float | None = None) -> Tensor:
    """Cross-entropy that fades for pixels that are already right: (b, 2, h, w), (b, 1, h, w) -> scalar. Eq. (8).

    Args:
        logits: normal and anomalous, (b, 2, h, w).
        mask: (b, 1, h, w) in {0, 1}.
        gamma: focusing exponent, >= 0.
        alpha: weight of anomalous pixels in (0, 1), normal ones getting 1 - alpha; None for no weights.
    """
    log_p = F.log_softmax(logits.float(), dim=1).gather(1, mask.long())
    loss = -((1 - log_p.exp()) ** gamma) * log_p
    if alpha is not None:
        loss = loss * (alpha * mask + (1 - alpha) * (1 - mask))
    return loss.mean()


def dice_loss(anomaly_map: Tensor, mask: Tensor) -> Tensor:
    """One minus the overlap of map and mask over the batch: two (b, 1, h, w) in [0, 1] -> scalar. Eq. (9).

    A one is added above and below the fraction, so that a batch without any anomaly has a defined loss.
    """
    anomaly_map, mask = anomaly_map.float(), mask.float()
    overlap = (anomaly_map * mask).sum()
    return 1 - (2 * overlap + 1) / (anomaly_map.sum() + mask.sum() + 1)


def total_loss(parts: dict[str, Tensor]) -> Tensor:
    """L_total = L_rec + L_ref with L_ref = L_focal + L_dice. Eqs. (10), (11)."""
    return torch.stack(list(parts.values())).sum()
