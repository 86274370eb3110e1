"""The training loop: its rate, its numbers, a loss that is none, and the generator that it leaves alone."""

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from trust_cases import MEMORY_FLAGS, SMALLEST_FLAGS, same, weights, write_images

from almrr_ref import train, training
from almrr_ref.config import TrainConfig
from almrr_ref.data.images import load_image
from almrr_ref.mfrm import Decoder
from almrr_ref.run.checkpoint import read_checkpoint
from almrr_ref.training import learning_rate

pytestmark = pytest.mark.filterwarnings("ignore:.*random.*:UserWarning")


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("good")
    write_images(folder, 5)
    return folder


def run_train(data: Path, out: Path, *flags: str) -> int:
    return train.main(["--data", str(data), "--out", str(out), *SMALLEST_FLAGS, "--steps", "4", *flags])


def test_learning_rate_warms_up_and_ends_at_a_hundredth() -> None:
    config = TrainConfig(lr=1.0, schedule="cosine", warmup=10)
    assert learning_rate(0, 1000, config) == pytest.approx(0.1)
    assert learning_rate(500, 1000, config) == pytest.approx(0.505)
    assert learning_rate(999, 1000, config) == pytest.approx(0.01, abs=1e-3)
    assert learning_rate(700, 1000, TrainConfig(lr=2.0)) == 2.0


@pytest.mark.parametrize("workers", ["0", "1"])
def test_nothing_draws_from_the_global_generator(
    good: Path, tmp_path: Path, workers: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So its state need not be stored: a run stopped after its first step and its resumption leave it as it was."""
    flags = [*MEMORY_FLAGS, "--set", "anomaly_style=varied", "--workers", workers]
    before = torch.get_rng_state()
    with monkeypatch.context() as patched:
        patched.setattr(training.distributed, "largest", lambda _: signal.SIGTERM)
        assert run_train(good, tmp_path / "run", *flags) == 0
    assert read_checkpoint(tmp_path / "run" / "last.pt")["training"]["step"] == 1
    assert run_train(good, tmp_path / "run", *flags, "--resume") == 0
    assert torch.equal(torch.get_rng_state(), before)


def test_an_infinite_loss_names_step_and_images_and_saves_nothing(
    good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shown: list[torch.Tensor] = []
    losses_of = training.training_losses

    def diverging(model: Any, clean: torch.Tensor, *arguments: Any) -> dict[str, torch.Tensor]:
        shown.append(clean)
        losses = losses_of(model, clean, *arguments)
        return {name: loss * float("nan") if len(shown) == 3 else loss for name, loss in losses.items()}

    monkeypatch.setattr(training, "training_losses", diverging)
    assert run_train(good, tmp_path / "run", "--holdout", "0") == 2
    error = capsys.readouterr().err
    images = [load_image(path, 32).float() / 255 for path in sorted(good.iterdir())]
    numbers = [next(k for k, image in enumerate(images) if torch.equal(image, clean)) for clean in shown[2]]
    assert "not finite at step 3" in error
    assert f"images number {numbers}" in error
    assert error.count("\n") == 1
    assert not (tmp_path / "run" / "last.pt").exists()


def test_amp_computes_in_bfloat16_but_keeps_weights_and_losses_in_float32(
    good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dtypes: dict[str, set[torch.dtype]] = {"decoder": set(), "loss": set()}
    decode, losses_of = Decoder.forward, training.training_losses

    def watched_decoder(decoder: Decoder, latent: torch.Tensor) -> torch.Tensor:
        decoded = decode(decoder, latent)
        dtypes["decoder"].add(decoded.dtype)
        return decoded

    def watched_losses(*arguments: Any) -> dict[str, torch.Tensor]:
        losses = losses_of(*arguments)
        dtypes["loss"] |= {loss.dtype for loss in losses.values()}
        return losses

    monkeypatch.setattr(Decoder, "forward", watched_decoder)
    monkeypatch.setattr(training, "training_losses", watched_losses)
    run_train(good, tmp_path / "full")
    assert set().union(*dtypes.values()) == {torch.float32}
    dtypes["decoder"].clear()
    assert run_train(good, tmp_path / "amp", "--amp") == 0
    monkeypatch.undo()
    assert run_train(good, tmp_path / "again", "--amp") == 0
    assert dtypes["decoder"] == {torch.bfloat16, torch.float32}, "the threshold is set without amp"
    assert dtypes["loss"] == {torch.float32}
    assert {value.dtype for value in weights(tmp_path / "amp").values()} <= {torch.float32, torch.int64}
    assert same(weights(tmp_path / "amp"), weights(tmp_path / "again"))
    full, amp = (json.loads((tmp_path / name / "log.jsonl").read_text())["loss_rec"] for name in ("full", "amp"))
    assert full != amp == pytest.approx(full, rel=0.02)
