"""The feature extractor: normalisation, resize by hand, no gradient anywhere."""

import pytest
import torch

from almrr_ref.features import FeatureExtractor, resize


@pytest.fixture(scope="module")
def extractor():
    with pytest.warns(UserWarning, match="random weights"):
        return FeatureExtractor("resnet18", (1, 2, 3), "random", 7)


@pytest.fixture(scope="module")
def images():
    return torch.rand(2, 3, 40, 56, generator=torch.Generator().manual_seed(0))


def test_resize_is_bilinear_without_aligned_corners():
    x = torch.tensor([[0.0, 8.0], [16.0, 24.0]]).view(1, 1, 2, 2)
    rows, columns = torch.tensor([0.0, 4, 12, 16]), torch.tensor([0.0, 2, 6, 8])  # centres at -1/4, 1/4, 3/4, 5/4
    assert torch.equal(resize(x, 4)[0, 0], rows[:, None] + columns)
    line = torch.tensor([0.0, 3, 6]).expand(1, 1, 5, 3)  # centres at -1/5, 2/5, 1, 8/5, 11/5
    torch.testing.assert_close(resize(line, 5)[0, 0], torch.tensor([0.0, 1.2, 3, 4.8, 6]).expand(5, 5))


def test_features_are_the_stages_of_the_normalised_image_resized_and_concatenated(extractor, images):
    means, deviations = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    normalised = torch.stack([(images[:, c] - means[c]) / deviations[c] for c in range(3)], dim=1)
    stages = extractor.stages(images)
    for stage, expected in zip(stages, extractor.backbone(normalised), strict=True):
        torch.testing.assert_close(stage, expected, rtol=1e-5, atol=1e-5)
    assert extractor.channels == (64, 128, 256)
    assert torch.equal(extractor(images), torch.cat([resize(stage, 7) for stage in stages], dim=1))
    small = torch.rand(1, 3, 28, 28, generator=torch.Generator().manual_seed(1))
    assert torch.equal(extractor(small)[:, :64], extractor.stages(small)[0])  # of the right size already


def test_no_gradient_is_recorded_but_features_serve_in_a_graph(extractor, images):
    features = extractor(images.clone().requires_grad_())
    assert not features.requires_grad
    convolution = torch.nn.Conv2d(448, 1, 1)
    convolution(features).sum().backward()
    assert convolution.weight.grad is not None


def test_dtype_follows_the_module_and_the_state_dict_holds_weights_only(extractor, images):
    assert all(key.startswith("backbone.") for key in extractor.state_dict())
    double = FeatureExtractor("resnet18", (1, 2, 3), "checkpoint", 7).double()
    double.load_state_dict(extractor.state_dict())
    features = double(images.double())
    assert features.dtype == torch.float64
    torch.testing.assert_close(features.float(), extractor(images), rtol=1e-4, atol=1e-4)


def test_unusable_input_is_refused(extractor):
    with pytest.raises(ValueError, match=r"floating-point images in \[0, 1\], got torch.uint8; divide by 255 first"):
        extractor(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"shape \(b, 3, h, w\), got \(1, 1, 32, 32\); convert them to RGB"):
        extractor(torch.zeros(1, 1, 32, 32))
