"""The procedural demo set: layout, exact masks, repeatability, and defects that stand out of their texture."""

import numpy as np
import pytest
from PIL import Image

from almrr_ref.data.datasets import find_dataset
from almrr_ref.data.split import part_numbers
from almrr_ref.demo.check_set import faint_damage
from almrr_ref.demo.faint import FAINT_DEFECTS
from almrr_ref.demo.surfaces import CHANGE, DEFECTS, TEXTURES, defective, main, render, write_demo
from almrr_ref.report.overlays import save_picture

PAIRS = [(texture, kind) for texture in TEXTURES for kind in DEFECTS]


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    return write_demo(tmp_path_factory.mktemp("demo") / "new", seed=3, size=96, n_train=5, n_test_good=3, n_defects=14)


def test_it_reads_as_an_mvtec_category_with_every_kind_on_every_texture(demo):
    dataset = find_dataset(demo)
    assert dataset.layout == "MVTec category"
    assert dataset.notes == []
    assert len(dataset.train) == 5
    assert {sample.path.stem.split("_")[0] for sample in dataset.train} == set(TEXTURES)
    defects = [sample for sample in dataset.test if sample.label]
    assert (len(dataset.test) - len(defects), len(defects)) == (3, 14)
    assert {(s.path.stem.split("_")[0], s.defect_type) for s in defects} == set(PAIRS)
    assert len(TEXTURES) >= 2
    assert len(DEFECTS) >= 5
    for sample in defects:
        assert sample.mask_path is not None
        mask = np.asarray(Image.open(sample.mask_path))
        assert mask.shape == (96, 96)
        assert set(np.unique(mask)) == {0, 255}
        assert Image.open(sample.path).mode == "RGB"


@pytest.mark.parametrize(("texture", "kind"), PAIRS)
@pytest.mark.parametrize("size", [64, 151, 256])
def test_masks_are_exactly_the_changed_pixels(texture, kind, size):
    for seed in (0, 1):
        image, mask = defective(texture, kind, size, np.random.default_rng((seed, size)))
        clean = render(texture, size, np.random.default_rng((seed, size)))  # the same draws, no defect
        changed = np.abs(image.astype(int) - clean).max(axis=2)
        assert (changed[mask == 0] == 0).all()
        assert (changed[mask == 255] >= CHANGE).all()
        assert 0.003 <= (mask > 0).mean() <= 0.08
        assert np.median(changed[mask == 255]) >= 2 * CHANGE  # mostly a change that can be seen


def test_same_seed_same_bytes_and_counts_do_not_matter(demo, tmp_path):
    again = write_demo(tmp_path / "again", seed=3, size=96, n_train=4, n_test_good=2, n_defects=13)
    files = [path.relative_to(again) for path in again.rglob("*.png")]
    assert len(files) == 4 + 2 + 2 * 13
    for file in files:
        assert (again / file).read_bytes() == (demo / file).read_bytes(), file
    other = write_demo(tmp_path / "other", seed=4, size=96, n_train=1, n_test_good=1, n_defects=1)
    assert (other / "train/good/fabric_000.png").read_bytes() != (demo / "train/good/fabric_000.png").read_bytes()
    contents = [path.read_bytes() for path in demo.rglob("good/*.png")]
    assert len(set(contents)) == len(contents)  # training images are not repeated in the test part


def test_the_global_generator_is_left_alone():
    np.random.seed(5)  # noqa: NPY002
    before = np.random.get_state()[1].copy()  # noqa: NPY002
    defective("fabric", "stain", 64, np.random.default_rng(0))
    assert (np.random.get_state()[1] == before).all()  # noqa: NPY002


