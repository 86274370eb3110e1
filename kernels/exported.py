"""The recurrence as one `scan` operator, one step at a time: what torch.export records and ONNX knows as "Scan".

Source: Gu & Dao 2023, Algorithm 2.
"""

import torch
from torch import Tensor


def scan_rows_exported(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, h0: Tensor) -> tuple[Tensor, Tensor]:
    """Run the mapping of `chunked._Scan`: x, dt (l, r, d), A, h0 (r, n, d), B, C (l, r, n) -> y (l, r, d), last h."""
    from torch._higher_order_ops.scan import scan  # here, because the oldest torch that we support lacks it

    def step(h: Tensor, now: tuple[Tensor, Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        x_t, dt_t, B_t, C_t = now
        h = torch.exp(dt_t[:, None] * A) * h + x_t[:, None] * B_t[:, :, None]
        return h, torch.matmul(C_t[:, None], h)[:, 0]

    last, y = scan(step, h0, (x, dt, B, C), dim=0)
    return y, last
