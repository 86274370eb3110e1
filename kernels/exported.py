"""The recurrence as one `scan` operator, one step at a time: what torch.export records and ONNX knows as "Scan".

OpenVINO reads a Scan only if its body takes nothing from the graph around it. So A travels along as a state that does
not change, and every tensor comes in the shape that the step needs: reshaping inside would take constants from outside.
Source: Gu & Dao 2023, Algorithm 2.
"""

import torch
from torch import Tensor

State = tuple[Tensor, Tensor]


def scan_rows_exported(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, h0: Tensor) -> tuple[Tensor, Tensor]:
    """Run the mapping of `chunked._Scan`: x, dt (l, r, d), A, h0 (r, n, d), B, C (l, r, n) -> y (l, r, d), last h."""
    from torch._higher_order_ops.scan import scan  # here, because the oldest torch that we support lacks it

    def step(state: State, now: tuple[Tensor, Tensor, Tensor, Tensor]) -> tuple[State, Tensor]:
        (h, A), (x_t, dt_t, B_t, C_t) = state, now  # (r, n, d); x_t, dt_t (r, 1, d), B_t (r, n, 1), C_t (r, 1, n)
        h = torch.exp(dt_t * A) * h + x_t * B_t
        return (h, A.clone()), torch.matmul(C_t, h)  # PyTorch wants a state that is not its input

    sequences = (x.unsqueeze(2), dt.unsqueeze(2), B.unsqueeze(3), C.unsqueeze(2))
    (last, _), y = scan(step, (h0, A), sequences, dim=0)
    return y.squeeze(2), last
