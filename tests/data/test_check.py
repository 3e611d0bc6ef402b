"""The check of a source, on a folder that was made bad on purpose."""

import csv
import io
import json

import numpy as np
import pytest
import torch
from PIL import Image

from dynaconv.cli import main
from dynaconv.data.check import check_images, glance
from dynaconv.data.duplicates import exact_duplicates, near_duplicates
from dynaconv.data.images import ImageSet
from dynaconv.data_check import check_source


def scenes(count, side=32, seed=0):
    """Smooth random colour pictures with some grain: no two alike."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, 6, 6, generator=generator) * 200
    smooth = torch.nn.functional.interpolate(coarse, size=(side, side), mode="bicubic", align_corners=False)
    grain = torch.randn(count, 3, side, side, generator=generator) * 6
    return (smooth + 25 + grain).clamp(0, 255).to(torch.uint8)


def as_jpeg(image):
    buffer = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(buffer, "JPEG", quality=75)
    return torch.from_numpy(np.array(Image.open(buffer))).permute(2, 0, 1)


def image_set(images, labels=None, classes=("cat", "dog")):
    labels = torch.arange(len(images)) % len(classes) if labels is None else torch.tensor(labels)
    return ImageSet(images, labels, classes, "made")


@pytest.mark.parametrize(
    ("name", "change"),
    {
        "shifted right": lambda image: image.roll(1, 2),
        "shifted up": lambda image: image.roll(-1, 1),
        "compressed": as_jpeg,
        "brighter": lambda image: (image.float() * 1.2).clamp(0, 255).to(torch.uint8),
        "darker": lambda image: (image.float() * 0.8).to(torch.uint8),
    }.items(),
)
def test_near_duplicates_are_found_and_nothing_else(name, change):
    images = scenes(60)
    changed = torch.stack([change(image) for image in images[:10]])
    pairs = near_duplicates(torch.cat([images, changed]))
    assert {(pair.first, pair.second) for pair in pairs} == {(n, 60 + n) for n in range(10)}
    assert all(0.955 <= pair.likeness <= 1 for pair in pairs)
    assert exact_duplicates(torch.cat([images, changed])) == []


def test_smooth_pictures_without_detail_in_common_are_no_duplicates():
    generator = torch.Generator().manual_seed(0)
    slope = torch.linspace(60, 200, 32)[None, None, :, None].expand(20, 3, 32, 32)
    skies = (slope + torch.randn(20, 3, 32, 32, generator=generator) * 3).to(torch.uint8)
    assert near_duplicates(skies) == []
    flat = torch.full((5, 3, 32, 32), 90, dtype=torch.uint8)
    assert near_duplicates(flat) == []


def test_the_same_pixels_are_grouped():
    images = scenes(6)
    images[4] = images[1]
    images[5] = images[1]
    assert exact_duplicates(images) == [[1, 4, 5]]
    assert near_duplicates(images) == []


def test_what_is_found_inside_and_across_the_splits():
    images = scenes(44)
    train, test = images[:40].clone(), images[40:].clone()
    train[7] = train[2]  # another label: 7 is a dog, 2 a cat
    train[9] = 128
    test[0] = train[4].roll(1, 1)
    found = {finding.kind: finding for finding in check_images(image_set(train), image_set(test))}
    assert set(found) == {"blank", "exact_duplicates_train", "near_duplicates_across", "contradicting_labels"}
    assert found["blank"].leave_out == {9}
    assert found["exact_duplicates_train"].leave_out == {7}
    across = found["near_duplicates_across"]
    assert across.leave_out == {4}
    assert [(place.split, place.index) for place in across.examples[0]] == [("train", 4), ("test", 0)]
    assert found["contradicting_labels"].leave_out == {2, 7}
    assert all(finding.act for finding in found.values())


def test_clean_images_have_no_findings():
    assert check_images(image_set(scenes(40)), None) == []


def test_a_glance_says_what_can_be_told_at_once():
    images = scenes(40)
    assert glance(image_set(images)) is None
    images[3] = images[5]
    assert glance(image_set(images)) == "1 of 40 training images repeat another's pixels. More: dynaconv check"
    few = glance(image_set(scenes(40), [0] * 39 + [1]))
    assert few.startswith("1 of 2 classes have very few training images: dog (1)")


@pytest.fixture
def bad(tmp_path):
    """Class folders with a copy, a shifted copy under another label, a torn file, a blank, a turned and a stray one."""
    images = scenes(26)
    for place, image in enumerate(images):
        folder = tmp_path / "bad" / ("cat", "dog")[place % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{place:02}.png")
    cat, dog = tmp_path / "bad" / "cat", tmp_path / "bad" / "dog"
    (cat / "copy.png").write_bytes((cat / "00.png").read_bytes())
    Image.fromarray(images[2].roll(1, 2).permute(1, 2, 0).numpy()).save(dog / "shifted.png")
    (dog / "torn.png").write_bytes((dog / "01.png").read_bytes()[:500])
    Image.new("RGB", (32, 32), "grey").save(cat / "blank.png")
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.fromarray(scenes(1, seed=9)[0].permute(1, 2, 0).numpy()).save(cat / "turned.jpg", exif=turned, quality=95)
    Image.fromarray(scenes(1, seed=8)[0].permute(1, 2, 0).numpy()).convert("L").save(dog / "grey.png")
    stray = tmp_path / "bad" / "new folder"
    stray.mkdir()
    Image.fromarray(scenes(1, seed=7)[0].permute(1, 2, 0).numpy()).save(stray / "0.png")
    (stray / "notes.txt").write_text("not a picture")
    return tmp_path / "bad"


def test_a_folder_made_bad_on_purpose(bad, tmp_path, capsys):
    into = tmp_path / "found"
    assert main(["check", str(bad), "--into", str(into), "--json"]) == 1
    printed = capsys.readouterr()
    document = json.loads(printed.out)
    # Which images the test split holds out is up to the seed: the pairs may lie inside a split or across.
    kinds = {finding["kind"].split("_duplicates")[0] for finding in document["findings"]}
    assert kinds == {
        "unreadable",
        "no_pictures",
        "modes",
        "turned",
        "small_classes",
        "blank",
        "exact",
        "near",
        "contradicting_labels",
    }
    assert "new folder (1)" in printed.err
    assert document["files"]["odd"] == {"turned_by_exif": 1, "different_sizes": 1}
    assert json.loads((into / "check.json").read_text()) == document
    with (into / "leave-out.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert rows
    left_out = {place for finding in document["findings"] for place in finding["leave_out"]}
    assert {int(row["index"]) for row in rows} == left_out
    with Image.open(into / "examples.png") as sheet:
        assert sheet.width > 400
    assert main(["check", str(bad), "--into", str(into)]) == 2  # what was found before is not overwritten


def test_the_written_list_can_be_left_out(bad, tmp_path, capsys):
    check_source(str(bad), tmp_path / "found", lambda line: None)
    words = ["train", "--data", str(bad), "--without", str(tmp_path / "found" / "leave-out.csv"), "--epochs", "1"]
    small = [
        "--widths",
        "4",
        "--num-convolutions",
        "1",
        "--pool-after",
        "1",
        "--batch-size",
        "8",
        "--on-bad-file",
        "skip",
        "--threads",
        "1",
    ]
    extra = ["--validation-fraction", "0", "--run-dir", str(tmp_path / "run")]
    assert main([*words, *small, *extra]) == 0
    assert "Left out: " in capsys.readouterr().out


def test_a_clean_source_and_wrong_use(tmp_path, capsys):
    images = scenes(24)
    for place, image in enumerate(images):
        folder = tmp_path / "good" / ("cat", "dog")[place % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{place}.png")
    assert main(["check", str(tmp_path / "good")]) == 0
    assert "Nothing was found." in capsys.readouterr().out
    assert main(["check", str(tmp_path / "none")]) == 2
    assert main(["check"]) == 2
    assert "`dynaconv check` needs a source of images" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    assert main(["check", str(tmp_path / "empty")]) == 2
