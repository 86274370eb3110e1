"""The whole network: sizes, gradients, determinism, standardisation, image score."""

import dataclasses
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from scipy import ndimage

from almrr_ref.anomalies import textured_anomaly
from almrr_ref.calibrate import fit_features
from almrr_ref.config import ENCODERS, FRM_INPUTS, ModelConfig, TrainConfig
from almrr_ref.data.samples import TrainingSamples
from almrr_ref.data.textures import ImageTextures
from almrr_ref.model import ALMRR, parameter_counts
from almrr_ref.plus.memory import NormalMemory
from almrr_ref.train import training_step

TINY = ModelConfig(
    backbone="resnet18",
    weights="random",
    image_size=64,
    reduced_channels=8,
    d_model=12,
    depth=2,
    d_state=4,
    decoder_channels=(10, 6),
    frm_width=4,
    frm_levels=2,
)

pytestmark = pytest.mark.filterwarnings("ignore:.*random.*:UserWarning")


def build(**changes: object) -> ALMRR:
    memory = {"memory": 5} if changes.get("frm_input") == "memory" else {}
    return ALMRR(dataclasses.replace(TINY, **{**memory, **changes}))  # type: ignore[arg-type]


def good_samples(images: torch.Tensor, **settings: Any) -> TrainingSamples:
    """Training samples of good images, uint8 (n, 3, s, s), each of its own part."""
    return TrainingSamples(images, ImageTextures(images), TrainConfig(**settings), textured_anomaly)


def to_bytes(images: torch.Tensor) -> torch.Tensor:
    return (255 * images).round().byte()


def batch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    clean = torch.rand(3, 3, 64, 64, generator=generator)
    mask = torch.zeros(3, 1, 64, 64)
    mask[1:, :, 20:40, 10:30] = 1
    return clean, torch.where(mask > 0, 1 - clean, clean), mask


@pytest.mark.parametrize("frm_input", FRM_INPUTS)
@pytest.mark.parametrize("encoder", ENCODERS)
def test_maps_have_the_images_size_and_lie_between_0_and_1(encoder: str, frm_input: str) -> None:
    model = build(encoder=encoder, frm_input=frm_input)
    maps, scores = model.predict(batch()[0])
    assert maps.shape == (3, 1, 64, 64)
    assert scores.shape == (3,)
    assert 0 <= float(maps.min()) <= float(maps.max()) <= 1


def test_distance_weight_adds_the_log_of_the_mean_stage_error_to_the_margin() -> None:
    plain, weighted = build(frm_input="error").eval(), build(frm_input="error", distance_weight=1.5).eval()
    images = batch()[0]
    with torch.no_grad():
        features = plain.features(images)
        error = (plain.mfrm(features) - features).square()
        stages = torch.stack([stage.mean(dim=1).log() for stage in error.split([64, 128, 256], dim=1)], dim=1)
        evidence = torch.nn.functional.interpolate(
            stages.mean(dim=1, keepdim=True), size=(64, 64), mode="bilinear", align_corners=False
        )
        expected = torch.sigmoid((torch.logit(plain(images).double()) + 1.5 * evidence) / 2.5)
        torch.testing.assert_close(weighted(images).double(), expected, rtol=0, atol=1e-5)


def test_paper_size_has_the_known_number_of_parameters() -> None:
    """Counted by hand from the layers' sizes; the backbone is ResNet-50 without its last layer and head."""
    model = ALMRR(ModelConfig(weights="random"))
    d, n, rank, inner = 192, 16, 12, 384
    direction = inner * 4 + inner + inner * (rank + 2 * n) + rank * inner + inner + inner * n + inner
    vim = 8 * (d + d * 2 * inner + inner * d + 2 * direction) + d
    embed = 1024 * 16 * d + d + 256 * d
    decoder = (d * 256 * 9 + 256) + (256 * 512 * 9 + 512) + (512 * 1024 * 9 + 1024)
    mfrm = (1792 * 1024 + 1024) + embed + vim + decoder + (1024 * 1792 + 1792)
    counts = parameter_counts(model)
    assert counts["mfrm"] == mfrm
    assert (
        counts["extractor"] == 25_557_032 - 14_964_736 - 2_049_000
    )  # torchvision's total, less layer 4, less the head
    assert counts["frm"] == sum(p.numel() for p in model.frm.parameters()) == 28_364_802  # type: ignore[union-attr]


