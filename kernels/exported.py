"""The recurrence as one `scan` operator, one step at a time: what torch.export records and ONNX knows as "Scan".

OpenVINO reads a Scan only if its body takes nothing from the graph around it. So A travels along as a state that does
not change, and every tensor comes in the shape that the step needs: reshaping inside would take constants from outside.
Source: Gu & Dao 2023, Algorithm 2.
"""

from __future__ import annotations  # torch.compile of PyTorch 2.8 cannot evaluate those of `step`

import torch
from torch import Tensor

State = tuple[Tensor, Tensor]


def scan_rows_exported(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, h0: Tensor, *goes_on: Tensor
) -> tuple[Tensor, Tensor]:
    """Run the mapping of `chunked._scan`: x, dt (l, r, d), A, h0 (r, n, d), B, C (l, r, n) -> y (l, r, d), last h.

    Args:
        goes_on: (l, r), 0 where the state restarts; none where it never does.
    """
    from torch._higher_order_ops.scan import scan  # here, because the oldest torch that we support lacks it

    def step(state: State, now: tuple[Tensor, ...]) -> tuple[State, Tensor]:
        (h, A), (x_t, dt_t, B_t, C_t, *on) = state, now  # (r, n, d); x_t, dt_t, on (r, 1, d or 1), B_t, C_t as matrices
        h = torch.exp(dt_t * A) * (h * on[0] if on else h) + x_t * B_t
        return (h, A.clone()), torch.matmul(C_t, h)  # PyTorch wants a state that is not its input

    rows = (t[:, :, None, None] for t in goes_on)
    sequences = (x.unsqueeze(2), dt.unsqueeze(2), B.unsqueeze(3), C.unsqueeze(2), *rows)
    (last, _), y = scan(step, (h0, A), sequences, dim=0)
    return y.squeeze(2), last
