"""The one entry point: every source as the user writes it."""

import io
import json
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from loopback import Whole
from PIL import Image

from dynaconv.data import pictures
from dynaconv.data.pictures import choose_test_fifth
from dynaconv.data.sources import SourceOptions, load_images, resolve
from dynaconv.errors import UserError

OPTIONS = SourceOptions()


def png(value, side=8, mode="RGB"):
    buffer = io.BytesIO()
    Image.new(mode, (side, side), value).save(buffer, "PNG")
    return buffer.getvalue()


def fill(folder, counts, side=8, mode="RGB"):
    for name, count in counts.items():
        (folder / name).mkdir(parents=True)
        for index in range(count):
            (folder / name / f"{index:03}.png").write_bytes(png((index,) * len(mode), side, mode))
    return str(folder)


def test_digits_are_the_real_digits():
    from sklearn.datasets import load_digits

    train, test = load_images("digits", "train", OPTIONS), load_images("digits", "test", OPTIONS)
    assert train.images.shape[1:] == test.images.shape[1:] == (1, 8, 8)
    assert len(train) + len(test) == 1797
    assert train.images.max() == 255
    assert train.classes == test.classes == tuple("0123456789")
    known = {(image.tobytes(), int(label)) for image, label in zip(*load_digits(return_X_y=True), strict=True)}
    for image, label in zip(test.images, test.labels, strict=True):
        assert ((image.double() * 16 / 255).round().numpy().tobytes(), int(label)) in known


def test_the_test_fifth_is_fixed_stratified_and_apart():
    labels = np.array([0] * 100 + [1] * 7 + [2] * 2 + [3])
    chosen = choose_test_fifth(labels)
    assert np.bincount(labels[chosen], minlength=4).tolist() == [20, 1, 1, 0]
    assert np.array_equal(chosen, choose_test_fifth(labels))
    # Written down, because a run that was trained on one choice must never be judged by another.
    assert chosen.nonzero()[0][:6].tolist() == [1, 2, 3, 14, 19, 26]


def test_a_flat_folder_is_cut_with_a_notice(tmp_path):
    notices = []
    source = fill(tmp_path / "pets", {"cat": 10, "dog": 5})
    train = load_images(source, "train", SourceOptions(notify=notices.append))
    test = load_images(source, "test", OPTIONS)
    assert torch.bincount(train.labels).tolist() == [8, 4]
    assert torch.bincount(test.labels).tolist() == [2, 1]
    pairs = [{(int(image[0, 0, 0]), int(label)) for image, label in zip(part.images, part.labels, strict=True)}
             for part in (train, test)]  # fmt: skip
    assert not pairs[0] & pairs[1]
    assert notices == [
        "pets has no test split of its own: a fixed fifth of every class, 3 of 15 images, is kept apart as its test "
        "split."
    ]


def test_a_test_folder_gets_the_form_and_the_classes_of_train(tmp_path):
    fill(tmp_path / "train", {"ant": 3, "cat": 3, "dog": 3}, side=12)
    fill(tmp_path / "test", {"cat": 2, "dog": 2}, side=40, mode="L")
    notices = []
    test = load_images(str(tmp_path), "test", SourceOptions(notify=notices.append))
    assert test.images.shape == (4, 3, 12, 12)
    assert test.classes == ("ant", "cat", "dog")
    assert test.labels.tolist() == [1, 1, 2, 2]
    assert any("holds no images of 1 of the classes: ant" in notice for notice in notices)


def test_a_class_that_only_test_has_is_refused(tmp_path):
    fill(tmp_path / "train", {"cat": 3, "dog": 3})
    fill(tmp_path / "test", {"cat": 2, "cow": 2})
    with pytest.raises(UserError, match=r"has classes that .* lacks: cow; remove or rename them"):
        load_images(str(tmp_path), "test", OPTIONS)


def test_labels_of_parquet_splits_are_matched_by_name(tmp_path):
    def write(split, classes, labels):
        features = {"image": {"_type": "Image"}, "label": {"names": classes, "_type": "ClassLabel"}}
        table = pa.table({"image": [png((9, 9, 9))] * len(labels), "label": labels})
        metadata = {"huggingface": json.dumps({"info": {"features": features}})}
        pq.write_table(table.replace_schema_metadata(metadata), tmp_path / f"{split}.parquet")

    write("train", ["dog", "cat"], [0, 1, 1])
    write("test", ["cat", "dog"], [0, 0, 1])
    test = load_images(str(tmp_path), "test", OPTIONS)
    assert test.classes == ("dog", "cat")
    assert test.labels.tolist() == [1, 1, 0]


