"""A region of interest, from the mask file to every form of the network: nothing outside of it has any influence."""

import base64
import dataclasses
import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_network import good_images
from torch import Tensor
from trust_cases import read_scores
from woven_cloth import GOOD, SIZE, SMALL, cloth

from almrr_ref import Detector, calibrate, evaluate, fit, predict
from almrr_ref.config import ModelConfig
from almrr_ref.data.images import resize_image
from almrr_ref.data.roi import draw_inside, roi_of, settle_roi
from almrr_ref.data.textures import ImageTextures
from almrr_ref.features import FeatureExtractor
from almrr_ref.plus.evidence import BORDER
from almrr_ref.report.layers import picture_layers
from almrr_ref.run.checkpoint import read_checkpoint
from almrr_ref.training import Trainer

pytestmark = pytest.mark.filterwarnings("ignore:.*random.*:UserWarning", "ignore::DeprecationWarning")
BOX = (slice(6, 28), slice(2, 40))


def spoilt_outside(picture: np.ndarray, seed: int) -> np.ndarray:
    """The same picture inside the region; anything outside, up to its edge."""
    spoilt = np.random.default_rng(seed).integers(0, 256, picture.shape, dtype=np.uint8)
    spoilt[BOX] = picture[BOX]
    return spoilt


CLEAN, DEFECTIVE = cloth(100), cloth(101, (slice(12, 20), slice(20, 30)))
SPOILT = spoilt_outside(CLEAN, 102)


def save_mask(path: Path, height: int = SIZE[0], width: int = SIZE[1]) -> Path:
    mask = np.zeros(SIZE, dtype=np.uint8)
    mask[BOX] = 255
    Image.fromarray(mask).resize((width, height), Image.Resampling.NEAREST).save(path)
    return path


@pytest.fixture(scope="module")
def trainer(tmp_path_factory: pytest.TempPathFactory) -> Trainer:
    """That of a run with a region of interest."""
    folder, trainers = tmp_path_factory.mktemp("roi"), []

    def make_trainer(*arguments: Any) -> Trainer:
        trainers.append(Trainer(*arguments))
        return trainers[-1]

    mask = save_mask(folder / "mask.png")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fit, "Trainer", make_trainer)
        fit.train_detector(GOOD, out=folder / "run", steps=2, batch_size=2, roi=mask, **SMALL)
    mask.unlink()  # the network has it
    return trainers[0]


@pytest.fixture(scope="module")
def trained(trainer: Trainer) -> Path:
    """Its checkpoint."""
    assert trainer.run is not None
    return trainer.run / "last.pt"


def test_a_run_knows_the_mask_it_began_with(trainer: Trainer) -> None:
    assert list(trainer.files["masks"]) == ["mask.png"]


def test_training_sees_anomalies_inside_alone(trainer: Trainer) -> None:
    outside, drawn = torch.ones(SIZE, dtype=torch.bool), 0.0
    outside[BOX] = False
    for augmented, mask, image in (trainer.samples[number] for number in range(20)):
        clean = trainer.samples.images[image].float() / 255
        assert not mask[0, outside].any()
        assert augmented[:, outside].equal(clean[:, outside])
        drawn += float(mask.sum())
    assert drawn > 0


def test_statistics_and_memory_are_of_the_inside(trainer: Trainer) -> None:
    model, cells = trainer.model, torch.zeros(8, 16, dtype=torch.bool)
    assert model.config.standardise == "channel", "the edge repeats in every image, and does not count"
    cells[1:7, :10] = True  # of 4 pixels, those that the region touches
    stages = [stage[:, :, cells] for stage in model.stages(trainer.samples.images / 255)[:1]]
    torch.testing.assert_close(stages[0].mean(dim=(0, 2)), torch.zeros(64), atol=1e-4, rtol=0)
    assert model.memory is not None
    assert model.memory.cells is not None
    assert int(model.memory.cells.sum()) == 4 * 5  # of 8 pixels
    assert model.evidence is not None
    assert (model.evidence.rings > BORDER).equal(~cells)


@pytest.mark.parametrize("fuse", [False, True])
def test_nothing_outside_changes_a_score_and_a_defect_inside_is_found_inside(trained: Path, fuse: bool) -> None:
    """Of the exported form see tests/deploy/test_onnx.py."""
    detector = Detector.load(trained, fuse=fuse)
    clean, spoilt, defective = (detector(picture) for picture in (CLEAN, SPOILT, DEFECTIVE))
    assert clean.score == spoilt.score
    assert clean.network_map.equal(spoilt.network_map)
    assert (clean.defective, defective.defective) == (False, True)
    outside = torch.ones(SIZE, dtype=torch.bool)
    outside[BOX] = False
    for result in (spoilt, defective):
        assert float(result.network_map[0, outside].max()) == 0 < float(result.network_map[0, BOX[0], BOX[1]].min())
        assert not result.mask[outside].any()
    content = picture_layers(detector.model, dataclasses.replace(defective, threshold=1e-6))
    levels = np.asarray(Image.open(io.BytesIO(base64.b64decode(content["levels"].partition(",")[2]))))
    assert levels[outside.numpy()].max() == 0 < levels.max()
    whole = detector.model.smooth(torch.full((1, 1, *SIZE), 0.5))
    torch.testing.assert_close(whole[0, 0][BOX], torch.full((22, 38), 0.5), msg="the edge is a border to the mean, too")


