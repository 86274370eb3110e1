"""The feature extractor: normalisation, resize by hand-written weights, no gradient anywhere."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from almrr_ref.features import FeatureExtractor


@pytest.fixture(scope="module")
def extractor() -> FeatureExtractor:
    with pytest.warns(UserWarning, match="random weights"):
        return FeatureExtractor("resnet18", (1, 2, 3), "random", 7)


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.rand(2, 3, 40, 56, generator=torch.Generator().manual_seed(0))


def resize_matrix(n_in: int, n_out: int) -> np.ndarray:
    """Bilinear weights of one axis by definition: centre (i + 1/2) n_in / n_out - 1/2, clamped at the border."""
    matrix = np.zeros((n_out, n_in))
    for i in range(n_out):
        centre = max((i + 0.5) * n_in / n_out - 0.5, 0.0)
        low = min(int(centre), n_in - 1)
        high = min(low + 1, n_in - 1)
        matrix[i, low] += 1 - (centre - low)
        matrix[i, high] += centre - low
    return matrix


def test_features_are_the_stages_resized_and_concatenated(extractor: FeatureExtractor, images: Tensor) -> None:
    features = extractor(images)
    assert extractor.channels == (64, 128, 256)
    assert features.shape == (2, 448, 7, 7)
    start = 0
    for stage, channels in zip(extractor.stages(images), extractor.channels, strict=True):
        rows, columns = resize_matrix(stage.shape[2], 7), resize_matrix(stage.shape[3], 7)
        expected = np.einsum("yh,bchw,xw->bcyx", rows, stage.double().numpy(), columns)
        part = features[:, start : start + channels]
        np.testing.assert_allclose(part.numpy(), expected, rtol=0, atol=1e-5 * np.abs(expected).max())
        start += channels


def test_a_map_of_the_right_size_is_passed_on_unchanged(extractor: FeatureExtractor) -> None:
    images = torch.rand(1, 3, 28, 28, generator=torch.Generator().manual_seed(1))
    assert torch.equal(extractor(images)[:, :64], extractor.stages(images)[0])


def test_stages_are_the_backbones_maps_of_the_normalised_image(extractor: FeatureExtractor, images: Tensor) -> None:
    means, deviations = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    normalised = torch.stack([(images[:, c] - means[c]) / deviations[c] for c in range(3)], dim=1)
    for stage, expected in zip(extractor.stages(images), extractor.backbone(normalised), strict=True):
        torch.testing.assert_close(stage, expected, rtol=1e-5, atol=1e-5)


def test_no_gradient_is_recorded_even_for_images_that_require_one(extractor: FeatureExtractor, images: Tensor) -> None:
    wanting = images.clone().requires_grad_()
    extractor.train()
    assert not extractor.backbone.training
    assert not extractor(wanting).requires_grad
    assert not any(stage.requires_grad for stage in extractor.stages(wanting))
    assert not any(parameter.requires_grad for parameter in extractor.parameters())


def test_features_can_be_used_in_a_graph(extractor: FeatureExtractor, images: Tensor) -> None:
    convolution = torch.nn.Conv2d(448, 1, 1)
    convolution(extractor(images)).sum().backward()
    assert convolution.weight.grad is not None
    assert convolution.weight.grad.abs().sum() > 0


def test_dtype_follows_the_module(extractor: FeatureExtractor, images: Tensor) -> None:
    double = FeatureExtractor("resnet18", (1, 2, 3), "checkpoint", 7).double()
    double.load_state_dict(extractor.state_dict())
    features = double(images.double())
    assert features.dtype == torch.float64
    torch.testing.assert_close(features.float(), extractor(images), rtol=1e-4, atol=1e-4)


def test_state_dict_holds_the_backbones_weights_only(extractor: FeatureExtractor) -> None:
    assert all(key.startswith("backbone.") for key in extractor.state_dict())


def test_unusable_input_is_refused(extractor: FeatureExtractor) -> None:
    with pytest.raises(ValueError, match=r"floating-point images in \[0, 1\], got torch.uint8; divide by 255 first"):
        extractor(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"shape \(b, 3, h, w\), got \(1, 1, 32, 32\); convert them to RGB"):
        extractor(torch.zeros(1, 1, 32, 32))
    with pytest.raises(ValueError, match="feature size is 0; give a side of at least 1 pixel"):
        FeatureExtractor("resnet18", (1,), "checkpoint", 0)


def test_real_features_tell_textures_apart(shared_dir: Path) -> None:
    """With ImageNet weights the mean feature of a crop finds the other crop of its own texture more often than not."""
    path = shared_dir / "weights" / "resnet18_stem_layer1-3.pth"
    extractor = FeatureExtractor("resnet18", (1, 2, 3), path, 8)
    folders = sorted((shared_dir / "data" / "textures").iterdir())
    paths = [sorted(folder.glob("*.jpg"))[0] for folder in folders if folder.is_dir()]
    crops = [
        torch.from_numpy(np.array(Image.open(p).convert("RGB").crop((x, 0, x + 128, 128)))).permute(2, 0, 1) / 255
        for x in (0, 128)
        for p in paths
    ]
    descriptors = extractor(torch.stack(crops).float()).mean((2, 3))
    descriptors = torch.nn.functional.normalize(descriptors - descriptors.mean(0), dim=1)
    left, right = descriptors.chunk(2)
    found = (left @ right.T).argmax(dim=1)
    assert (found == torch.arange(len(paths))).float().mean() >= 0.7