def test_a_full_paper_size_step_runs_and_leaves_the_backbone_alone() -> None:
    model = ALMRR(ModelConfig(weights="random")).train()
    before = {k: v.clone() for k, v in model.extractor.state_dict().items()}
    generator = torch.Generator().manual_seed(0)
    clean = torch.rand(4, 3, 256, 256, generator=generator)
    mask = torch.zeros(4, 1, 256, 256)
    mask[2:, :, 100:150, 60:90] = 1
    optimiser = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    parts = training_step(model, clean, torch.where(mask > 0, 1 - clean, clean), mask, TrainConfig())
    torch.stack(list(parts.values())).sum().backward()
    optimiser.step()
    assert set(parts) == {"rec", "focal", "dice"}
    assert all(bool(torch.isfinite(part)) for part in parts.values())
    assert all(p.grad is None for p in model.extractor.parameters())
    assert all(torch.equal(v, before[k]) for k, v in model.extractor.state_dict().items())
    assert all(p.grad is not None for m in (model.mfrm, model.frm) for p in m.parameters())  # type: ignore[union-attr]


def test_clean_samples_skip_the_second_pass_without_changing_the_loss() -> None:
    model, (clean, augmented, mask) = build().eval(), batch()
    passes: list[int] = []
    model.extractor.backbone.register_forward_hook(lambda _m, inputs, _o: passes.append(len(inputs[0])))
    parts = training_step(model, clean, augmented, mask, TrainConfig())
    assert passes == [3, 2]
    with torch.no_grad():
        features = model.features(augmented)
        expected = (model.mfrm(features) - model.features(clean)).square().sum(1).sqrt().mean()
    assert float(parts["rec"].detach()) == pytest.approx(float(expected), rel=1e-5)


def test_the_u_net_sees_how_far_the_memory_is_from_the_image_it_judges() -> None:
    model, (clean, augmented, mask) = build(frm_input="memory", standardise="channel").eval(), batch()
    fit_features(model, good_samples(to_bytes(clean.flip(3))))
    seen: list[torch.Tensor] = []
    model.frm.register_forward_pre_hook(lambda _, given: seen.append(given[0]))  # type: ignore[union-attr]
    training_step(model, clean, augmented, mask, TrainConfig())
    model.predict(augmented)
    assert model.memory is not None
    distance = model.memory(model.standardised(model.extractor.stages(augmented)))  # clean where the mask is empty
    expected = torch.nn.functional.interpolate(distance, size=(16, 16), mode="bilinear", align_corners=False)
    assert float(expected.std()) > 0.1
    for given in seen:
        torch.testing.assert_close(given[:, -1:].detach(), expected, atol=1e-4, rtol=1e-4)
    assert len(seen) == 2


def test_in_training_no_image_finds_its_own_patches() -> None:
    model, (clean, _, mask) = build(frm_input="memory", standardise="channel", memory=128).eval(), batch()
    fit_features(model, good_samples(to_bytes(clean)))  # stores all patches
    seen: list[torch.Tensor] = []
    model.frm.register_forward_pre_hook(lambda _, given: seen.append(given[0][:, -1]))  # type: ignore[union-attr]
    training_step(model, clean, clean, torch.zeros_like(mask), TrainConfig(), torch.arange(len(clean)))
    training_step(model, clean, clean, torch.zeros_like(mask), TrainConfig())
    others, all_patches = seen
    assert float(others.detach().min()) > float(all_patches.detach().max())


