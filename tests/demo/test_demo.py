"""The demo set and check sets: layout, exact masks, repeatability, and defects that stand out of their texture."""

import numpy as np
import pytest
from PIL import Image

from almrr_ref.data.layouts import find_dataset
from almrr_ref.data.split import read_part_ids
from almrr_ref.demo.__main__ import main
from almrr_ref.demo.check_set import write_check
from almrr_ref.demo.defects import CHANGE, DEFECTS, FAINT_DEFECTS, damage, full_damage, quantise
from almrr_ref.demo.surfaces import TEXTURES, data_folder, write_demo
from almrr_ref.report.overlays import save_picture

PAIRS = [(texture, kind) for texture in TEXTURES for kind in DEFECTS]


def save_grey_images(folder, names):
    for i, name in enumerate(names):
        save_picture(folder / f"{name}.png", np.random.default_rng(i).integers(80, 180, (64, 64), dtype=np.uint8))
    return folder


def read(path):
    return np.asarray(Image.open(path)).astype(int)


@pytest.mark.parametrize(("texture", "kind"), PAIRS)
def test_masks_are_exactly_the_changed_pixels_and_the_change_stands_out(texture, kind):
    for size, seed in ((64, 0), (151, 1)):
        rng = np.random.default_rng(seed)
        image, mask = damage(TEXTURES[texture](size, rng), kind, rng)
        clean = quantise(TEXTURES[texture](size, np.random.default_rng(seed))).astype(int)  # the same draws, no defect
        changed = np.abs(image - clean).max(axis=2)
        assert (changed[mask == 0] == 0).all()
        assert (changed[mask == 255] >= CHANGE).all()
        assert 0.003 <= (mask > 0).mean() <= 0.08
        assert np.median(changed[mask == 255]) >= 2 * CHANGE  # mostly a change that can be seen


@pytest.mark.parametrize("kind", [*DEFECTS, *FAINT_DEFECTS])
def test_defects_lie_anywhere_on_a_long_image_and_are_as_large_as_on_a_square_of_its_area(kind):
    areas, places = {}, []
    for shape in ((64, 64), (32, 128)):
        clean = np.random.default_rng(1).uniform(0.4, 0.6, (*shape, 3))
        drawn = [full_damage(clean, kind, np.random.default_rng(seed)) for seed in range(8)]
        assert all(image.shape == (*shape, 3) and mask.shape == shape for image, mask in drawn)
        areas[shape] = np.median([(mask > 0).mean() for _, mask in drawn])
        places = [np.nonzero(mask)[1].mean() for _, mask in drawn]
    assert min(places) < 60 < 68 < max(places)  # along the 128 pixels of the last shape
    assert 0.4 < areas[32, 128] / areas[64, 64] < 2.5


def test_the_demo_set_is_an_mvtec_category_that_follows_from_its_seed_alone(tmp_path):
    demo, again, other = (tmp_path / name for name in ("demo", "again", "other"))
    write_demo(demo, seed=3, size=64, n_train=5, n_test_good=3, n_defects=14)
    dataset = find_dataset(demo)
    assert (dataset.layout, dataset.notes, len(dataset.train)) == ("MVTec category", [], 5)
    assert {sample.path.stem.split("_")[0] for sample in dataset.train} == {"fabric", "leather"}
    defects = [sample for sample in dataset.test if sample.label]
    assert (len(dataset.test) - len(defects), len(defects)) == (3, 14)
    assert {(s.path.stem.split("_")[0], s.defect_type) for s in defects} == set(PAIRS)
    for sample in defects:
        assert set(np.unique(read(sample.mask_path))) == {0, 255}
        assert read(sample.path).shape == (64, 64, 3)
    contents = [path.read_bytes() for path in demo.rglob("good/*.png")]
    assert len(set(contents)) == len(contents)  # training images are not repeated in the test part

    write_demo(again, seed=3, size=64, n_train=3, n_test_good=2, n_defects=4)
    files = [path.relative_to(again) for path in again.rglob("*.png")]
    assert len(files) == 3 + 2 + 2 * 4
    assert all((again / file).read_bytes() == (demo / file).read_bytes() for file in files)
    write_demo(other, seed=4, size=64, n_train=1, n_test_good=1, n_defects=1)
    assert (other / "train/good/fabric_000.png").read_bytes() not in contents


def test_a_run_writes_the_demo_set_once_and_whole(tmp_path, monkeypatch):
    save_grey_images(tmp_path / ".demo-images.part" / "train" / "good", ["half"])  # of a run that was killed

    def write_small(folder):
        assert not folder.exists()
        write_demo(folder, size=64, n_train=2, n_test_good=1, n_defects=1)

    monkeypatch.setattr("almrr_ref.demo.surfaces.write_demo", write_small)
    assert len(find_dataset(data_folder("demo", tmp_path)).train) == 2
    monkeypatch.delattr("almrr_ref.demo.surfaces.write_demo")
    assert data_folder("demo", tmp_path) == tmp_path / "demo-images"


