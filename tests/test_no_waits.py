"""A training step never makes the host wait for the device; and what ``--amp`` leaves in float32."""

import contextlib
import os
from functools import partial
from typing import Any

import pytest
import torch
from almrr_ref.kernels import bidirectional_scan
from tiny_network import build, good_images, good_samples

from almrr_ref import mamba, training
from almrr_ref.deploy.cuda_graph import WARM_UP, Replayed
from almrr_ref.optimiser import Adam
from almrr_ref.run import distributed
from almrr_ref.train import default_workers
from almrr_ref.training import Trainer

CHANGES: list[dict[str, Any]] = [{}, {"frm_input": "memory", "standardise": "position", "brightness": 0.4}]


@pytest.mark.parametrize("changes", CHANGES, ids=["paper", "memory"])
def test_a_step_asks_nothing_of_the_device(changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """On the device "meta", whose tensors hold nothing: a value that the host asks for, or a size that depends on one,
    is an error there.
    """
    monkeypatch.setattr(training, "Adam", lambda params, lr, fused: Adam(params, lr))  # meta has no fused one
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())  # nor autocast
    model = build(**changes).to("meta").train()
    trainer = Trainer(model, good_samples(good_images(3), batch_size=3, steps=2, clean_probability=0.4), {})
    batches = list(trainer.samples.batches(0, 2))
    assert any(not mask.flatten(1).any(dim=1).all() for _, mask, _ in batches), "no sample was left clean"
    for batch in batches:
        losses = trainer.step(model, batch, 1e-4)
    assert {loss.device.type for loss in losses.values()} == {"meta"}
    with pytest.raises((RuntimeError, NotImplementedError)):
        losses["rec"].item()


@pytest.mark.requires_cuda
@pytest.mark.parametrize("changes", CHANGES, ids=["paper", "memory"])
def test_on_a_gpu_a_step_makes_the_host_wait_for_nothing_and_its_replay_trains_as_it_does(
    changes: dict[str, Any],
) -> None:
    """Steps that run plainly, then those that replay a recorded one, beside steps that all run plainly."""
    steps = 2 * WARM_UP + 2
    losses = []
    for replayed in (True, False):
        model = build(**changes).cuda().train()
        trainer = Trainer(model, good_samples(good_images(3), batch_size=3, steps=steps, clean_probability=0.4), {})
        if not replayed:
            trainer.replayed = partial(trainer._losses_and_gradients, model)
        rows = []
        for number, batch in enumerate(trainer.samples.batches(0, steps)):
            may_wait = number in (0, WARM_UP)  # kernels are compiled and chosen; the recording waits for all
            torch.cuda.set_sync_debug_mode("default" if may_wait else "error")
            try:
                rows.append(trainer.step(model, batch, 1e-4))
            finally:
                torch.cuda.set_sync_debug_mode("default")
        assert not replayed or (isinstance(trainer.replayed, Replayed) and trainer.replayed.graph is not None)
        losses.append({name: torch.stack([row[name] for row in rows]).cpu() for name in rows[0]})
    torch.testing.assert_close(*losses, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("cores", "ranks", "workers"), [(1, 1, 0), (4, 1, 3), (64, 1, 8), (8, 4, 1), (2, 4, 0)])
def test_workers_take_the_free_cores_of_a_rank_with_a_gpu(
    cores: int, ranks: int, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(cores), raising=False)
    monkeypatch.setattr(distributed, "world_size", lambda: ranks)
    assert [default_workers(torch.device(name)) for name in ("cpu", "cuda")] == [0, workers]


def test_amp_scans_16_bit_sequences_with_a_float32_state(monkeypatch: pytest.MonkeyPatch) -> None:
    """Held to the oracle in float64: the result is rounded to 16 bits once, not at every step."""
    calls: list[tuple[Any, ...]] = []

    def watched(*arguments: Any, **options: Any) -> torch.Tensor:
        calls.append((arguments, options, y := bidirectional_scan(*arguments, **options)))
        return y

    monkeypatch.setattr(mamba, "bidirectional_scan", watched)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        mixer = mamba.VimMixer(12, d_state=4, backend="chunked")
    tokens = torch.randn(1, 300, 12, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        mixer(tokens)
    (u, delta, A, B, C, D, z, bias, *backward), options, y = calls[0]
    assert {t.dtype for t in (u, delta, B, C, z, y)} == {torch.bfloat16}
    assert {t.dtype for t in (A, D, bias, backward[2], backward[5], backward[6])} == {torch.float32}
    exact = [t.double() for t in (u, delta, A, B, C, D, z, bias, *backward)]
    expected = bidirectional_scan(*exact, **{**options, "backend": "reference"})
    torch.testing.assert_close(y.double(), expected.detach(), rtol=2**-8, atol=1e-6)
