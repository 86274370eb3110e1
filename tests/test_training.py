"""The training loop: its rate, its numbers, numbers that go wrong, and the generator that it leaves alone."""

import itertools
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from tiny_network import build, good_images, good_samples
from trust_cases import MEMORY_FLAGS, ROOT, SMALLEST_FLAGS, run, weights, write_images

from almrr_ref import load_checkpoint, timing, train, training
from almrr_ref.config import TrainConfig
from almrr_ref.losses import total_loss
from almrr_ref.mfrm import Decoder
from almrr_ref.optimiser import learning_rate
from almrr_ref.run.checkpoint import read_checkpoint
from almrr_ref.run.log import loss_values, mean_losses
from almrr_ref.training import Trainer

pytestmark = pytest.mark.filterwarnings("ignore:.*random.*:UserWarning")


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("good")
    write_images(folder, 5)
    return folder


def run_train(data: Path, out: Path, *flags: str) -> int:
    return train.main(["--data", str(data), "--out", str(out), *SMALLEST_FLAGS, "--steps", "4", *flags])


ADAM = """
import copy, sys, torch
from almrr_ref.optimiser import Adam
def train(adam, state=None):
    weight = torch.nn.Parameter(torch.linspace(-1, 1, 9))
    optimiser = adam([weight], lr=0.1, fused=True)
    optimiser.load_state_dict(copy.deepcopy(state) or optimiser.state_dict())
    for _ in range(5):
        optimiser.zero_grad(set_to_none=True)
        (weight - 0.3).square().sum().backward()
        optimiser.step()
    return weight.detach(), optimiser.state_dict()
ours, state = train(Adam)
again = train(Adam, state)[0]
assert "torch._dynamo" not in sys.modules
theirs, expected = train(torch.optim.Adam)
assert torch.equal(ours, theirs) and torch.equal(again, train(torch.optim.Adam, state)[0])
assert state["param_groups"] == expected["param_groups"] and state["state"].keys() == expected["state"].keys()
assert all(torch.equal(state["state"][0][key], value) for key, value in expected["state"][0].items())
"""


def test_adam_is_pytorchs_and_does_not_import_its_compiler() -> None:
    subprocess.run([sys.executable, "-c", ADAM], check=True, cwd=ROOT)


def test_learning_rate_warms_up_and_ends_at_a_hundredth() -> None:
    config = TrainConfig(lr=1.0, schedule="cosine", warmup=10)
    assert learning_rate(0, 1000, config) == pytest.approx(0.1)
    assert learning_rate(500, 1000, config) == pytest.approx(0.505)
    assert learning_rate(999, 1000, config) == pytest.approx(0.01, abs=1e-3)
    assert learning_rate(700, 1000, TrainConfig(lr=2.0)) == 2.0


def test_the_reconstruction_learns_in_every_third_step_alone_whether_or_not_its_gradients_are_computed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    refined = []
    for spared in (True, False):  # as on a CPU; as on a GPU or under torchrun
        model = build(frm_input="memory").train()
        if not spared:
            monkeypatch.setattr(training, "SparedMFRM", lambda *_: None)
        trainer = Trainer(model, good_samples(good_images(3), batch_size=3, steps=5, rec_every=3), {})
        learned: list[set[str]] = []
        for batch in trainer.samples.batches(0, 5):
            before = {name: weight.clone() for name, weight in model.state_dict().items()}
            losses = trainer.step(model, batch, 1e-2)
            assert ("rec" in losses) == (not spared or trainer.done % 3 == 0), "of what teaches nothing"
            trainer.done += 1
            refined.append(torch.stack([losses["focal"], losses["dice"]]))
            changed = [name for name, weight in model.state_dict().items() if not weight.equal(before[name])]
            learned.append({name.split(".")[0] for name in changed})
        assert learned == [{"mfrm", "error_projection", "frm"} - ({"mfrm"} if step % 3 else set()) for step in range(5)]
    torch.testing.assert_close(refined[:5], refined[5:], rtol=1e-3, atol=1e-4)


def test_a_mean_is_that_of_the_steps_that_have_the_loss() -> None:
    steps = loss_values([{"focal": torch.tensor(1.0)}, {"rec": torch.tensor(5.0), "focal": torch.tensor(2.0)}])
    assert steps == [{"focal": 1.0}, {"rec": 5.0, "focal": 2.0}]
    assert list(mean_losses(steps).items()) == [("rec", 5.0), ("focal", 1.5)]