def test_mistakes_are_one_line_each(tmp_path, capsys):
    good = str(save_grey_images(tmp_path / "good", [f"tile{i}" for i in range(12)]))
    (tmp_path / "file").touch()
    for flags, message in (
        (["--out", str(tmp_path / "file")], "cannot write"),
        (["--out", str(tmp_path / "good")], "not an empty folder"),
        (["--images", str(tmp_path / "none")], "does not exist"),
        (["--faint"], "--faint is for a check set of your own images"),
        (["--seed", "-1"], "--seed must be at least 0, got -1"),
        (["--images", good, "--parts", "tile("], "no regular expression"),
        (["--images", good, "--parts", "tile"], "group in parentheses"),
        (["--images", good, "--parts", "board([0-9]+)"], "--parts 'board([0-9]+)' is not found in tile0.png"),
        (["--images", good, "--parts", "(tile)"], "all images show one part"),
    ):
        assert main(["--out", str(tmp_path / "new"), *flags]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
    with pytest.raises(ValueError, match=r"no dent between .* came out; the image may be all black or white"):
        damage(np.zeros((64, 64, 3)), "dent", np.random.default_rng(0))


def test_a_faint_check_set_has_eleven_kinds_on_copies_of_good_test_images(tmp_path):
    good, check, again = save_grey_images(tmp_path / "good", range(16)), tmp_path / "check", tmp_path / "again"
    for out in (check, again):
        write_check(good, out, seed=4, faint=True, parts=None, pixels=96)
    dataset = find_dataset(check)
    clean = {s.path.stem: read(s.path) for s in dataset.test if not s.label}
    bad = [sample for sample in dataset.test if sample.label]
    assert (len(dataset.train), len(clean), len(bad)) == (12, 4, 16)
    assert {sample.defect_type for sample in bad} == {*DEFECTS, *FAINT_DEFECTS}
    strongest = []
    for sample in bad:
        image, mask = read(sample.path), read(sample.mask_path)
        change = np.abs(image - clean[sample.path.stem.rpartition("_")[0]]).max(axis=2)
        assert (image == image[:, :, :1]).all()  # grey stays grey
        assert 2e-4 <= (mask > 0).mean() < 0.6
        assert change[mask > 0].mean() > 2 * change[mask == 0].mean()
        strongest.append(change.max())
        assert sample.path.read_bytes() == (again / sample.path.relative_to(check)).read_bytes()
    assert min(strongest) < 60 < max(strongest)


def test_a_check_set_of_12_bit_pictures_is_not_black(tmp_path):
    (tmp_path / "good").mkdir()
    for seed in range(12):
        values = np.random.default_rng(seed).integers(1500, 2600, (64, 64)).astype(np.uint16)
        Image.fromarray(values).save(tmp_path / "good" / f"{seed}.tif")
    write_check(tmp_path / "good", tmp_path / "check", seed=0, faint=True, parts=None, pixels=64)
    written = read(find_dataset(tmp_path / "check").train[0].path)
    assert (written.min() // 10, written.max() // 10) == (9, 16), "1500 and 2600 of 4095"


def test_images_that_cannot_be_read_are_named(tmp_path, capsys):
    good = save_grey_images(tmp_path / "good", [str(i) for i in range(10)])
    (good / "broken.png").write_bytes(b"")
    assert main(["--images", str(good), "--out", str(tmp_path / "check"), "--pixels", "64"]) == 1
    assert f"not read: {good / 'broken.png'}: the file is empty" in capsys.readouterr().err
    assert len(find_dataset(tmp_path / "check").train) == 6


def test_copies_of_a_picture_are_not_both_trained_on_and_checked(tmp_path):
    good = save_grey_images(tmp_path / "good", [f"tile{i}" for i in range(10)])
    for path in sorted(good.iterdir()):
        (good / f"copy_of_{path.name}").write_bytes(path.read_bytes())
    write_check(good, tmp_path / "check", 0, True, None, pixels=64)
    data = find_dataset(tmp_path / "check")
    checked = [read(sample.path) for sample in data.test if not sample.label]
    assert len(data.train) + len(checked) == 20
    assert not any(np.array_equal(read(sample.path), image) for sample in data.train for image in checked)


def test_no_part_is_both_trained_on_and_checked_and_one_is_left_to_train_on(tmp_path, capsys):
    good = save_grey_images(tmp_path / "good", [f"tile{i // 3}_light{i % 3}" for i in range(24)])
    flags = ["--parts", "tile([0-9]+)_", "--pixels", "96"]
    assert main(["--images", str(good), "--out", str(tmp_path / "check"), *flags]) == 0
    assert "are brought to 96 x 96; say otherwise with --pixels" in "".join(capsys.readouterr())
    data = find_dataset(tmp_path / "check")
    assert read(data.train[0].path).shape == (96, 96, 3)
    trained, checked = ({s.path.name.split("_")[0] for s in samples} for samples in (data.train, data.test))
    assert len(trained) + len(checked) == 8
    assert not trained & checked
    assert len({s.path.stem for s in data.train + data.test}) == 24  # no image both trains and tests
    assert [s.label for s in data.test].count(1) == len(data.test) / 2 == 3  # a fifth of 24 is 5, and a part has three
    assert max(read_part_ids(data, "part([0-9]+)_")) + 1 == len(trained)
    two = save_grey_images(tmp_path / "two", [f"tile{int(i == 0)}_light{i}" for i in range(10)])  # 1 and 9 images
    for seed in range(3):
        write_check(two, tmp_path / f"check{seed}", seed, False, "tile([0-9]+)_", pixels=64)
        assert len(find_dataset(tmp_path / f"check{seed}").train) in (1, 9)


def test_a_check_set_is_not_drawn_into_the_folder_of_good_images(tmp_path, capsys):
    good = save_grey_images(tmp_path / "good", "abc")
    assert main(["--images", str(good), "--out", str(good / "check")]) == 2
    assert "lies in --images, which holds good images alone" in capsys.readouterr().err
    assert not (good / "check").exists()
