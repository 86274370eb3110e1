"""The training losses, Eqs. (7)-(11) of the paper.

Deviations: Eq. (7) is averaged over positions and images (the text says "averaged", the formula sums). Eq. (8) has no
alpha_t, for which the paper gives no value, and takes logits, so that it is finite for any confidence. Eq. (9) is taken
over the whole batch: for a single clean image, whose mask is empty, it would be 1 whatever the map says.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def reconstruction_loss(reconstructed: Tensor, clean: Tensor, kind: str = "l2") -> Tensor:
    """L_rec, the distance of F_hat from the clean features phi: two (b, c, h, w) -> scalar. Eq. (7).

    kind: "l2", the mean over positions of the length of the error vector; "mse", the mean square over everything.
    """
    if kind not in ("l2", "mse"):
        raise ValueError(f"kind must be l2 or mse, got {kind!r}")
    error = (reconstructed - clean).float().permute(0, 2, 3, 1)  # as it lies in memory: a CPU's gradient stays so
    return error.square().mean() if kind == "mse" else torch.linalg.vector_norm(error, dim=3).mean()


def focal_loss(logits: Tensor, mask: Tensor, gamma: float = 2.0) -> Tensor:
    """L_focal = mean of -(1 - p_t)^gamma log(p_t): (b, 2, h, w), (b, 1, h, w) -> scalar. Eq. (8).

    Args:
        logits: normal and anomalous; p_t is the probability of the class that the mask names.
        mask: in {0, 1}.
        gamma: focusing parameter, >= 0: the larger, the less count pixels that are already right.
    """
    log_p_t = F.log_softmax(logits.float(), dim=1).gather(1, mask.long())
    wrong = (1 - log_p_t.exp()).clamp(min=torch.finfo(torch.float32).tiny)  # at 0 a gamma below 1 has no gradient
    return -(wrong**gamma * log_p_t).mean()


def dice_loss(anomaly_map: Tensor, mask: Tensor) -> Tensor:
    """L_dice = 1 - (2 |M_a M| + 1) / (|M_a| + |M| + 1) over the batch: two (b, 1, h, w) in [0, 1] -> scalar. Eq. (9).

    The ones define the loss of a batch without any anomaly. Raises ValueError for two shapes, which would broadcast.
    """
    if anomaly_map.shape != mask.shape:
        raise ValueError(f"the map is {tuple(anomaly_map.shape)} and the mask {tuple(mask.shape)}: expected one shape")
    anomaly_map, mask = anomaly_map.float(), mask.float()
    overlap = (anomaly_map * mask).sum()
    return 1 - (2 * overlap + 1) / (anomaly_map.sum() + mask.sum() + 1)


def total_loss(losses: dict[str, Tensor]) -> Tensor:
    """L_total = L_rec + L_ref, where L_ref = L_focal + L_dice. Eqs. (10), (11)."""
    return torch.stack(list(losses.values())).sum()
