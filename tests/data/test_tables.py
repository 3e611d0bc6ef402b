"""Parquet, CSV and .npz tables of pictures and labels."""

import io
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from dynaconv.data.pictures import assemble
from dynaconv.data.tables import find_csv, find_npz, find_parquet, index_labels
from dynaconv.errors import UserError

VALUES = [10, 20, 30, 40]


def png(value, side=8):
    buffer = io.BytesIO()
    Image.new("L", (side, side), value).save(buffer, "PNG")
    return buffer.getvalue()


def write(path, labels, image="image", label="label", classes=None, struct=True, values=VALUES):
    path.parent.mkdir(parents=True, exist_ok=True)
    pictures = [{"bytes": png(value), "path": "x.png"} if struct else png(value) for value in values]
    table = pa.table({"id": range(len(values)), image: pictures, label: labels})
    if classes:
        features = {image: {"_type": "Image"}, label: {"names": classes, "_type": "ClassLabel"}}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    pq.write_table(table, path, row_group_size=3)
    return path


def pixels(split):
    return assemble(split.read()).images[:, 0, 0, 0].tolist()


@pytest.mark.parametrize("struct", [True, False])
@pytest.mark.parametrize(("image", "label"), [("img", "label"), ("image", "labels"), ("pixels", "fine_label")])
def test_columns_are_found_by_their_usual_names(tmp_path, struct, image, label):
    found = find_parquet(write(tmp_path / "a.parquet", [0, 1, 0, 1], image, label, struct=struct))["train"].read()
    assert assemble(found).images[:, 0, 0, 0].tolist() == VALUES
    assert (found.labels.tolist(), found.classes) == ([0, 1, 0, 1], ("0", "1"))


def test_class_names_and_odd_columns_come_from_the_metadata(tmp_path):
    path = write(tmp_path / "a.parquet", [0, 2, 0, 2], "photo", "species", classes=["cat", "dog", "eel"])
    found = find_parquet(path)["train"].read()
    assert found.classes == ("cat", "dog", "eel")
    assert found.labels.tolist() == [0, 2, 0, 2]


def test_names_as_labels_are_sorted(tmp_path):
    labels = pa.array(["dog", "cat", "dog", "ant"]).dictionary_encode()
    found = find_parquet(write(tmp_path / "a.parquet", labels))["train"].read()
    assert found.classes == ("ant", "cat", "dog")
    assert found.labels.tolist() == [2, 1, 2, 0]


def test_a_folder_is_split_by_file_names(tmp_path):
    write(tmp_path / "x" / "train-00001-of-00002.parquet", [0, 1], values=[3, 4])
    write(tmp_path / "x" / "train-00000-of-00002.parquet", [0, 1], values=[1, 2])
    write(tmp_path / "x" / "test-00000-of-00001.parquet", [0, 1], values=[5, 6])
    write(tmp_path / "x" / "validation-00000-of-00001.parquet", [0, 1], values=[7, 8])
    splits = find_parquet(tmp_path)
    assert pixels(splits["train"]) == [1, 2, 3, 4]
    assert pixels(splits["test"]) == [5, 6]


def test_a_folder_without_such_names_is_one_table(tmp_path):
    write(tmp_path / "b.parquet", [0, 1], values=[3, 4])
    write(tmp_path / "a.parquet", [0, 1], values=[1, 2])
    splits = find_parquet(tmp_path)
    assert splits.keys() == {"train"}
    assert pixels(splits["train"]) == [1, 2, 3, 4]


def csv_of(tmp_path, text, encoding="utf-8"):
    for place, value in enumerate(VALUES):
        (tmp_path / f"{place}.png").write_bytes(png(value))
    (tmp_path / "odd, name.png").write_bytes(png(99))
    path = tmp_path / "labels.csv"
    path.write_bytes(text.encode(encoding))
    return path


@pytest.mark.parametrize("text", [
    "0.png,dog\n1.png,cat\n", "path,label\n0.png,dog\n1.png,cat\n", "id,Label,Filename\n7,dog,0.png\n8,cat,1.png\n",
    "0.png,dog\r\n1.png,cat", "\n0.png , dog\n\n1.png,cat\n\n", '"0.png","dog"\n1.png,cat,extra\n',
])  # fmt: skip
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_csv_forms(tmp_path, text, encoding):
    split = find_csv(csv_of(tmp_path, text, encoding))["train"]
    assert pixels(split) == VALUES[:2]
    assert (split.read().classes, split.read().labels.tolist()) == (("cat", "dog"), [1, 0])


def test_quoted_fields_may_hold_commas(tmp_path):
    assert pixels(find_csv(csv_of(tmp_path, '0.png,a\n"odd, name.png","b, c"\n'))["train"]) == [10, 99]


def test_a_change_of_a_picture_is_seen(tmp_path):
    assert tmp_path / "1.png" in find_csv(csv_of(tmp_path, "0.png,a\n1.png,b\n"))["train"].files


def test_a_missing_picture_is_named_with_its_line(tmp_path):
    split = find_csv(csv_of(tmp_path, "path,label\n0.png,a\ngone.png,b\n"))["train"]
    with pytest.raises(
        UserError, match=r"^gone\.png \(labels\.csv, line 3\) cannot be read as a picture: there is no such"
    ):
        assemble(split.read())


IMAGES = np.arange(4 * 6 * 5 * 3, dtype=np.uint8).reshape(4, 6, 5, 3)


@pytest.mark.parametrize(("keys", "images"), [
    (("images", "labels"), IMAGES), (("x_train", "y_train"), IMAGES.transpose(0, 3, 1, 2)),
    (("x", "y"), IMAGES[..., :1]),
])  # fmt: skip
def test_npz_layouts(tmp_path, keys, images):
    np.savez(tmp_path / "a.npz", **{keys[0]: images, keys[1]: np.array([[0], [1], [1], [0]])})
    splits = find_npz(tmp_path / "a.npz")
    found = splits["train"].read()
    assert splits.keys() == {"train"}
    assert np.array_equal(found.pictures, IMAGES[..., : found.pictures.shape[3]])
    assert found.labels.tolist() == [0, 1, 1, 0]


def test_npz_grey_with_test_split_and_names(tmp_path):
    grey = IMAGES[..., 0]
    labels, classes = np.array([0, 1, 1, 0]), np.array(["no", "yes"])
    np.savez(tmp_path / "a.npz", x_train=grey, y_train=labels, x_test=grey[:2], y_test=labels[:2], classes=classes)
    splits = find_npz(tmp_path / "a.npz")
    assert splits["train"].read().pictures.shape == (4, 6, 5, 1)
    assert len(splits["test"].read().labels) == 2
    assert splits["test"].read().classes == ("no", "yes")


def test_whole_numbers_are_sorted_as_numbers():
    labels, classes = index_labels(["10", "9", "10", "100"])
    assert classes == ("9", "10", "100")
    assert labels.tolist() == [1, 0, 1, 2]
