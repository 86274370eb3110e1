"""The demo set and check sets: layout, exact masks, repeatability, and defects that stand out of their texture."""

import numpy as np
import pytest
from PIL import Image

from almrr_ref.data.layouts import find_dataset
from almrr_ref.data.split import part_numbers
from almrr_ref.demo.__main__ import main
from almrr_ref.demo.check_set import write_check
from almrr_ref.demo.defects import CHANGE, DEFECTS, FAINT_DEFECTS, damage, faint_damage
from almrr_ref.demo.surfaces import TEXTURES, open_data, render, write_demo
from almrr_ref.report.overlays import save_picture

PAIRS = [(texture, kind) for texture in TEXTURES for kind in DEFECTS]


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    return write_demo(tmp_path_factory.mktemp("demo") / "new", seed=3, size=64, n_train=5, n_test_good=3, n_defects=14)


def save_grey_images(folder, names):
    for i, name in enumerate(names):
        pixels = np.random.default_rng(i).integers(80, 180, (64, 64), dtype=np.uint8)
        save_picture(folder / f"{name}.png", Image.fromarray(pixels))
    return str(folder)


def test_it_reads_as_an_mvtec_category_with_every_kind_on_every_texture(demo):
    dataset = find_dataset(demo)
    assert (dataset.layout, dataset.notes, len(dataset.train)) == ("MVTec category", [], 5)
    assert {sample.path.stem.split("_")[0] for sample in dataset.train} == {"fabric", "leather"}
    defects = [sample for sample in dataset.test if sample.label]
    assert (len(dataset.test) - len(defects), len(defects)) == (3, 14)
    assert {(s.path.stem.split("_")[0], s.defect_type) for s in defects} == set(PAIRS)
    for sample in defects:
        mask = np.asarray(Image.open(sample.mask_path))
        assert mask.shape == (64, 64)
        assert set(np.unique(mask)) == {0, 255}
        assert Image.open(sample.path).mode == "RGB"


@pytest.mark.parametrize(("texture", "kind"), PAIRS)
def test_masks_are_exactly_the_changed_pixels_and_the_change_stands_out(texture, kind):
    for size, seed in ((64, 0), (64, 1), (151, 2), (256, 3), (256, 4)):
        rng = np.random.default_rng(seed)
        image, mask = damage(TEXTURES[texture](size, rng), kind, rng)
        clean = render(texture, size, np.random.default_rng(seed)).astype(int)  # the same draws, no defect
        changed = np.abs(image - clean).max(axis=2)
        assert (changed[mask == 0] == 0).all()
        assert (changed[mask == 255] >= CHANGE).all()
        assert 0.003 <= (mask > 0).mean() <= 0.08
        assert np.median(changed[mask == 255]) >= 2 * CHANGE  # mostly a change that can be seen
        contrast = clean.std(axis=(0, 1)).mean()
        assert np.sqrt(((image - clean)[mask > 0] ** 2).mean()) > 0.75 * contrast or size < 256


def test_same_seed_same_bytes_and_counts_do_not_matter(demo, tmp_path):
    again = write_demo(tmp_path / "again", seed=3, size=64, n_train=4, n_test_good=2, n_defects=13)
    files = [path.relative_to(again) for path in again.rglob("*.png")]
    assert len(files) == 4 + 2 + 2 * 13
    for file in files:
        assert (again / file).read_bytes() == (demo / file).read_bytes(), file
    other = write_demo(tmp_path / "other", seed=4, size=64, n_train=1, n_test_good=1, n_defects=1)
    assert (other / "train/good/fabric_000.png").read_bytes() != (demo / "train/good/fabric_000.png").read_bytes()
    contents = [path.read_bytes() for path in demo.rglob("good/*.png")]
    assert len(set(contents)) == len(contents)  # training images are not repeated in the test part


@pytest.mark.parametrize("texture", TEXTURES)
def test_good_images_vary_but_stay_of_one_kind(texture):
    images = np.stack([render(texture, 128, np.random.default_rng(k)) for k in range(12)]).astype(float)
    assert np.abs(np.diff(images, axis=0)).mean() > 10  # no two show the same pixels
    tones, contrasts = images.mean(axis=(1, 2)), images.std(axis=(1, 2, 3))
    assert (np.ptp(tones, axis=0) / tones.mean(axis=0)).max() < 0.25
    assert np.ptp(contrasts) / contrasts.mean() < 0.25
    assert ((images == 0) | (images == 255)).mean() < 0.01  # no clipping


def test_a_run_writes_the_demo_set_once_and_whole(tmp_path, monkeypatch, capsys):
    save_grey_images(tmp_path / ".demo-images.part" / "train" / "good", ["half"])  # of a run that was killed

    def write_small(folder):
        assert not folder.exists()
        return write_demo(folder, size=64, n_train=2, n_test_good=1, n_defects=1)

    monkeypatch.setattr("almrr_ref.demo.surfaces.write_demo", write_small)
    assert len(open_data("demo", tmp_path).train) == 2
    monkeypatch.delattr("almrr_ref.demo.surfaces.write_demo")
    assert open_data("demo", tmp_path).root == tmp_path / "demo-images"
    assert capsys.readouterr().out.count("train: 2 good images") == 2


