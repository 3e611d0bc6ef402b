"""Folders of class folders: which pictures count, and in which order."""

import os

import pytest
from PIL import Image

from dynaconv.data.folders import find_splits
from dynaconv.data.sources import SourceOptions, load_images
from dynaconv.errors import UserError


def draw(path, value=0, size=(8, 8)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (value, value, value)).save(path)
    return path


def pets(folder):
    for place, name in enumerate(["cat/2.png", "cat/10.png", "dog/b.jpg", "dog/a.png", "dog/deep/er/c.webp"]):
        draw(folder / name, 40 * place)
    return folder


def names(split, folder):
    return [str(path.relative_to(folder)) for path in split.read().pictures]


def test_classes_and_pictures_are_sorted_and_walked(tmp_path):
    notices = []
    splits = find_splits(pets(tmp_path), notices.append)
    assert splits.keys() == {"train"}
    assert splits["train"].read().classes == ("cat", "dog")
    assert names(splits["train"], tmp_path) == [
        "cat/10.png",
        "cat/2.png",
        "dog/a.png",
        "dog/b.jpg",
        "dog/deep/er/c.webp",
    ]
    assert splits["train"].read().labels.tolist() == [0, 0, 1, 1, 1]
    assert notices == []


def test_train_and_test_folders_are_splits_and_validation_is_not(tmp_path):
    notices = []
    for split in ("Train", "test", "val"):
        pets(tmp_path / split)
    splits = find_splits(tmp_path, notices.append)
    assert splits.keys() == {"train", "test"}
    assert all(name.startswith("test/") for name in names(splits["test"], tmp_path))
    assert notices == [f"{tmp_path} also holds val, which is not used: validation images are cut from train."]


def test_classes_that_are_called_train_and_test_stay_classes(tmp_path):
    for name in ("train", "test", "tram"):
        draw(tmp_path / name / "1.png")
    assert find_splits(tmp_path)["train"].read().classes == ("test", "train", "tram")


def test_clutter_is_passed_over_in_silence(tmp_path):
    pets(tmp_path)
    for name in (".ipynb_checkpoints/x.png", "__MACOSX/x.png", "cat/.hidden.png", "dog/.thumbs/x.png", "cat/._2.png"):
        draw(tmp_path / name)
    for name in ("Thumbs.db", ".DS_Store", "dog/Thumbs.db"):
        (tmp_path / name).write_bytes(b"x")
    notices = []
    assert len(names(find_splits(tmp_path, notices.append)["train"], tmp_path)) == 5
    assert notices == []


def test_strays_are_named(tmp_path):
    pets(tmp_path)
    (tmp_path / "notes.txt").write_text("x")
    draw(tmp_path / "loose.png")
    (tmp_path / "cat" / "readme.md").write_text("x")
    notices = []
    assert len(names(find_splits(tmp_path, notices.append)["train"], tmp_path)) == 5
    assert notices == [
        f"{tmp_path / 'loose.png'} is left out: it lies beside the class folders, not in one.",
        f"{tmp_path / 'notes.txt'} is left out: it lies beside the class folders, not in one.",
        "1 file is left out of class cat, no picture by name: readme.md.",
    ]


def test_links_that_loop_neither_hang_nor_bring_in_other_classes(tmp_path):
    pets(tmp_path)
    (tmp_path / "cat" / "up").symlink_to(tmp_path)
    (tmp_path / "cat" / "self").symlink_to(tmp_path / "cat")
    (tmp_path / "dog" / "deep" / "back").symlink_to(tmp_path / "dog" / "deep")
    assert len(names(find_splits(tmp_path)["train"], tmp_path)) == 5


def test_a_linked_class_folder_counts(tmp_path):
    draw(tmp_path / "elsewhere" / "1.png")
    pets(tmp_path / "pets")
    (tmp_path / "pets" / "bird").symlink_to(tmp_path / "elsewhere")
    assert find_splits(tmp_path / "pets")["train"].read().classes == ("bird", "cat", "dog")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
@pytest.mark.parametrize("where", [".", "cat", "dog/deep"])
def test_a_folder_without_permission_is_named(tmp_path, where):
    pets(tmp_path)
    (tmp_path / where).chmod(0)
    try:
        with pytest.raises(UserError, match="cannot be read: permission denied"):
            find_splits(tmp_path)
    finally:
        (tmp_path / where).chmod(0o755)


def test_a_folder_without_permission_is_named_even_for_root(tmp_path, monkeypatch):
    scan = os.scandir

    def refuse(path="."):
        if str(path).endswith("deep"):
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    pets(tmp_path)
    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(UserError) as caught:
        find_splits(tmp_path)
    assert str(caught.value) == f"The folder {tmp_path / 'dog' / 'deep'} cannot be read: permission denied."


def test_odd_names_survive(tmp_path):
    for name in ("été à la mer/ü 1.png", "a b/'x\".png", "猫/1.png"):
        draw(tmp_path / name)
    for name in ("été à la mer/2.png", "a b/2.png", "猫/2.png"):
        draw(tmp_path / name)
    images = load_images(str(tmp_path), "train", SourceOptions(image_size=8))
    assert set(images.classes) == {"été à la mer", "a b", "猫"}
