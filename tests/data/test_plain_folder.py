"""Training takes only what is plainly good: class folders, masks and links, and folders that are taken as they are."""

from pathlib import Path

import pytest
from PIL import Image

from almrr_ref.data.folders import DataError, find_inputs
from almrr_ref.data.layouts import find_dataset, says_good, says_not_good

NOT_GOOD = (
    "bad NG nok KO n_ok not_ok not-good no_good NotGood defects defect_01 Anomalous abnormal anomaly reject rejected "
    "2024_rejects scrap fail failed faulty broken damaged crack cracks scratches Blowhole dent stained contamination "
    "Ausschuss fehlerhaft defekt schlecht rebut mauvais defauts difettosi scarti rechazados defeituoso 不良品 "
    "缺陷 불량 брак test train val validation ground_truth gt masks image_masks labels annotations"
)
GOOD = "good OK ok_2 Good-parts normal gut io no_defects defect_free defect-free without_defects NoDefect 良品 合格"
NEUTRAL = "2024-05-01 lot7 camera_2 left batch-003 goods_in kokoro bangle koala okapi notes gtx maskarade testing_rig"


@pytest.mark.parametrize("name", NOT_GOOD.split())
def test_names_of_defects_and_of_parts_of_a_data_set(name: str) -> None:
    assert (says_not_good(name), says_good(name)) == (True, False)


@pytest.mark.parametrize("name", GOOD.split())
def test_names_of_good_ones(name: str) -> None:
    assert (says_not_good(name), says_good(name)) == (False, True)


@pytest.mark.parametrize("name", NEUTRAL.split())
def test_names_that_say_nothing(name: str) -> None:
    assert (says_not_good(name), says_good(name)) == (False, False)


def make(root: Path, counts: dict[str, int]) -> Path:
    for name, count in counts.items():
        (root / name).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            Image.new("L", (5, 3), 9).save(root / name / f"{i}.png")
    return root


def refusal(path: Path) -> str:
    with pytest.raises(DataError) as caught:
        find_dataset(path)
    return str(caught.value).replace(str(path), "lot")


def test_neutral_folders_train(tmp_path: Path) -> None:
    names = [
        "2024-05-01",
        "lot7",
        "camera_2",
        "left",
        "batch-003/night",
        "kokoro",
        "bangle",
        "koala",
        "maskarade",
        "notes",
    ]
    assert len(find_dataset(make(tmp_path, dict.fromkeys(names, 1))).train) == len(names)


def test_folders_of_good_ones_alone_train(tmp_path: Path) -> None:
    assert len(find_dataset(make(tmp_path, {"good": 2, "ok_2": 3})).train) == 5


@pytest.mark.parametrize(
    ("counts", "says"),
    [
        ({"good": 3, "crack/deep": 2, "spiral": 1}, "crack 2, good 3, spiral 1; give the good ones: lot/good"),
        ({"good": 3, "spiral": 1}, "good 3, spiral 1; give the good ones: lot/good"),
        ({"good": 3, ".": 2}, "good 3, directly in it 2; give the good ones: lot/good"),
        (
            {"line/ok": 3, "line/other": 2},
            "line holds folders of classes with images: ok 3, other 2; give the good",
        ),
        (
            {"monday": 3, "ausschuss": 2},
            "ausschuss 2, monday 3; give the folder of the good ones, or arrange",
        ),
    ],
)
def test_folders_of_classes_are_refused_with_their_counts_and_what_to_give(
    tmp_path: Path, counts: dict[str, int], says: str
) -> None:
    assert says in refusal(make(tmp_path, counts))


@pytest.mark.parametrize("mask", ["0_mask.png", "0-GT.bmp", "0_label.png", "0_ground_truth.png"])
def test_a_mask_beside_its_image_is_refused_and_one_by_name_alone_is_not(tmp_path: Path, mask: str) -> None:
    make(tmp_path, {".": 2})
    Image.new("L", (5, 3)).save(tmp_path / mask)
    assert f"1 mask beside images (first: {mask}) would train" in refusal(tmp_path)
    (tmp_path / "0.png").rename(tmp_path / "7.png")
    assert len(find_dataset(tmp_path).train) == 3


def test_an_empty_mask_of_the_same_stem_says_that_its_image_is_good(tmp_path: Path) -> None:
    for name, level in (("a.jpg", 9), ("a.png", 0), ("b.jpg", 9), ("b.png", 0), ("c.png", 0)):
        Image.new("L", (5, 3), level).save(tmp_path / name)
    dataset = find_dataset(tmp_path)
    assert [sample.path.name for sample in dataset.train] == ["a.jpg", "b.jpg", "c.png"]
    assert dataset.notes == [f"not read: 2 empty masks beside images in {tmp_path}"]
    Image.new("L", (5, 3), 255).save(tmp_path / "b.png")
    assert "b.jpg and b.png have one stem" in refusal(tmp_path)


def test_a_linked_folder_is_read_once_whatever_leads_to_it(tmp_path: Path) -> None:
    root, other = make(tmp_path / "root", {"a": 1, "b": 1}), make(tmp_path / "other", {"day": 2})
    links = {"a/circle": root, "a/twin": root / "b", "c": other, "d": other, "e": other / "day"}
    for name, target in links.items():
        (root / name).symlink_to(target)
    (other / "back").symlink_to(root)
    dataset = find_dataset(root)
    expected = ["a/0.png", "b/0.png", "c/day/0.png", "c/day/1.png"]
    for paths in ([sample.path for sample in dataset.train], list(find_inputs(root))):
        names = sorted(path.relative_to(root).as_posix() for path in paths)
        assert names in (expected, [*expected[:2], "e/0.png", "e/1.png"])
    assert len(dataset.notes) == 5
    assert all("linked folder" in note for note in dataset.notes)
