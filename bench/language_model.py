"""Train a Mamba language model, two blocks and 1 M parameters, on the bytes of Python's own documentation, on a CPU."""

import time
from pydoc_data.topics import topics

import torch
from common import as_line, environment, make_parser
from torch import Tensor, nn

from almrr_ref import kernels  # in place of mamba_ssm and causal_conv1d


class MambaBlock(nn.Module):
    """Norm, Mamba's mixer with 16 states, residual: (b, l, d) -> (b, l, d)."""

    def __init__(self, d: int, backend: str) -> None:
        super().__init__()
        self.backend, self.sizes, d_inner = backend, [d // 16, 16, 16], 2 * d
        self.norm, self.in_proj = nn.RMSNorm(d), nn.Linear(d, 2 * d_inner, bias=False)
        self.conv1d = nn.Conv1d(d_inner, d_inner, 4, groups=d_inner)
        self.x_proj, self.dt_proj = nn.Linear(d_inner, sum(self.sizes), bias=False), nn.Linear(d // 16, d_inner)
        nn.init.uniform_(self.dt_proj.bias, -7, -2)  # steps from 1e-3 to 0.13
        self.A_log = nn.Parameter(torch.arange(1.0, 17).log().repeat(d_inner, 1))
        self.D, self.out_proj = nn.Parameter(torch.ones(d_inner)), nn.Linear(d_inner, d, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x, z = self.in_proj(self.norm(tokens)).mT.chunk(2, dim=1)
        u = kernels.causal_conv1d(x, self.conv1d.weight, self.conv1d.bias)
        low_rank, B, C = self.x_proj(u.mT).split(self.sizes, dim=2)  # (b, l, r or n)
        delta, A = (low_rank @ self.dt_proj.weight.T).mT, -self.A_log.exp()
        y = kernels.selective_scan(u, delta, A, B.mT, C.mT, self.D, z, self.dt_proj.bias, True, backend=self.backend)
        return tokens + self.out_proj(y.mT)


def train(steps: int = 200, slow: bool = False, d: int = 256, batch: int = 4, length: int = 128) -> list[float]:
    """Predict every next byte of random pieces of the text; return the loss of each step."""
    torch.manual_seed(0)
    text, losses = torch.tensor(list("\n".join(topics.values()).encode())), []
    blocks = [MambaBlock(d, "reference" if slow else "auto") for _ in range(2)]
    model = nn.Sequential(nn.Embedding(256, d), *blocks, nn.RMSNorm(d), nn.Linear(d, 256))
    optimiser, start = torch.optim.AdamW(model.parameters(), lr=2e-3), time.perf_counter()
    for step in range(1, steps + 1):
        piece = text[torch.randint(len(text) - length, (batch, 1)) + torch.arange(length + 1)]
        loss = nn.functional.cross_entropy(model(piece[:, :-1]).mT, piece[:, 1:])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
        if step % 20 == 0:
            print(f"step {step}: loss {loss:.4f}, {step * batch * length / (time.perf_counter() - start):.0f} bytes/s")
    return losses


if __name__ == "__main__":
    parser = make_parser(__file__, __doc__)
    parser.add_argument("--slow", action="store_true", help="scan one step at a time, to compare the losses")
    slow = parser.parse_args().slow
    print(as_line(environment(torch.device("cpu"))))
    train(slow)
