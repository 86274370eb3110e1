"""Folders of every layout: what is found, how masks are paired, and one clear line for what cannot be used."""

import os
import random
import shutil
import string
import tempfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from almrr_ref.data.images import load_image, load_mask
from almrr_ref.data.layouts import DataSet, describe, find_dataset
from almrr_ref.data.pairing import DataError, Sample
from almrr_ref.data.split import load_images


def make(root: Path, names: Iterable[str], size: tuple[int, int] = (5, 3), level: int = 9) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", size, level).save(root / name)
    return root


def relative(dataset: DataSet, samples: list[Sample]) -> list[tuple[str, int, str, str | None]]:
    def name(path: Path) -> str:
        return path.relative_to(dataset.root).as_posix()

    return [(name(s.path), s.label, s.defect_type, name(s.mask_path) if s.mask_path else None) for s in samples]


def refusal(path: Path) -> str:
    with pytest.raises(DataError) as caught:
        find_dataset(path)
    assert isinstance(caught.value, ValueError)
    assert str(caught.value).isprintable()
    return str(caught.value)


MVTEC = (
    "train/good/001.png", "train/good/000.png", "test/good/000.png", "test/cut/000.png", "test/cut/001.png",
    "test/hole/000.tif", "ground_truth/cut/000_mask.png", "ground_truth/cut/001_mask.png", "ground_truth/hole/000.bmp",
)  # fmt: skip


def test_mvtec_category(tmp_path):
    dataset = find_dataset(make(tmp_path, MVTEC))
    assert dataset.layout == "MVTec category"
    assert relative(dataset, dataset.train) == [(f"train/good/{n}.png", 0, "good", None) for n in ("000", "001")]
    assert relative(dataset, dataset.test) == [
        ("test/cut/000.png", 1, "cut", "ground_truth/cut/000_mask.png"),
        ("test/cut/001.png", 1, "cut", "ground_truth/cut/001_mask.png"),
        ("test/good/000.png", 0, "good", None),
        ("test/hole/000.tif", 1, "hole", "ground_truth/hole/000.bmp"),
    ]
    assert dataset.notes == []


def test_btad_product(tmp_path):
    names = ("train/ok/0.bmp", "test/ok/0.bmp", "test/ko/0.bmp", "test/ko/1.bmp", "ground_truth/ko/0.png")
    dataset = find_dataset(make(tmp_path, names))
    assert dataset.layout == "BTAD product"
    labels = [(s.label, s.defect_type) for s in dataset.train + dataset.test]
    assert labels == [(0, "good"), (1, "ko"), (1, "ko"), (0, "good")]
    assert [s.mask_path and s.mask_path.name for s in dataset.test] == ["0.png", None, None]
    assert len(dataset.notes) == 1
    assert "1 of 2 images of type ko have no mask (first: 1.bmp)" in dataset.notes[0]


def test_nanotwice_has_no_normal_test_images(tmp_path):
    names = ("Normal/a.tif", "Anomalous/images/b.tif", "Anomalous/images/c.tif")
    dataset = find_dataset(make(tmp_path, (*names, "Anomalous/gt/b_gt.png", "Anomalous/gt/c.png")))
    assert relative(dataset, dataset.train) == [("Normal/a.tif", 0, "good", None)]
    assert relative(dataset, dataset.test) == [
        ("Anomalous/images/b.tif", 1, "anomalous", "Anomalous/gt/b_gt.png"),
        ("Anomalous/images/c.tif", 1, "anomalous", "Anomalous/gt/c.png"),
    ]
    assert "no normal test images: image AUROC" in dataset.notes[0]


def mt_defect(root: Path, n_free: int = 10) -> Path:
    stems = [f"MT_Free/Imgs/exp1_num_{i}" for i in range(n_free)]
    stems += ["MT_Crack/Imgs/exp1_num_77", "MT_Uneven/Imgs/exp2_num_8"]
    make(root, [f"{stem}.jpg" for stem in stems])
    return make(root, [f"{stem}.png" for stem in stems], level=0)  # all masks empty