@pytest.mark.parametrize("texture", TEXTURES)
def test_good_images_vary_but_stay_of_one_kind(texture):
    images = np.stack([render(texture, 128, np.random.default_rng(k)) for k in range(12)]).astype(float)
    assert np.abs(np.diff(images, axis=0)).mean() > 10  # no two show the same pixels
    tones = images.mean(axis=(1, 2))
    assert (np.ptp(tones, axis=0) / tones.mean(axis=0)).max() < 0.25
    contrasts = images.std(axis=(1, 2, 3))
    assert np.ptp(contrasts) / contrasts.mean() < 0.25
    assert ((images == 0) | (images == 255)).mean() < 0.01  # no clipping


@pytest.mark.parametrize(("texture", "kind"), PAIRS)
def test_defects_stand_out_against_the_contrast_of_their_texture(texture, kind):
    for seed in range(4):
        image, mask = defective(texture, kind, 256, np.random.default_rng(seed))
        clean = render(texture, 256, np.random.default_rng(seed)).astype(float)
        change = np.sqrt(((image - clean)[mask > 0] ** 2).mean())
        assert change > 0.75 * clean.std(axis=(0, 1)).mean(), seed


def test_bad_arguments_are_named(tmp_path, capsys):
    for wrong in ({"size": 63}, {"n_train": 0}, {"n_defects": 0}):
        with pytest.raises(ValueError, match="expected a size of at least 64"):
            write_demo(tmp_path / "none", **wrong)
    (tmp_path / "file").touch()
    assert main(["--out", str(tmp_path / "file" / "demo")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_check_set_of_ones_own_images_has_exact_masks_and_keeps_grey_grey(tmp_path):
    rng = np.random.default_rng(0)
    (tmp_path / "good").mkdir()
    for i in range(30):
        Image.fromarray(rng.integers(90, 160, (70, 80), dtype=np.uint8)).save(tmp_path / "good" / f"{i}.png")
    assert main(["--images", str(tmp_path / "good"), "--out", str(tmp_path / "check"), "--seed", "4"]) == 0
    dataset = find_dataset(tmp_path / "check")
    bad = [sample for sample in dataset.test if sample.label]
    assert (len(dataset.train), len(dataset.test), len(bad)) == (24, 6, 3)
    for sample in bad:
        image = np.asarray(Image.open(sample.path))
        assert (image == image[:, :, :1]).all()
        assert 0.003 <= (np.asarray(Image.open(sample.mask_path)) > 0).mean() <= 0.08
    names = {sample.path.stem for sample in dataset.train + dataset.test}
    assert len(names) == 30  # no image both trains and tests


def test_a_folder_that_holds_something_is_not_written_into(tmp_path, capsys):
    (tmp_path / "kept.txt").write_text("x")
    assert main(["--out", str(tmp_path)]) == 2
    assert "not an empty folder" in capsys.readouterr().err
    assert main(["--images", str(tmp_path / "none"), "--out", str(tmp_path / "new")]) == 2
    assert "does not exist" in capsys.readouterr().err


def test_a_faint_check_set_has_eleven_kinds_on_copies_of_good_test_images(tmp_path):
    for i in range(30):
        pixels = np.random.default_rng(i).integers(80, 180, (64, 64), dtype=np.uint8)
        save_picture(tmp_path / "good" / f"{i}.png", pixels)
    flags = ["--images", str(tmp_path / "good"), "--faint", "--seed", "4"]
    assert main([*flags, "--out", str(tmp_path / "check")]) == 0
    dataset = find_dataset(tmp_path / "check")
    good = {s.path.stem: np.asarray(Image.open(s.path)).astype(int) for s in dataset.test if not s.label}
    bad = [sample for sample in dataset.test if sample.label]
    assert (len(dataset.train), len(good), len(bad)) == (24, 6, 24)
    assert {sample.defect_type for sample in bad} == {*DEFECTS, *FAINT_DEFECTS}
    strongest = []
    for sample in bad:
        image, mask = (np.asarray(Image.open(path)).astype(int) for path in (sample.path, sample.mask_path))
        change = np.abs(image - good[sample.path.stem.rpartition("_")[0]]).max(axis=2)
        assert (image == image[:, :, :1]).all()  # gray stays gray
        assert set(np.unique(mask)) == {0, 255}
        assert change[mask > 0].mean() > 2 * change[mask == 0].mean()
        strongest.append(change.max())
    assert min(strongest) < 60 < max(strongest)
    assert main([*flags, "--out", str(tmp_path / "again")]) == 0
    for sample in bad:
        again = tmp_path / "again" / sample.path.relative_to(tmp_path / "check")
        assert sample.path.read_bytes() == again.read_bytes()


def test_no_part_is_both_trained_on_and_checked(tmp_path, capsys):
    for i in range(36):
        pixels = np.random.default_rng(i).integers(80, 180, (64, 64), dtype=np.uint8)
        save_picture(tmp_path / "good" / f"tile{i // 3}_light{i % 3}.png", pixels)
    flags = ["--images", str(tmp_path / "good"), "--out", str(tmp_path / "check"), "--parts"]
    assert main([*flags, "tile([0-9]+)_"]) == 0
    data = find_dataset(tmp_path / "check")
    trained, checked = ({s.path.name.split("_")[0] for s in part} for part in (data.train, data.test))
    assert len(trained) + len(checked) == 12
    assert not trained & checked
    assert len(data.test) == 9  # a fifth of 36 is 7, and a part has three
    assert max(part_numbers(data, "part([0-9]+)_")) + 1 == len(trained)
    refused = {
        "tile(": "no regular expression",
        "board([0-9]+)": "is not found in this path",
        "(tile)": "all images show one part",
    }
    for pattern, message in refused.items():
        capsys.readouterr()
        assert main(["--images", str(tmp_path / "good"), "--out", str(tmp_path / "new"), "--parts", pattern]) == 2
        assert message in capsys.readouterr().err


def test_of_two_parts_one_is_left_to_train_on(tmp_path):
    for i in range(20):
        pixels = np.random.default_rng(i).integers(80, 180, (64, 64), dtype=np.uint8)
        save_picture(tmp_path / "good" / f"tile{int(i == 0)}_light{i}.png", pixels)  # of one part a single image
    for seed in range(4):
        flags = ["--images", str(tmp_path / "good"), "--parts", "tile([0-9]+)_", "--seed", str(seed)]
        assert main([*flags, "--out", str(tmp_path / f"check{seed}")]) == 0
        assert len(find_dataset(tmp_path / f"check{seed}").train) in (1, 19)


@pytest.mark.parametrize("kind", FAINT_DEFECTS)
def test_a_faint_defect_changes_the_image_where_its_mask_says(kind):
    rng = np.random.default_rng(3)
    clean = np.clip(rng.normal(0.5, 0.08, (256, 256, 1)).repeat(3, axis=2), 0, 1)
    for _ in range(4):
        damaged, mask = FAINT_DEFECTS[kind](clean.copy(), rng)
        change = np.abs(damaged - clean).max(axis=2)
        assert damaged.shape == clean.shape
        assert 13 <= mask.sum() < 0.6 * mask.size
        assert change[mask].mean() > 0.04
        assert change[mask].mean() > 4 * change[~mask].mean()


def test_a_faint_defect_that_covers_nothing_is_drawn_again_and_refused_in_the_end(monkeypatch):
    picture = np.full((64, 64, 3), 128, dtype=np.uint8)
    empty, full = np.zeros((64, 64), dtype=bool), np.ones((64, 64), dtype=bool)
    drawn = iter([empty, empty, full])
    monkeypatch.setitem(FAINT_DEFECTS, "crack", lambda image, rng: (image * 0.5, next(drawn)))
    assert faint_damage(picture, "crack", np.random.default_rng(0))[1].all()
    monkeypatch.setitem(FAINT_DEFECTS, "crack", lambda image, rng: (image, empty))
    with pytest.raises(ValueError, match="no crack of at least"):
        faint_damage(picture, "crack", np.random.default_rng(0))