def test_amp_takes_the_distances_to_the_memory_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    model, products = build(frm_input="memory", standardise="channel"), NormalMemory.products
    fit_features(model, good_samples(to_bytes(batch()[0])))
    taken: list[tuple[torch.Tensor, torch.Tensor]] = []

    def watched(memory: NormalMemory, points: torch.Tensor, own: torch.Tensor | None) -> Iterator[torch.Tensor]:
        for part in products(memory, points, own):
            taken.append((points, part))
            yield part

    monkeypatch.setattr(NormalMemory, "products", watched)
    training_step(model, *batch(), TrainConfig(amp=True))
    assert model.memory is not None
    ((points, found),) = taken
    torch.testing.assert_close(found, next(products(model.memory, points, None)), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("detach", [True, False])
def test_refinement_trains_the_reconstruction_only_if_asked(detach: bool) -> None:
    model = build()
    parts = training_step(model, *batch(), TrainConfig(detach_reconstruction=detach))
    (parts["focal"] + parts["dice"]).backward()
    reached = any(p.grad is not None and bool(p.grad.abs().max() > 0) for p in model.mfrm.parameters())
    assert reached is not detach


def test_same_seed_gives_the_same_weights_whatever_the_global_generator_does() -> None:
    torch.manual_seed(1)
    first = build().state_dict()
    state = torch.random.get_rng_state()
    torch.manual_seed(2)
    second, other = build().state_dict(), ALMRR(TINY, seed=1).state_dict()
    torch.random.set_rng_state(state)
    assert all(torch.equal(first[k], second[k]) for k in first)
    assert not torch.equal(first["mfrm.restore.weight"], other["mfrm.restore.weight"])


def test_standardised_features_have_mean_0_and_deviation_1_per_channel() -> None:
    model = build(standardise="channel")
    images = to_bytes(torch.rand(5, 3, 64, 64, generator=torch.Generator().manual_seed(0))).float() / 255
    fit_features(model, good_samples(to_bytes(images), batch_size=2))
    features = model.features(images)
    torch.testing.assert_close(features.mean(dim=(0, 2, 3)), torch.zeros(448), atol=1e-4, rtol=0)
    alive = model.feature_std > 2e-3 * model.feature_std.max()
    spread = features.transpose(0, 1).flatten(1).std(dim=1, correction=0)
    torch.testing.assert_close(spread[alive], torch.ones(int(alive.sum())), atol=1e-3, rtol=0)


def test_features_standardised_per_position_take_their_mean_and_deviation_from_a_3x3_neighbourhood() -> None:
    model = build(standardise="position")
    images = to_bytes(torch.rand(7, 3, 64, 64, generator=torch.Generator().manual_seed(0))).float() / 255
    fit_features(model, good_samples(to_bytes(images), batch_size=3))
    stage = model.extractor.stages(images)[1].double()  # 8x8, the second of three
    neighbours = stage[:, :, 2:5, 3:6].permute(1, 0, 2, 3).flatten(1)  # of position (3, 4)
    mean, deviation = (model.statistics(flat)[1][:, 3, 4].double() for flat in (model.feature_mean, model.feature_std))
    torch.testing.assert_close(mean, neighbours.mean(dim=1), atol=1e-5, rtol=1e-5)
    floor = 0.3 * stage.transpose(0, 1).flatten(1).std(dim=1, correction=0)
    floor = floor.clamp(min=1e-3 * float(model.feature_std.max()))
    torch.testing.assert_close(deviation, neighbours.std(dim=1, correction=0).maximum(floor), atol=1e-5, rtol=1e-4)
    assert (neighbours.std(dim=1, correction=0) > floor).any()


def test_image_score_is_the_highest_9x9_mean() -> None:
    model = build()
    anomaly_map = torch.rand(1, 1, 40, 50, generator=torch.Generator().manual_seed(0))
    total = ndimage.uniform_filter(anomaly_map[0, 0].double().numpy(), 9, mode="constant")
    count = ndimage.uniform_filter(np.ones((40, 50)), 9, mode="constant")
    assert float(model.image_scores(anomaly_map)) == pytest.approx((total / count).max(), rel=1e-5)


def test_predict_resizes_keeps_the_mode_and_refuses_other_shapes() -> None:
    model = build().train()
    maps, _ = model.predict(torch.rand(2, 3, 80, 48))
    assert maps.shape == (2, 1, 64, 64)
    assert model.training
    for wrong in (torch.rand(3, 64, 64), torch.rand(1, 1, 64, 64), torch.zeros(1, 3, 64, 64, dtype=torch.uint8)):
        with pytest.raises(ValueError, match="images must be a floating"):
            model.predict(wrong)


def test_batch_size_does_not_change_a_prediction() -> None:
    model, (clean, _, _) = build(), batch()
    maps, scores = model.predict(clean)
    for i in range(3):
        alone, score = model.predict(clean[i : i + 1])
        torch.testing.assert_close(alone[0], maps[i], atol=1e-6, rtol=0)
        torch.testing.assert_close(score[0], scores[i], atol=1e-6, rtol=0)


def test_random_weights_come_with_a_warning() -> None:
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        build()
    assert any("random" in str(w.message) for w in seen)
