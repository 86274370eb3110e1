"""The whole network: the one forward pass and who reads what of it, gradients, sizes, seeds."""

import pytest
import torch
import torch.nn.functional as F
from tiny_network import FRM_INPUTS, build, build_random, good_images, leave_only
from torch import Tensor

from almrr_ref.config import ModelConfig, TrainConfig
from almrr_ref.losses import dice_loss, focal_loss, total_loss
from almrr_ref.model import ALMRR
from almrr_ref.training import memory_distance, stages_of_all, stages_of_changed, training_losses


def batch() -> tuple[Tensor, Tensor, Tensor]:
    """Clean images, augmented ones and masks; the first image stays clean."""
    clean = good_images(3, seed=3) / 255
    mask = torch.zeros(3, 1, 64, 64)
    mask[1:, :, 20:40, 10:30] = 1
    return clean, torch.where(mask > 0, 1 - clean, clean), mask


def to_image(x: Tensor) -> Tensor:
    return F.interpolate(x, (64, 64), mode="bilinear", align_corners=False)


@pytest.mark.parametrize("frm_input", FRM_INPUTS)
@torch.no_grad()
def test_one_pass_computes_every_value_from_the_ones_before(frm_input: str) -> None:
    """Fig. 2, written out; the modules' own tests say what each of them does."""
    model, images = build_random(frm_input=frm_input, standardise="position"), batch()[1]
    unet_inputs: list[Tensor] = []
    if model.frm is not None:
        model.frm.register_forward_pre_hook(lambda _, inputs: unet_inputs.append(inputs[0]))
    result = model(images)
    assert model.standardise is not None
    stages = model.standardise(model.extractor.stages(images))
    features = torch.cat([F.interpolate(s, (16, 16), mode="bilinear", align_corners=False) for s in stages], dim=1)
    rebuilt = model.mfrm(features)
    error = (rebuilt - features).square()
    torch.testing.assert_close(result.features, features)
    torch.testing.assert_close(result.reconstructed, rebuilt)
    if model.frm is None:
        assert result.logits is result.evidence is None
        distance = to_image(error.mean(dim=1, keepdim=True).sqrt())
        expected = distance / (1 + distance)
    else:
        means = [rebuilt.mean(dim=1, keepdim=True), features.mean(dim=1, keepdim=True)]
        assert result.logits is not None
        margin = result.logits[:, 1:] - result.logits[:, :1]
        if model.memory is None:
            assert result.evidence is None
            unet_input, combined = torch.cat(means, dim=1), margin
        else:
            assert model.error_projection is not None
            assert model.evidence is not None
            by_stage = torch.stack([part.mean(dim=1) for part in error.split([64, 128, 256], dim=1)], dim=1)
            nearest, projected = model.memory(stages), model.error_projection(torch.log(1 + error))
            unet_input = torch.cat([*means, torch.log(1 + by_stage), projected, nearest], dim=1)
            kinds = torch.cat([margin, by_stage.log().mean(dim=1, keepdim=True), nearest], dim=1)
            torch.testing.assert_close(result.evidence, kinds)
            evened, level = model.evidence.border_evened(kinds), model.evidence.level[..., None, None]
            above = model.evidence.image_levels(evened)[..., None, None] - level[0]
            evened = evened - 0.7 * above.clamp(min=0).minimum(3 * level[1])
            balanced = (evened - model.evidence.mean[:, None, None]) / model.evidence.std[:, None, None]
            combined = (torch.tensor([1, 0.2, 0.5])[:, None, None] / 1.7 * balanced).sum(dim=1, keepdim=True)
        torch.testing.assert_close(unet_inputs[0], unet_input)
        torch.testing.assert_close(result.logits, model.frm(unet_input))
        expected = torch.sigmoid(to_image(combined))
    torch.testing.assert_close(result.anomaly_map, expected)


@pytest.mark.parametrize("frm_input", FRM_INPUTS)
def test_prediction_reads_the_map_of_the_pass_and_nothing_else(frm_input: str) -> None:
    model, images = build_random(frm_input=frm_input), (255 * batch()[1]).round() / 255
    expected = model(images).anomaly_map
    leave_only(model, "anomaly_map")
    maps, scores = model.predict(images)
    assert torch.equal(maps, expected)
    assert torch.equal(scores, model.image_scores(expected))