def test_mt_defect_trains_on_the_listed_names(tmp_path):
    mt_defect(tmp_path)
    names = b"\xef\xbb\xbfexp1_num_7.jpg\r\n\r\nexp1_num_3.jpg \r\nexp9_num_9.jpg\r\n"
    (tmp_path / "train_filenames.txt").write_bytes(names)
    dataset = find_dataset(tmp_path)
    assert dataset.layout == "MT-Defect"
    assert [s.path.name for s in dataset.train] == ["exp1_num_3.jpg", "exp1_num_7.jpg"]
    assert [s.label for s in dataset.test] == [0] * 8 + [1] * 2  # an empty mask does not make an image good
    assert relative(dataset, dataset.test)[-2:] == [
        ("MT_Crack/Imgs/exp1_num_77.jpg", 1, "crack", "MT_Crack/Imgs/exp1_num_77.png"),
        ("MT_Uneven/Imgs/exp2_num_8.jpg", 1, "uneven", "MT_Uneven/Imgs/exp2_num_8.png"),
    ]
    assert dataset.notes == ["1 of 3 names in train_filenames.txt have no image (first: exp9_num_9.jpg)"]


def test_mt_defect_without_its_list_is_split_the_same_way_every_time(tmp_path):
    first, again = find_dataset(mt_defect(tmp_path)), find_dataset(tmp_path)
    assert first == again
    assert len(first.train) == 8
    assert not {s.path for s in first.train} & {s.path for s in first.test}
    assert len(first.train) + len(first.test) == 12
    assert "train_filenames.txt is missing" in first.notes[0]
    (tmp_path / "train_filenames.txt").write_bytes(b"\xff\xfe\xff")
    assert "cannot read the list of training names" in refusal(tmp_path)


def test_plain_folder_takes_every_image_below_it(tmp_path):
    make(tmp_path, ("b.png", "a.JPG", "sub/c.tif", "sub/deeper/a.png", "A/d.png"))
    clutter = (".hidden.png", "._a.png", ".cache/x.png", "__MACOSX/x.png", "sub/__MACOSX/a.png")
    make(tmp_path, clutter)
    for name in ("Thumbs.db", ".DS_Store", "sub/desktop.ini"):
        (tmp_path / name).write_bytes(b"clutter")
    dataset = find_dataset(tmp_path)
    assert dataset.layout == "folder of good images"
    assert [name for name, *_ in relative(dataset, dataset.train)] == [
        "A/d.png", "a.JPG", "b.png", "sub/c.tif", "sub/deeper/a.png"
    ]  # fmt: skip
    assert {(s.label, s.mask_path) for s in dataset.train} == {(0, None)}
    assert dataset.test == []
    assert dataset.notes == []
    (tmp_path / "sub" / "readme.heic").touch()
    (tmp_path / "linked").symlink_to(tmp_path / "sub")
    notes = find_dataset(tmp_path).notes
    assert any("1 other files in" in note and "readme.heic" in note for note in notes)
    assert any("linked folder" in note for note in notes)


def test_a_folder_of_several_data_sets_names_them(tmp_path):
    for category in ("carpet", "grid"):
        make(tmp_path / category, MVTEC)
    make(tmp_path / "mt", ("MT_Free/Imgs/a.jpg",))
    message = refusal(tmp_path)
    assert "3 data sets: carpet, grid, mt" in message
    assert f"--data {tmp_path / 'carpet'}" in message


@pytest.mark.parametrize("name", ["bad", "KO", "masks", "test", "ground_truth", "train", "Defective"])
def test_a_plain_folder_never_trains_on_what_may_be_bad(tmp_path, name):
    make(tmp_path, ("good/a.png", f"{name}/b.png"))
    assert "good images only" in refusal(tmp_path)
    assert name in refusal(tmp_path)


def test_two_images_of_one_stem_are_refused(tmp_path):
    # MT_Free/Imgs by itself: images with their (black) masks beside them
    message = refusal(make(tmp_path, ("a.jpg", "b.jpg", "b.png")))
    assert "b.jpg" in message
    assert "b.png" in message


def test_ambiguous_masks_are_refused_by_name(tmp_path):
    make(tmp_path / "two", (*MVTEC, "ground_truth/cut/001_gt.tif"))
    message = refusal(tmp_path / "two")
    assert "001_mask.png" in message
    assert "001_gt.tif" in message
    make(tmp_path / "shared", (*MVTEC, "test/cut/001_mask.png"))
    message = refusal(tmp_path / "shared")
    assert "fits two images" in message
    assert message.count("001_mask.png") == 2
    make(tmp_path / "stem", (*MVTEC, "test/cut/001.bmp"))
    assert "have one stem" in refusal(tmp_path / "stem")


def test_masks_of_another_size_are_refused_with_both_sizes(tmp_path):
    make(tmp_path, MVTEC)
    make(tmp_path, ("ground_truth/cut/001_mask.png",), size=(3, 5))
    message = refusal(tmp_path)
    for part in ("001_mask.png is 3x5", "test/cut/001.png", "is 5x3"):
        assert part in message


