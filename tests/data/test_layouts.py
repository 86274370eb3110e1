"""Folders of every layout: what is found, how masks are paired, and one clear line for what cannot be used."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from almrr_ref.data.folders import DataError, DataSet, Sample, describe, require_good
from almrr_ref.data.layouts import find_dataset
from almrr_ref.data.masks import load_mask


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
        require_good(find_dataset(path))
    assert str(caught.value).isprintable()
    return str(caught.value).replace(f"{path}/", "")


GOOD = ["train/good/001.png", "train/good/000.png", "test/good/000.png"]
DEFECTIVE = ["test/cut/000.png", "test/cut/001.png", "test/hole/000.tif"]
MVTEC = (*GOOD, *DEFECTIVE, *(f"ground_truth/{x}" for x in ("cut/000_mask.png", "cut/001_mask.png", "hole/000.bmp")))
BTAD = ("train/ok/0.bmp", *(f"{x}.bmp" for x in ("test/ok/0", "test/ko/0", "test/ko/1")),
        *(f"ground_truth/ko/{i}.png" for i in (0, 9)))  # fmt: skip
NANOTWICE = ("Normal/a.tif", *(f"Anomalous/{x}" for x in ("images/b.tif", "images/c.tif", "gt/b_gt.png", "gt/c.png")))
LAYOUTS = [
    ("MVTec category", MVTEC, "train/good/000.png train/good/001.png",
     "test/cut/000.png cut ground_truth/cut/000_mask.png, test/cut/001.png cut ground_truth/cut/001_mask.png, "
     "test/good/000.png good None, test/hole/000.tif hole ground_truth/hole/000.bmp", []),
    ("BTAD product", BTAD, "train/ok/0.bmp",
     "test/ko/0.bmp ko ground_truth/ko/0.png, test/ko/1.bmp ko None, test/ok/0.bmp good None",
     ["1 of 2 images of type ko have no mask (first: 1.bmp): they count for the image metrics only",
      "1 mask of type ko without an image (first: 9.png)"]),
    ("NanoTWICE", NANOTWICE, "Normal/a.tif",
     "Anomalous/images/b.tif anomalous Anomalous/gt/b_gt.png, Anomalous/images/c.tif anomalous Anomalous/gt/c.png",
     ["there are no normal test images: image AUROC and AP will be undefined"]),
]  # fmt: skip


@pytest.mark.parametrize(("layout", "names", "train", "test", "notes"), LAYOUTS)
def test_layouts_are_told_apart_and_read(
    tmp_path: Path, layout: str, names: tuple[str, ...], train: str, test: str, notes: list
) -> None:
    dataset = find_dataset(str(make(tmp_path, names)))
    assert (dataset.layout, dataset.notes) == (layout, notes)
    assert relative(dataset, dataset.train) == [(name, 0, "good", None) for name in train.split()]
    rows = (row.split() for row in test.split(", "))
    assert relative(dataset, dataset.test) == [
        (name, int(kind != "good"), kind, None if mask == "None" else mask) for name, kind, mask in rows
    ]


def test_masks_of_good_images_are_said_not_to_be_read(tmp_path: Path) -> None:
    dataset = find_dataset(make(tmp_path, [*MVTEC, "ground_truth/good/000_mask.png"]))
    assert dataset.notes == [f"masks in {tmp_path}/ground_truth/good are not read: images in test/good count as good"]


def test_mt_defect_trains_on_the_listed_names_or_on_a_fixed_share(tmp_path: Path) -> None:
    stems = [f"MT_Free/Imgs/exp1_num_{i}" for i in range(10)]
    stems += ["MT_Crack/Imgs/exp1_num_77", "MT_Uneven/Imgs/exp2_num_8"]
    make(tmp_path, [f"{stem}.jpg" for stem in stems])
    make(tmp_path, [f"{stem}.png" for stem in stems], level=0)  # all masks empty
    first = find_dataset(tmp_path)
    assert first == find_dataset(tmp_path)
    assert (len(first.train), len({s.path for s in first.train + first.test})) == (8, 12)
    assert "train_filenames.txt is missing" in first.notes[0]
    names = b"\xef\xbb\xbfexp1_num_7.jpg\r\n\r\nexp1_num_3.jpg \r\nexp9_num_9.jpg\r\n"
    (tmp_path / "train_filenames.txt").write_bytes(names)
    dataset = find_dataset(tmp_path)
    assert dataset.layout == "MT-Defect"
    assert [s.path.name for s in dataset.train] == ["exp1_num_3.jpg", "exp1_num_7.jpg"]
    assert [s.label for s in dataset.test] == [0] * 8 + [1] * 2  # an empty mask does not make an image good
    assert relative(dataset, dataset.test)[-2:] == [
        (f"{stem}.jpg", 1, kind, f"{stem}.png")
        for stem, kind in (("MT_Crack/Imgs/exp1_num_77", "crack"), ("MT_Uneven/Imgs/exp2_num_8", "uneven"))
    ]
    assert dataset.notes == ["1 of 3 names in train_filenames.txt have no image (first: exp9_num_9.jpg)"]


def test_plain_folder_takes_every_image_below_it(tmp_path: Path) -> None:
    names = ("A/d.png", "a.JPG", "b.png", "sub/c.tif", "sub/deeper/a.png")
    make(tmp_path, names[::-1])
    make(tmp_path, (".hidden.png", "._a.png", ".cache/x.png", "__MACOSX/x.png", "sub/__MACOSX/a.png"))
    (tmp_path / "Thumbs.db").write_bytes(b"clutter")
    dataset = find_dataset(tmp_path)
    assert relative(dataset, dataset.train) == [(name, 0, "good", None) for name in names]
    assert (dataset.layout, dataset.test, dataset.notes) == ("folder of good images", [], [])
    (tmp_path / "sub" / "readme.heic").touch()
    (unread,) = find_dataset(tmp_path).notes
    assert "readme.heic" in unread


@pytest.mark.parametrize(
    ("names", "texts"),
    [
        (("good/a.png", "KO/b.png"), ("good images only", "KO")),
        (("a/a.png", "sub/ground_truth/b.png"), ("good images only, but sub holds", "ground_truth 1")),
        (("a.jpg", "b.jpg", "b.png"), ("b.jpg and b.png have one stem",)),  # an image and its mask, in MT_Free/Imgs
        ((*MVTEC, "ground_truth/cut/001_gt.tif"), ("two masks for", "001_mask.png", "001_gt.tif")),
        ((*MVTEC, "test/cut/001_mask.png"), ("001_mask.png fits two images", "cut/001_mask.png; rename one")),
        (("test/cut/0.png", "train/good/x/a.png"), ("no good images",)),
        ((*MVTEC, "test/stray.png"), ("stray.png lies directly in test/",)),
        (("train/good/a.png", "train/ok/a.png"), ("MVTec category and BTAD product at once",)),
        (("train/ok/a.png", "test/good/b.png", "test/ko/c.png"), ("test/good is named as good", "rename it to ok")),
        (("train/good/a.png", "test/normal/b.png"), ("test/normal is named as good", "rename it to good")),
        (("Anomalous/images/a.tif",), ("no good images", "no folder Normal")),
        (("MT_Free/a.jpg",), ("no good images", "no folder MT_Free/Imgs")),
        (("overlays/a.png", "scores.csv.png"), ("earlier results",)),
        (("b/train/good/a.png", "a/train/good/a.png", "mt/MT_Free/Imgs/a.jpg"), ("3 data sets: a, b, mt", "such as a")),
        ((), ("no good images",)),
    ],
)
def test_what_is_ambiguous_unusable_or_no_folder_ends_in_one_line(
    tmp_path: Path, names: tuple[str, ...], texts: tuple[str, ...]
) -> None:
    message = refusal(make(tmp_path, names))
    assert all(text in message for text in texts), message
    (tmp_path / "file").touch()
    assert "does not exist; give a folder of images" in refusal(tmp_path / "none\n")
    assert "is a file, not a folder" in refusal(tmp_path / "file")


TEST_ALONE = [*(name for name in MVTEC if "train" not in name)]
LOCO = ("test/logical/000.png", "test/logical/001.png", "ground_truth/logical/000/000.png",
        "ground_truth/logical/000/001.png", "ground_truth/logical/001/000.png")  # fmt: skip


def test_a_test_part_alone_is_enough_to_evaluate(tmp_path: Path) -> None:
    dataset = find_dataset(make(tmp_path / "mvtec", TEST_ALONE))
    assert (len(dataset.test), dataset.train, dataset.layout) == (4, [], "MVTec category")
    assert "train: 0 good images" in describe(dataset)
    with pytest.raises(DataError, match=r"no good images in .*there is no folder train/good"):
        require_good(dataset)
    dataset = find_dataset(make(tmp_path / "btad", ("test/ok/0.bmp", "test/ko/0.bmp")))
    assert [(sample.label, sample.defect_type) for sample in dataset.test] == [(1, "ko"), (0, "good")]


def test_results_of_an_evaluation_in_the_test_folder_are_no_defect_types(tmp_path: Path) -> None:
    make(tmp_path, (*TEST_ALONE, "test/overlays/good/0.png.png", "test/layers/0.png"))
    (tmp_path / "test" / "scores.csv").touch()
    dataset = find_dataset(tmp_path)
    assert len(dataset.test) == 4
    assert sum("earlier results in" in note for note in dataset.notes) == 2


def test_a_folder_of_masks_is_one_mask(tmp_path: Path) -> None:
    make(tmp_path, LOCO)
    for number, value in (("000", 85), ("001", 170)):
        values = np.zeros((3, 5), np.uint8)
        values[int(number), 1:3] = value
        Image.fromarray(values).save(tmp_path / f"ground_truth/logical/000/{number}.png")
    dataset = find_dataset(tmp_path)
    masks = [sample.mask_path for sample in dataset.test]
    assert masks == [tmp_path / "ground_truth/logical/000", tmp_path / "ground_truth/logical/001"]
    assert load_mask(masks[0], (3, 5))[0].tolist() == [[0, 1, 1, 0, 0]] * 2 + [[0] * 5]
    make(tmp_path, ("ground_truth/logical/001/001.png",), size=(10, 6))
    assert "logical/001/001.png is 10x6 but its image test/logical/001.png is 5x3" in refusal(tmp_path)


def test_a_folder_of_masks_has_its_images_stem_also_where_this_has_dots(tmp_path: Path) -> None:
    names = [f"test/bent/12.05.{second}.png" for second in (1, 2)]
    dataset = find_dataset(make(tmp_path, [*names, *(f"ground_truth/bent/12.05.{i}/0.png" for i in (1, 2))]))
    masks = [sample.mask_path for sample in dataset.test]
    assert masks == [tmp_path / f"ground_truth/bent/12.05.{i}" for i in (1, 2)]


def test_the_split_of_visa_is_read_and_of_several_objects_one_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [f"{name},train,normal,{name}/Data/Images/Normal/{i}.JPG," for name in ("candle", "pcb") for i in (0, 1)]
    rows += [
        "candle,test,normal,candle/Data/Images/Normal/2.JPG,",
        "candle,test,normal,candle/Data/Images/Normal/9.JPG,",
    ]
    rows += ["candle,test,anomaly,candle/Data/Images/Anomaly/0.JPG,candle/Data/Masks/Anomaly/0.png"]
    make(tmp_path, [row.split(",")[3] for row in rows if "9" not in row] + ["candle/Data/Masks/Anomaly/0.png"])
    table = tmp_path / "split_csv" / "1cls.csv"
    table.parent.mkdir()
    table.write_text("\n".join(["object,split,label,image,mask", *rows]))
    dataset = find_dataset(tmp_path / "candle")
    assert (dataset.layout, len(dataset.notes)) == ("VisA object", 1)
    assert relative(dataset, dataset.train) == [(f"Data/Images/Normal/{i}.JPG", 0, "good", None) for i in (0, 1)]
    defective = ("Data/Images/Anomaly/0.JPG", 1, "anomaly", "Data/Masks/Anomaly/0.png")
    assert relative(dataset, dataset.test) == [("Data/Images/Normal/2.JPG", 0, "good", None), defective]
    assert "1 image of" in dataset.notes[0]
    monkeypatch.chdir(tmp_path / "candle")
    assert len(find_dataset(".").test) == 2
    (tmp_path / "candle").rename(tmp_path / "elsewhere")
    (tmp_path / "candle").symlink_to(tmp_path / "elsewhere")
    assert find_dataset(tmp_path / "candle") == dataset
    (tmp_path / "candle/Data/Masks/Anomaly/0.png").unlink()
    dataset = find_dataset(tmp_path / "candle")
    assert (dataset.test[1].label, dataset.test[1].mask_path) == (1, None)
    assert "1 mask of" in dataset.notes[1]
    assert refusal(tmp_path).endswith("2 objects: candle, pcb; give one of them, such as candle")
    (tmp_path / "pcb").rename(tmp_path / "pcb1")
    assert "has no object pcb1, but candle, pcb;" in refusal(tmp_path / "pcb1")
    table.write_text("object,split,label,image,mask\ncandle,train,normal,Data/Images/Normal/0.JPG,\n")
    assert refusal(tmp_path / "candle").endswith("Data/Images/Normal/0.JPG does not begin with candle/")
    table.write_text("object,split,label,image,mask\ncandle,test,Normal,candle/Data/Images/Normal/0.JPG,\n")
    assert refusal(tmp_path / "candle").endswith("line 2: label 'Normal'; expected normal or anomaly")
    table.write_text("image,label\n")
    assert "expected image,label,mask,object,split" in refusal(tmp_path / "candle")
    table.write_text("object,split,label,image,mask\ncandle,train,normal,candle/../../x.png,\n")
    assert "line 2" in refusal(tmp_path / "candle")


def test_masks_are_compared_with_the_upright_image(tmp_path: Path) -> None:
    make(tmp_path, MVTEC)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("L", (3, 5)).save(tmp_path / "test/hole/000.tif", exif=exif)  # stored 3x5, shown 5x3 as its mask is
    assert len(find_dataset(tmp_path).test) == 4
    Image.new("L", (5, 3)).save(tmp_path / "test/hole/000.tif", exif=exif)  # stored as its mask is, shown 3x5
    assert "hole/000.bmp is 5x3 but its image test/hole/000.tif is 3x5" in refusal(tmp_path)


def test_description_says_what_was_found(tmp_path: Path) -> None:
    dataset = find_dataset(make(tmp_path, MVTEC))
    make(tmp_path, ("train/good/001.png",), size=(20, 10))
    (tmp_path / "train/good/000.png").write_bytes(b"broken")
    dataset.notes.append("something")
    assert describe(dataset).splitlines() == [
        f"data: MVTec category at {tmp_path}",
        "train: 2 good images",
        "test: 1 good, 3 defective (cut 2, hole 1); masks for 3",
        "sizes of 5 images: 5x3 to 20x10; 1 unreadable",
        "note: something",
    ]


def test_the_real_magnetic_tiles(shared_dir: Path) -> None:
    dataset = find_dataset(shared_dir / "data" / "mt_defect")
    masks = [s.mask_path for s in dataset.test if s.mask_path]
    assert (len(dataset.train), len(dataset.test) - len(masks), len(masks), dataset.notes) == (761, 96, 198, [])
    areas = [int(load_mask(mask, (256, 256)).sum()) for mask in masks]
    full = [(np.asarray(Image.open(mask)) > 127).mean() * 256**2 for mask in masks]
    assert areas.count(0) <= 4
    assert sum(areas) == pytest.approx(sum(full), rel=0.02), "more than rounding is lost to the resize"