def test_the_score_is_of_the_fraction_of_the_region(trained: Path) -> None:
    model = Detector.load(trained).model
    maps = torch.rand(1, 1, *SIZE, generator=torch.Generator().manual_seed(0))
    inside = model.smooth(maps)[0, 0][BOX].flatten()
    expected = inside.sort().values[-round(0.005 * len(inside)) :].mean()
    assert float(model.image_scores(maps)) == pytest.approx(float(expected), rel=1e-6)


def test_the_commands_judge_the_region_alone(trained: Path, tmp_path: Path) -> None:
    for name, picture in (("good/0", CLEAN), ("good/1", SPOILT), ("hole/0", DEFECTIVE)):
        path = tmp_path / "data" / "test" / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).save(path)
    truth = np.zeros(SIZE, dtype=np.uint8)
    truth[12:20, 20:30] = truth[:, 60:] = 255  # the second lies outside
    (tmp_path / "data" / "ground_truth" / "hole").mkdir(parents=True)
    Image.fromarray(truth).save(tmp_path / "data" / "ground_truth" / "hole" / "0_mask.png")
    (tmp_path / "data" / "train" / "good").mkdir(parents=True)
    Image.fromarray(CLEAN).save(tmp_path / "data" / "train" / "good" / "0.png")
    checkpoint, found = ["--checkpoint", str(trained)], tmp_path / "found"
    assert (
        predict.main([*checkpoint, "--input", str(tmp_path / "data" / "test"), "--out", str(found), "--no-maps"]) == 0
    )
    rows = read_scores(found)
    assert [row["label"] for row in rows] == ["0", "0", "1"]
    assert rows[0]["score"] == rows[1]["score"]
    assert evaluate.main([*checkpoint, "--data", str(tmp_path / "data"), "--out", str(tmp_path / "measured")]) == 0
    counts = json.loads((tmp_path / "measured" / "metrics.json").read_text())["counts"]
    assert (counts["defect_pixels"], counts["components"]) == (8 * 10, 1)
    assert counts["normal_pixels"] == 3 * 22 * 38 - 8 * 10


def test_threshold_and_memory_do_not_know_what_lies_outside(tmp_path: Path) -> None:
    mask = save_mask(tmp_path / "mask.png")
    dirty = [spoilt_outside(picture, seed) for seed, picture in enumerate(GOOD)]
    for name, pictures in (("a", GOOD), ("b", dirty)):
        fit.train_detector(pictures, out=tmp_path / name, steps=0, roi=str(mask), **SMALL)
    runs = [read_checkpoint(tmp_path / name / "last.pt") for name in "ab"]
    for key in ("memory.patches", "memory.axes", "memory.middle", "standardise.mean", "standardise.std"):
        assert runs[0]["weights"][key].equal(runs[1]["weights"][key]), key
    assert runs[0]["threshold"] == runs[1]["threshold"]
    for number, picture in enumerate(dirty):
        (tmp_path / "new").mkdir(exist_ok=True)
        Image.fromarray(spoilt_outside(picture, 50)).save(tmp_path / "new" / f"{number}.png")
    thresholds = []
    for name in "ab":
        last = tmp_path / name / "last.pt"
        assert calibrate.main(["--checkpoint", str(last), "--good", str(tmp_path / "new")]) == 0
        thresholds.append(read_checkpoint(last)["threshold"])
    assert thresholds[0] == thresholds[1]


def test_the_mask_is_brought_to_the_networks_size_and_kept_in_its_configuration(tmp_path: Path) -> None:
    config = ModelConfig(image_size=SIZE)
    assert settle_roi(None, GOOD, config) is config
    assert roi_of(config) is None
    roi = roi_of(settle_roi(str(save_mask(tmp_path / "mask.png", 4 * 32, 4 * 64)), [], config))
    expected = torch.zeros(SIZE, dtype=torch.bool)
    expected[BOX] = True
    smaller = torch.zeros(SIZE, dtype=torch.bool)
    smaller[7:27, 3:39] = True  # pixels at the edge are made of white and black ones
    assert roi is not None
    assert roi.equal(smaller)
    for white, kind in ((1, np.uint8), (255, np.uint16), (65535, np.uint16)):
        Image.fromarray(expected.numpy().astype(kind) * kind(white)).save(tmp_path / "other.png")
        assert expected.equal(roi_of(settle_roi(str(tmp_path / "other.png"), [], config)))