def test_sizes_are_compared_as_the_image_will_be_turned(tmp_path):
    make(tmp_path, MVTEC)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("L", (3, 5)).save(tmp_path / "test/hole/000.tif", exif=exif)  # stored 3x5, shown 5x3 as its mask is
    assert len(find_dataset(tmp_path).test) == 4
    Image.new("L", (5, 3)).save(tmp_path / "test/hole/000.tif", exif=exif)  # stored as its mask is, shown 3x5
    assert "is 3x5" in refusal(tmp_path)


def test_folders_that_cannot_be_used_end_in_one_line(tmp_path):
    assert "does not exist" in refusal(tmp_path / "none\n")
    (tmp_path / "file").touch()
    assert "is a file" in refusal(tmp_path / "file")
    (tmp_path / "empty").mkdir()
    assert "no good images" in refusal(tmp_path / "empty")
    make(tmp_path / "m", ("test/cut/0.png",))
    (tmp_path / "m/train/good").mkdir(parents=True)
    assert "no good images" in refusal(tmp_path / "m")
    make(tmp_path / "loose", (*MVTEC, "test/stray.png"))
    assert "stray.png lies directly in test/" in refusal(tmp_path / "loose")
    make(tmp_path / "both", ("train/good/a.png", "train/ok/a.png"))
    assert "MVTec and BTAD at once" in refusal(tmp_path / "both")
    make(tmp_path / "nano", ("Anomalous/images/a.tif",))
    assert "nano/Normal: No such file" in refusal(tmp_path / "nano")
    make(tmp_path / "mt", ("MT_Free/a.jpg",))
    assert "cannot read the folder" in refusal(tmp_path / "mt")


def test_an_unreadable_folder_ends_in_one_line():
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        make(Path(folder), ("x/train/good/a.png", "y/a.png"))
        root = os.geteuid() == 0
        for path in ("x/train/good", "y"):
            (Path(folder) / path).chmod(0)
        if root:
            os.seteuid(65534)  # the superuser may read everything
        try:
            for path in ("x", "y"):
                assert "cannot read the folder" in refusal(Path(folder) / path)
        finally:
            if root:
                os.seteuid(0)
            for path in ("x/train/good", "y"):
                (Path(folder) / path).chmod(0o755)


def test_description_says_what_was_found(tmp_path):
    dataset = find_dataset(make(tmp_path, MVTEC))
    make(tmp_path, ("train/good/001.png",), size=(20, 10))
    (tmp_path / "train/good/000.png").write_bytes(b"broken")
    text = describe(dataset)
    for part in ("MVTec category", str(tmp_path), "train: 2 good",
                 "test: 1 good, 3 defective (cut 2, hole 1); masks for 3", "sizes: 5-20 x 3-10, 2 different",
                 "1 files are no readable images"):  # fmt: skip
        assert part in text
    plain = find_dataset(make(tmp_path / "p", ("0.png", "1.png"), size=(4, 6)))
    plain.notes.append("something")
    assert describe(plain).splitlines()[1:] == ["train: 2 good images", "test: none", "sizes: 4x6", "note: something"]


def test_loading_keeps_the_order_and_names_the_broken(tmp_path):
    names = [f"{i:02d}.png" for i in range(23)]
    for i, name in enumerate(names):
        make(tmp_path, (name,), level=i)
    (tmp_path / names[4]).write_bytes(b"broken")
    (tmp_path / names[22]).unlink()
    (tmp_path / names[22]).mkdir()
    samples = find_dataset(tmp_path).train
    calls: list[tuple[int, int]] = []
    images, failures = load_images(samples, 7, lambda *call: calls.append(call))
    assert images.shape == (21, 3, 7, 7)
    assert images.dtype == torch.uint8
    assert images[:, 0, 0, 0].tolist() == [i for i in range(23) if i not in (4, 22)]
    assert [(path.name, bool(reason)) for path, reason in failures] == [("04.png", True), ("22.png", True)]
    assert calls == [(i, 23) for i in range(1, 24)]
    assert torch.equal(load_images([str(samples[5].path)], 7)[0][0], load_image(samples[5].path, 7))


def test_loading_nothing_or_only_broken_images_is_an_error(tmp_path):
    paths = [tmp_path / "a.png", tmp_path / "b.png"]
    for path in paths:
        path.write_bytes(b"broken")
    with pytest.raises(DataError, match=r"none of 2 images can be read; the first: .*a\.png: not an image"):
        load_images(paths, 8)
    with pytest.raises(DataError, match="no images"):
        load_images([], 8)


STEMS = st.text(string.ascii_letters + string.digits + "-_ .éß", min_size=1, max_size=6).filter(
    lambda s: not s.startswith(".") and not s.endswith(("_mask", "_gt"))
)
EXTENSIONS = st.sampled_from([".png", ".bmp", ".tif", ".PNG"])