def test_bad_arguments_are_one_line_each(tmp_path, capsys):
    for wrong in ({"size": 63}, {"n_train": 0}, {"n_defects": 0}):
        with pytest.raises(ValueError, match="expected a size >= 64"):
            write_demo(tmp_path / "none", **wrong)
    good = save_grey_images(tmp_path / "good", [f"tile{i}" for i in range(12)])
    (tmp_path / "file").touch()
    for flags, message in (
        (["--out", str(tmp_path / "file" / "demo")], "cannot write"),
        (["--out", str(tmp_path / "good")], "not an empty folder"),
        (["--images", str(tmp_path / "none")], "does not exist"),
        (["--images", good, "--parts", "tile("], "no regular expression"),
        (["--images", good, "--parts", "board([0-9]+)"], "is not found in this path"),
        (["--images", good, "--parts", "(tile)"], "all images show one part"),
    ):
        assert main(["--out", str(tmp_path / "new"), *flags]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1


def test_a_check_set_splits_the_images_and_keeps_grey_grey(tmp_path):
    good = save_grey_images(tmp_path / "good", range(30))
    assert main(["--images", good, "--out", str(tmp_path / "check"), "--seed", "4"]) == 0
    dataset = find_dataset(tmp_path / "check")
    bad = [sample for sample in dataset.test if sample.label]
    assert (len(dataset.train), len(dataset.test), len(bad)) == (24, 6, 3)
    for sample in bad:
        image = np.asarray(Image.open(sample.path))
        assert (image == image[:, :, :1]).all()
        assert 0.003 <= (np.asarray(Image.open(sample.mask_path)) > 0).mean() <= 0.08
    assert len({sample.path.stem for sample in dataset.train + dataset.test}) == 30  # no image both trains and tests


def test_a_faint_check_set_has_eleven_kinds_on_copies_of_good_test_images(tmp_path):
    good = save_grey_images(tmp_path / "good", range(30))
    check, again = (write_check(good, tmp_path / name, seed=4, size=128, faint=True) for name in ("check", "again"))
    dataset = find_dataset(check)
    clean = {s.path.stem: np.asarray(Image.open(s.path)).astype(int) for s in dataset.test if not s.label}
    bad = [sample for sample in dataset.test if sample.label]
    assert (len(dataset.train), len(clean), len(bad)) == (24, 6, 24)
    assert {sample.defect_type for sample in bad} == {*DEFECTS, *FAINT_DEFECTS}
    strongest = []
    for sample in bad:
        image, mask = (np.asarray(Image.open(path)).astype(int) for path in (sample.path, sample.mask_path))
        change = np.abs(image - clean[sample.path.stem.rpartition("_")[0]]).max(axis=2)
        assert (image == image[:, :, :1]).all()  # grey stays grey
        assert set(np.unique(mask)) == {0, 255}
        assert change[mask > 0].mean() > 2 * change[mask == 0].mean()
        strongest.append(change.max())
        assert sample.path.read_bytes() == (again / sample.path.relative_to(check)).read_bytes()
    assert min(strongest) < 60 < max(strongest)


def test_no_part_is_both_trained_on_and_checked_and_one_is_left_to_train_on(tmp_path):
    good = save_grey_images(tmp_path / "good", [f"tile{i // 3}_light{i % 3}" for i in range(36)])
    data = find_dataset(write_check(good, tmp_path / "check", size=64, parts="tile([0-9]+)_"))
    trained, checked = ({s.path.name.split("_")[0] for s in samples} for samples in (data.train, data.test))
    assert len(trained) + len(checked) == 12
    assert not trained & checked
    assert len(data.test) == 9  # a fifth of 36 is 7, and a part has three
    assert max(part_numbers(data, "part([0-9]+)_")) + 1 == len(trained)
    two = save_grey_images(tmp_path / "two", [f"tile{int(i == 0)}_light{i}" for i in range(20)])  # 1 and 19 images
    for seed in range(4):
        check = write_check(two, tmp_path / f"check{seed}", seed, size=64, parts="tile([0-9]+)_")
        assert len(find_dataset(check).train) in (1, 19)


@pytest.mark.parametrize("kind", FAINT_DEFECTS)
def test_a_faint_defect_changes_the_image_where_its_mask_says(kind):
    rng = np.random.default_rng(3)
    clean = np.clip(rng.normal(0.5, 0.08, (256, 256, 1)).repeat(3, axis=2), 0, 1)
    for _ in range(4):
        damaged, mask = FAINT_DEFECTS[kind](clean.copy(), rng)
        change = np.abs(damaged - clean).max(axis=2)
        assert 13 <= mask.sum() < 0.6 * mask.size
        assert change[mask].mean() > max(0.04, 4 * change[~mask].mean())


def test_a_faint_defect_that_covers_nothing_is_drawn_again_and_refused_in_the_end(monkeypatch):
    picture = np.full((64, 64, 3), 128, dtype=np.uint8)
    empty, full = np.zeros((64, 64), dtype=bool), np.ones((64, 64), dtype=bool)
    drawn = iter([empty, empty, full])
    monkeypatch.setitem(FAINT_DEFECTS, "crack", lambda image, rng: (image * 0.5, next(drawn)))
    assert faint_damage(picture, "crack", np.random.default_rng(0))[1].all()
    monkeypatch.setitem(FAINT_DEFECTS, "crack", lambda image, rng: (image, empty))
    with pytest.raises(ValueError, match="no crack of at least"):
        faint_damage(picture, "crack", np.random.default_rng(0))