@pytest.mark.parametrize("frm_input", FRM_INPUTS)
def test_training_reads_reconstruction_and_logits_and_takes_no_second_pass_for_clean_samples(frm_input: str) -> None:
    """And the stored patches of an image's own part do not count."""
    model, (clean, augmented, mask), part_ids = build_random(frm_input=frm_input), batch(), torch.arange(3)
    phi, expected = model(clean).features, model(augmented, part_ids)
    backbone_passes: list[int] = []
    model.extractor.backbone.register_forward_hook(lambda _m, inputs, _o: backbone_passes.append(len(inputs[0])))
    leave_only(model, "reconstructed", "logits")
    before = {name: value.clone() for name, value in model.extractor.state_dict().items()}
    losses = training_losses(model, model.stages(clean), augmented, mask, TrainConfig(), part_ids)
    assert backbone_passes == [3, 2]
    total_loss(losses).backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    assert not any(p.requires_grad for p in model.extractor.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.extractor.state_dict().items())
    torch.testing.assert_close(losses.pop("rec"), (expected.reconstructed - phi).square().sum(dim=1).sqrt().mean())
    if expected.logits is not None:
        logits = to_image(expected.logits)
        torch.testing.assert_close(losses.pop("focal"), focal_loss(logits, mask, 2.0))
        torch.testing.assert_close(losses.pop("dice"), dice_loss(logits.softmax(dim=1)[:, 1:], mask))
    assert not losses


def test_a_distance_that_is_known_is_not_searched_for_and_changes_nothing() -> None:
    model, (clean, augmented, mask), part_ids = build_random(frm_input="memory"), batch(), torch.arange(3)
    stages, searched = (
        model.stages(clean),
        training_losses(model, model.stages(clean), augmented, mask, TrainConfig(), part_ids),
    )
    queries: list[int] = []
    log_distance = model.memory.log_distance  # type: ignore[union-attr]
    model.memory.log_distance = lambda points, parts: (queries.append(len(points)), log_distance(points, parts))[1]
    known = memory_distance(model, stages, part_ids)
    losses = training_losses(model, stages, augmented, mask, TrainConfig(), part_ids, known)
    assert queries == [3, 2]
    assert {name: loss.item() for name, loss in losses.items()} == {n: loss.item() for n, loss in searched.items()}


def test_a_gpus_way_to_the_augmented_stages_ends_where_a_cpus_does() -> None:
    model, (clean, augmented, mask), part_ids = build_random(frm_input="memory"), batch(), torch.arange(3)
    stages, changed = model.stages(clean), mask.flatten(1).any(dim=1)
    assert changed.tolist().count(False) == 1
    known = memory_distance(model, stages, part_ids) + 1  # of the image left clean it must stay what is known
    arguments = model, stages, augmented, changed, part_ids, known
    torch.testing.assert_close(stages_of_all(*arguments), stages_of_changed(*arguments))
    assert stages_of_all(*arguments)[1][~changed].equal(known[~changed])  # type: ignore[index]


def test_amp_takes_the_distances_to_the_memory_in_float32() -> None:
    model = build_random(frm_input="memory", standardise="channel")
    assert model.memory is not None
    calls: list[tuple[list[Tensor], Tensor]] = []
    hook = model.memory.register_forward_hook(lambda _, inputs, nearest: calls.append((inputs[0], nearest)))
    clean, augmented, mask = batch()
    training_losses(model, model.stages(clean), augmented, mask, TrainConfig(amp=True))
    hook.remove()
    ((stages, nearest),) = calls
    torch.testing.assert_close(nearest, model.memory(stages), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("frm_input", ["mean", "memory"])
@pytest.mark.parametrize("detach", [True, False])
def test_the_u_net_trains_the_reconstruction_unless_it_is_detached(detach: bool, frm_input: str) -> None:
    model = build(frm_input=frm_input)
    clean, augmented, mask = batch()
    losses = training_losses(model, model.stages(clean), augmented, mask, TrainConfig(detach_reconstruction=detach))
    (losses["focal"] + losses["dice"]).backward()
    reached = any(p.grad is not None and bool(p.grad.abs().max() > 0) for p in model.mfrm.parameters())
    assert reached is not detach


def test_an_image_of_another_size_is_refused_by_every_form() -> None:
    model, image = build(), torch.rand(1, 3, 128, 128)
    for form in (model, model.fuse()):
        with pytest.raises(
            ValueError, match=r"images are \(1, 3, 128, 128\): expected \(b, 3, 64, 64\); predict resizes"
        ):
            form.maps(image)


def test_paper_size_has_the_known_number_of_parameters() -> None:
    """Counted by hand from the layers' sizes; the backbone is ResNet-50 without its last layer and head."""
    d, n, rank, inner = 192, 16, 12, 384
    direction = inner * 4 + inner + inner * (rank + 2 * n) + rank * inner + inner + inner * n + inner
    vim = 8 * (d + d * 2 * inner + inner * d + 2 * direction) + d
    decoder = (d * 256 * 9 + 256) + (256 * 512 * 9 + 512) + (512 * 1024 * 9 + 1024)
    with pytest.warns(UserWarning, match="random"):
        model = ALMRR(ModelConfig(weights="random"))
    assert {name: sum(p.numel() for p in module.parameters()) for name, module in model.named_children()} == {
        "mfrm": 1792 * 1024 + 1024 + (1024 * 16 * d + d + 256 * d) + vim + decoder + 1024 * 1792 + 1792,
        "extractor": 25_557_032 - 14_964_736 - 2_049_000,  # torchvision's total, less layer 4, less the head
        "frm": 28_364_802,
    }