def test_the_foretold_step_is_the_mean_of_those_in_which_the_reconstruction_learns_or_is_spared(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for every, times, mean in ((4, [4.0, 1.0], 1.75), (1, [4.0], 4.0)):
        trainer = Trainer(build(), good_samples(good_images(3), batch_size=3, steps=5, rec_every=every), {})
        answers = iter(times)
        monkeypatch.setattr(timing, "seconds", lambda *_, answers=answers: next(answers))
        assert timing.time_step(trainer) == mean


@pytest.mark.parametrize("workers", ["0", "1"])
def test_nothing_draws_from_the_global_generator(good: Path, tmp_path: Path, workers: str) -> None:
    """So its state need not be stored: a run, an interrupted one and its resumption leave it as it was."""
    flags = [*MEMORY_FLAGS, "--set", "anomaly_style=varied", "--workers", workers]
    for out, more in (("whole", []), ("run", ["--steps", "2"])):
        before = torch.get_rng_state()
        assert run_train(good, tmp_path / out, *flags, *more) == 0
        assert torch.equal(torch.get_rng_state(), before)


def test_amp_computes_in_bfloat16_but_keeps_the_weights_in_float32(
    good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded, decode = set(), Decoder.forward

    def watched(decoder: Decoder, latent: torch.Tensor) -> torch.Tensor:
        features = decode(decoder, latent)
        decoded.add(features.dtype)
        return features

    assert run_train(good, tmp_path / "full") == 0
    monkeypatch.setattr(Decoder, "forward", watched)
    assert run_train(good, tmp_path / "amp", "--amp") == 0
    assert decoded == {torch.bfloat16}, "the folded network sets the threshold"
    assert {value.dtype for value in weights(tmp_path / "amp").values()} <= {torch.float32, torch.int64}
    rec = [json.loads((tmp_path / name / "log.jsonl").read_text())["loss_rec"] for name in ("full", "amp")]
    assert rec[0] != rec[1] == pytest.approx(rec[0], rel=0.02)


def assert_finite(run_folder: Path) -> None:
    values = weights(run_folder).values()
    assert all(bool(torch.isfinite(weight).all()) for weight in values if weight.is_floating_point())
    lines = [json.loads(line) for line in (run_folder / "log.jsonl").read_text().splitlines()]
    assert all(math.isfinite(value) for line in lines for value in line.values())


def test_weights_that_are_no_numbers_never_replace_a_good_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A loss that is finite while its gradient is not: the update of step 3 ruins the weights, not yet the loss.

    Two steps are timed before the first.
    """
    write_images(tmp_path / "good", 4)
    flags = ["--data", str(tmp_path / "good"), "--out", str(tmp_path / "run"), *SMALLEST_FLAGS, "--steps", "3"]
    flags += ["--set", "save_minutes=0"]
    calls = itertools.count(1)

    def ruinous(losses: dict[str, torch.Tensor]) -> torch.Tensor:
        loss = total_loss(losses)
        return loss + (loss - loss.detach()).sqrt() if next(calls) == 2 + 3 else loss

    monkeypatch.setattr(training, "total_loss", ruinous)
    monkeypatch.setattr(training, "REPORT_EVERY", 1)
    assert train.main(flags) == 2
    assert read_checkpoint(tmp_path / "run" / "last.pt")["training"]["step"] == 2
    assert_finite(tmp_path / "run")


@pytest.mark.parametrize("levels", [(0,), (90, 91)])
def test_constant_images_train_and_predict_to_finite_numbers(tmp_path: Path, levels: tuple[int, ...]) -> None:
    (tmp_path / "good").mkdir()
    for i in range(5):
        Image.new("L", (32, 32), levels[i % len(levels)]).save(tmp_path / "good" / f"{i}.png")
    flags = ["--data", str(tmp_path / "good"), "--out", str(tmp_path / "run"), *SMALLEST_FLAGS, "--steps", "6"]
    ended = run("train", flags, tmp_path / "io")
    assert ended.code == 0, ended
    assert_finite(tmp_path / "run")
    model = load_checkpoint(tmp_path / "run" / "last.pt")
    assert 0 <= float(model.threshold) <= 1
    odd = torch.cat([torch.zeros(1, 3, 32, 32), torch.ones(1, 3, 32, 32), torch.rand(2, 3, 32, 32).round()])
    for network, dtype in ((model, None), (model.fuse(), None), (model, torch.bfloat16), (model.fuse(), torch.float16)):
        with torch.autocast("cpu", dtype, enabled=dtype is not None):
            maps, scores = network.predict(odd)
        assert bool(torch.isfinite(maps).all())
        assert bool(((scores >= 0) & (scores <= 1)).all())


@pytest.mark.parametrize("size", [32, 64, 96])
def test_a_batch_of_one_trains_at_every_size(size: int) -> None:
    """At 32 and 64 pixels, the lowest level of the U-Net has one value a channel: no variance to divide by."""
    model = build(image_size=size, frm_levels=5)
    images = good_images(2, size=size)
    trainer = Trainer(model, good_samples(images, batch_size=1, steps=2), {})
    assert trainer.fit() is None
    assert all(bool(torch.isfinite(value).all()) for value in model.state_dict().values())
    maps, _ = model.eval().predict(images.float() / 255)
    assert bool(torch.isfinite(maps).all())