@pytest.mark.parametrize("kind", ["digits", "folder", "npz"])
@pytest.mark.parametrize("split", ["train", "test"])
def test_size_and_channels_are_as_asked(tmp_path, kind, split):
    source = kind
    if kind == "folder":
        source = fill(tmp_path / "pets", {"cat": 5, "dog": 5})
    if kind == "npz":
        source = str(tmp_path / "a.npz")
        np.savez(source, images=np.zeros((10, 9, 9), np.uint8), labels=np.arange(10) % 2)
    for size, channels in ((16, 1), (16, 3), (5, 3)):
        images = load_images(source, split, SourceOptions(image_size=size, channels=channels))
        assert images.images.shape[1:] == (channels, size, size)


def test_the_second_time_nothing_is_decoded_and_the_notices_come_again(tmp_path, monkeypatch):
    source = fill(tmp_path / "pets", {"cat": 5, "dog": 5})
    (tmp_path / "pets" / "cat" / "000.png").write_bytes(b"broken")
    first, second = [], []
    before = load_images(source, "train", SourceOptions(on_bad_file="skip", notify=first.append))
    monkeypatch.setattr(pictures, "decode", lambda *_: pytest.fail("decoded again"))
    after = load_images(source, "train", SourceOptions(on_bad_file="skip", notify=second.append))
    assert before.sha256() == after.sha256()
    assert first == second
    assert any("Left out 1 of 10 pictures" in notice and "000.png" in notice for notice in second)


def test_a_changed_picture_is_read_again(tmp_path):
    source = fill(tmp_path / "pets", {"cat": 5, "dog": 5})
    before = load_images(source, "train", OPTIONS)
    for index in range(5):
        (tmp_path / "pets" / "cat" / f"{index:03}.png").write_bytes(png((200, 100, 50)))
    after = load_images(source, "train", OPTIONS)
    assert before.sha256() != after.sha256()
    assert after.images[0, :, 0, 0].tolist() == [200, 100, 50]


def test_hub_sources(server):
    for split, count in (("train", 6), ("test", 3)):
        buffer = io.BytesIO()
        pq.write_table(pa.table({"image": [png((9, 9, 9))] * count, "label": [i % 2 for i in range(count)]}), buffer)
        server.routes[f"/datasets/me/it/resolve/main/{split}.parquet"] = Whole(buffer.getvalue())
    files = [
        {"type": "file", "path": path.rsplit("/", 1)[1], "size": len(route.content)}
        for path, route in server.routes.items()
    ]
    server.routes["/api/datasets/me/it/tree/main?recursive=true"] = Whole(json.dumps(files).encode())
    assert resolve("hf:me/it", OPTIONS) == "hf:me/it"
    assert len(load_images("hf:me/it", "train", OPTIONS)) == 6
    assert len(load_images("hf:me/it", "test", OPTIONS)) == 3


def test_auto_is_cifar10_where_it_is_at_hand(tmp_path, monkeypatch):
    folder = tmp_path / "cifar10"
    folder.mkdir()
    for split in ("train", "test"):
        table = pa.table({"img": [png((9, 9, 9), 32)] * 10, "label": list(range(10))})
        pq.write_table(table, folder / f"{split}.parquet")
    monkeypatch.setenv("DYNACONV_DATA", str(tmp_path))
    assert resolve("auto", SourceOptions(notify=pytest.fail)) == "cifar10"
    assert load_images("auto", "test", OPTIONS).classes[0] == "airplane"


def test_auto_without_cifar10_is_the_digits_with_a_notice_that_cannot_be_missed(no_cifar10):
    notices = []
    assert resolve("auto", SourceOptions(notify=notices.append)) == "digits"
    (notice,) = notices
    assert "NOT CIFAR-10: training on the DIGITS instead" in notice
    assert "Why: CIFAR-10 is not on this machine, and nothing is looked up offline." in notice
    assert "DYNACONV_DATA" in notice
    assert notice.count("\n") >= 5


def test_auto_tries_the_network_before_it_gives_up(server):
    assert resolve("auto", OPTIONS) == "digits"
    assert any("uoft-cs/cifar10" in path for path, _ in server.seen)
    assert any(path == "/cifar-10-python.tar.gz" for path, _ in server.seen)


def test_a_path_is_stored_so_that_it_is_found_from_anywhere(tmp_path, monkeypatch):
    fill(tmp_path / "pets", {"cat": 2, "dog": 2})
    monkeypatch.chdir(tmp_path)
    assert resolve("pets", OPTIONS) == resolve("./pets", OPTIONS) == str(tmp_path / "pets")


def test_real_cifar10_is_read_in_time_and_from_the_cache_at_once(real_cifar10):
    started = time.perf_counter()
    train = load_images("cifar10", "train", OPTIONS)
    first = time.perf_counter() - started
    started = time.perf_counter()
    again = load_images("cifar10", "train", OPTIONS)
    cached = time.perf_counter() - started
    assert train.images.shape == (50_000, 3, 32, 32)
    assert torch.bincount(train.labels).tolist() == [5000] * 10
    assert again.sha256() == train.sha256()
    # The aim is 10 seconds on two idle cores; a machine that does other work at the same time may take thrice that.
    assert first < 30, f"{first:.1f} s"
    assert cached < 1, f"{cached:.2f} s"