@pytest.mark.parametrize("size", [(24, 48), (80, 160)])
def test_where_a_picture_is_resized_the_region_is_of_white_pixels_alone(size: tuple[int, int], tmp_path: Path) -> None:
    mask, pictures = np.zeros(size, np.uint8), np.random.default_rng(0).integers(0, 256, (2, 3, *size), dtype=np.uint8)
    mask[:, : size[1] // 2 - 1] = 255
    pictures[1] = np.where(mask > 0, pictures[0], pictures[1])
    Image.fromarray(mask).save(tmp_path / "mask.png")
    roi = roi_of(settle_roi(str(tmp_path / "mask.png"), [], ModelConfig(image_size=SIZE)))
    assert roi is not None
    one, other = (resize_image(torch.from_numpy(picture), SIZE) for picture in pictures)
    assert one[:, roi].equal(other[:, roi])
    assert not one.equal(other)
    assert float(roi.float().mean()) > 0.4


def test_a_narrow_region_is_seen_at_another_size_too() -> None:
    """`find_groups` looks at images of 96 x 96."""
    roi = torch.zeros(256, 256, dtype=torch.bool)
    roi[:, 123:125] = True
    extractor = FeatureExtractor("resnet18", (1,), "random", (64, 64), roi, 0.5)
    assert extractor.stages(torch.rand(1, 3, 96, 96))[0].isfinite().all()


@pytest.mark.parametrize(
    ("values", "changes", "message"),
    [
        (np.zeros(SIZE), {}, "the mask has 0 white pixels at 32 x 64 pixels; at least 64 are judged"),
        (np.pad(np.full((9, 7), 255), ((10, 13), (0, 57))), {}, "has 63 white pixels"),
        (np.full((64, 32), 255), {}, "is 64 x 32 pixels (height x width), the images 32 x 64; draw it over one"),
        (np.tile(np.arange(64), (32, 1)) * 4, {}, "is no mask: 75% of it is neither black nor white"),
        (np.full((*SIZE, 4), (255, 255, 255, 0)) + np.eye(64)[:32, :, None] * 255, {}, "it has transparent pixels"),
        (np.full(SIZE, 255), {"image_size": 64, "tile": 64}, "drop --tile"),
        (None, {}, "no such file"),
        (b"no picture", {}, "not an image"),
    ],
)
def test_what_is_no_mask_for_these_images_is_named(
    values: np.ndarray | bytes | None, changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    path = tmp_path / "mask.png"
    if isinstance(values, bytes):
        path.write_bytes(values)
    elif values is not None:
        Image.fromarray(values.astype(np.uint8)).save(path)
    config = ModelConfig(**{"image_size": SIZE, **changes})
    with pytest.raises(ValueError, match=f"^[^\n]*mask\\.png: [^\n]*{re.escape(message)}[^\n]*$"):
        settle_roi(str(path), GOOD, config)


def test_anomalies_are_drawn_again_until_they_lie_inside_and_are_cut_to_the_region() -> None:
    image, roi = good_images(1)[0].float() / 255, torch.zeros(64, 64, dtype=torch.bool)
    roi[:, :20] = True
    columns = iter((40, 30, 16))  # the first two lie outside

    def square(image: Tensor, _source: Any, _generator: torch.Generator) -> tuple[Tensor, Tensor]:
        mask, left = torch.zeros(1, 64, 64), next(columns, 40)
        mask[:, 10:20, left : left + 10] = 1
        return 1 - image, mask

    drawn, source = (square, roi, image), ImageTextures(good_images(1))
    augmented, mask = draw_inside(*drawn, source, torch.Generator())
    assert mask.sum() == 10 * 4
    assert augmented[:, :, 20:].equal(image[:, :, 20:])
    assert augmented[:, :, :20].equal(1 - image[:, :, :20])
    augmented, mask = draw_inside(*drawn, source, torch.Generator())  # none of these hits it
    assert augmented.equal(image)
    assert not mask.any()


def test_a_damaged_mask_in_a_configuration_is_refused(tmp_path: Path) -> None:
    for text in ("no base64!", base64.b64encode(b"no picture").decode()):
        with pytest.raises(ValueError, match=r"base64|picture: "):
            roi_of(ModelConfig(image_size=SIZE, roi_png=text))
    of_another_size = settle_roi(str(save_mask(tmp_path / "mask.png")), [], ModelConfig(image_size=(64, 128))).roi_png
    with pytest.raises(ValueError, match="set it by --roi"):
        roi_of(ModelConfig(image_size=SIZE, roi_png=of_another_size))