@settings(max_examples=40, deadline=None)
@given(
    images=st.lists(st.tuples(STEMS, EXTENSIONS, st.sampled_from(["", "_mask", "_gt", None]), EXTENSIONS),
                    min_size=1, max_size=6, unique_by=lambda image: image[0].casefold()),
    extra=st.lists(STEMS, max_size=2),
    shuffle=st.randoms(use_true_random=False),
)  # fmt: skip
def test_every_image_gets_its_own_mask_or_none(images: list, extra: list[str], shuffle: random.Random):
    stems = [stem for stem, *_ in images]
    extra = [stem for stem in extra if stem.casefold() not in {s.casefold() for s in stems}]
    with tempfile.TemporaryDirectory() as folder:
        root = make(Path(folder), ("train/good/a.png", "test/good/a.png"))
        made = [(f"test/t/{stem}{ext}", f"ground_truth/t/{stem}{suffix}{mask_ext}" if suffix is not None else None)
                for stem, ext, suffix, mask_ext in images]  # fmt: skip
        names = [name for pair in made for name in pair if name] + [f"ground_truth/t/{stem}_mask.png" for stem in extra]
        shuffle.shuffle(names)
        make(root, names)
        dataset = find_dataset(root)
    found = {name: mask for name, label, _, mask in relative(dataset, dataset.test) if label}
    assert found == dict(made)
    assert [s.path.name for s in dataset.test] == ["a.png", *sorted(Path(name).name for name in found)]
    missing = sum(mask is None for mask in found.values())
    assert any(f"{missing} of {len(images)} images" in note for note in dataset.notes) == (missing > 0)
    assert any("fit no image" in note for note in dataset.notes) == bool(set(extra))


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["x", "y", "x_mask", "y_gt"]), st.sampled_from(["image", "mask"]),
                          EXTENSIONS), min_size=1, max_size=6, unique=True))  # fmt: skip
def test_clashing_names_pair_by_the_rule_or_are_refused(files: list[tuple[str, str, str]]):
    """Against a plain restatement of the rule: a mask is paired only if image and mask have no other partner."""
    folders = {"image": "test/t", "mask": "ground_truth/t"}
    images = [(stem, ext) for stem, kind, ext in files if kind == "image"]
    masks = [(stem, ext) for stem, kind, ext in files if kind == "mask"]
    edges = [(i, m) for i in images for m in masks if m[0] in (i[0], i[0] + "_mask", i[0] + "_gt")]
    clash = any(sum(e[k] == edge[k] for e in edges) > 1 for edge in edges for k in (0, 1))
    clash |= len({stem for stem, _ in images}) < len(images)
    with tempfile.TemporaryDirectory() as folder:
        root = make(Path(folder), ["train/good/a.png"] + [f"{folders[kind]}/{stem}{ext}" for stem, kind, ext in files])
        (root / "test").mkdir(exist_ok=True)
        if clash:
            refusal(root)
        else:
            pairs = [(s.path, s.mask_path) for s in find_dataset(root).test if s.mask_path]
            assert {((i.stem, i.suffix), (m.stem, m.suffix)) for i, m in pairs} == set(edges)


def test_the_real_magnetic_tiles(shared_dir):
    root = shared_dir / "data" / "mt_defect"
    dataset = find_dataset(root)
    listed = (root / "train_filenames.txt").read_text().split()
    assert [s.path.name for s in dataset.train] == sorted(listed)
    assert len(dataset.train) == 761
    defective = [s for s in dataset.test if s.label]
    assert (len(dataset.test) - len(defective), len(defective)) == (96, 198)
    assert all(s.mask_path and s.mask_path.stem == s.path.stem and s.mask_path != s.path for s in defective)
    assert dataset.notes == []
    areas = torch.stack([load_mask(s.mask_path, 256).sum() for s in defective])
    assert (areas == 0).sum() <= 4
    full = [(np.asarray(Image.open(s.mask_path)) > 127).mean() * 256**2 for s in defective]
    assert abs(float(areas.sum()) / sum(full) - 1) < 0.02  # nothing but rounding is lost to the resize
    images, failures = load_images(dataset.train[::40], 64)
    assert (len(images), failures) == (20, [])


def test_a_copy_elsewhere_is_found_the_same(tmp_path):
    make(tmp_path / "one", MVTEC)
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    first, second = find_dataset(tmp_path / "one"), find_dataset(str(tmp_path / "two"))
    assert relative(first, first.test) == relative(second, second.test)
