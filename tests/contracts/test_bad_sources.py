"""What a user gets wrong about the images: the exact sentence for each."""
# ruff: noqa: E501 (a sentence is compared whole, so it stands on one line)

import io

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from dynaconv.data.sources import SourceOptions, load_images
from dynaconv.errors import UserError

OTHER = "a folder of class folders, a .parquet, .csv or .npz file, or hf:OWNER/NAME"


def png(mode="RGB", side=8):
    buffer = io.BytesIO()
    Image.new(mode, (side, side)).save(buffer, "PNG")
    return buffer.getvalue()


def files(**contents):
    """Makes a builder of files below the folder `d`; a name ending in / is an empty folder."""

    def build(folder):
        for name, content in contents.items():
            path = folder / name
            (path if name.endswith("/") else path.parent).mkdir(parents=True, exist_ok=True)
            if not name.endswith("/"):
                path.write_bytes(content)

    return build


def npz(**arrays):
    return lambda folder: np.savez(folder / "a.npz", **arrays)


def parquet(name="a.parquet", **columns):
    return lambda folder: pq.write_table(pa.table(columns), folder / name)


PICTURES = np.zeros((4, 8, 8, 3), np.uint8)
LABELS = np.array([0, 1, 0, 1])
P = png()

CASES = {
    "unknown word": ("cifar1", files(), f"Unknown source 'cifar1'. Did you mean 'cifar10'? Known: cifar10, digits, auto; or {OTHER}."),
    "far word": ("mnist", files(), f"Unknown source 'mnist'. Known: cifar10, digits, auto; or {OTHER}."),
    "no such path": ("D/gone", files(), f"There is no D/gone; check --data, which takes cifar10, digits, auto, {OTHER}."),
    "no such file": ("D/gone.csv", files(), f"There is no D/gone.csv; check --data, which takes cifar10, digits, auto, {OTHER}."),
    "other file": ("D/a.txt", files(**{"a.txt": b"x"}), f"D/a.txt is no source of images; --data takes cifar10, digits, auto, {OTHER}."),
    "long path": (f"D/{'a' * 300}", files(), f"The source D/{'a' * 300} cannot be looked at: file name too long."),
    "hub name": ("hf:cifar10", files(), "'hf:cifar10' does not name a dataset; write hf:OWNER/NAME, for example hf:uoft-cs/cifar10."),
    "hub path": ("hf:../../x", files(), "'hf:../../x' does not name a dataset; write hf:OWNER/NAME, for example hf:uoft-cs/cifar10."),
    "hub offline": ("hf:a/b", files(), "hf:a/b is not in the cache, and nothing is looked up offline; run once without --offline and HF_HUB_OFFLINE."),
    "cifar10 offline": ("cifar10", files(), "CIFAR-10 is not on this machine, and nothing is looked up offline. Download https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz on any machine, put it into a folder as it is, and set DYNACONV_DATA to that folder."),
    # folders
    "empty folder": ("D", files(), "D holds no class folders; it must be laid out as FOLDER/CLASS/picture or FOLDER/train/CLASS/picture."),
    "loose pictures": ("D", files(**{"1.png": P}), "D holds pictures, but no class folders; it must be laid out as FOLDER/CLASS/picture or FOLDER/train/CLASS/picture."),
    "one class": ("D", files(**{"cat/1.png": P}), "D holds a single class folder (cat); a classifier needs at least 2."),
    "empty class": ("D", files(**{"cat/1.png": P, "dog/": b""}), "D/dog holds no pictures; add some, or remove the folder."),
    "empty train": ("D", files(**{"train/": b"", "test/cat/1.png": P}), "D/train holds no class folders; it must be laid out as FOLDER/CLASS/picture or FOLDER/train/CLASS/picture."),
    "bad picture": ("D", files(**{"cat/1.png": P, "dog/1.png": b"no", "dog/2.png": P}), "D/dog/1.png cannot be read as a picture: it is in no known picture format; 1 of 3 pictures cannot be read. Repair or remove what is damaged, or leave such files out with --on-bad-file skip."),
    "empty picture": ("D", files(**{"cat/1.png": P, "dog/1.png": b""}), "D/dog/1.png cannot be read as a picture: it is empty; 1 of 2 pictures cannot be read. Repair or remove what is damaged, or leave such files out with --on-bad-file skip."),
    "all bad": ("D", files(**{"cat/1.png": b"x", "dog/1.png": b""}), "D/cat/1.png cannot be read as a picture: it is in no known picture format; 2 of 2 pictures cannot be read. Repair or remove what is damaged."),
    "one picture a class": ("D", files(**{"cat/1.png": P, "dog/1.png": P}), "d has too few images to keep a fifth of them as a test split; add some."),
    "tiny pictures": ("D", files(**{"cat/1.png": png(side=2), "dog/1.png": png(side=2)}), "d holds images of 2 x 2 pixels, too small to learn from; enlarge them with --image-size."),
    # CSV
    "empty CSV": ("D/a.csv", files(**{"a.csv": b""}), "D/a.csv holds no lines of path,label."),
    "header alone": ("D/a.csv", files(**{"a.csv": b"path,label\n"}), "D/a.csv holds no lines of path,label."),
    "no label column": ("D/a.csv", files(**{"a.csv": b"path,kind\n1.png,a\n"}), "D/a.csv, line 1: there is no column for the label; name one of them label, labels, fine_label, class, target."),
    "no path column": ("D/a.csv", files(**{"a.csv": b"where,label\n1.png,a\n"}), "D/a.csv, line 1: there is no column for the path; name one of them path, file, filename, file_name, image, img, picture."),
    "short line": ("D/a.csv", files(**{"a.csv": b"1.png,a\n2.png\n"}), "D/a.csv, line 2: the label is missing; a line is path,label."),
    "semicolons": ("D/a.csv", files(**{"a.csv": b"1.png;a\n"}), "D/a.csv, line 1: the label is missing; a line is path,label."),
    "no path": ("D/a.csv", files(**{"a.csv": b"path,label\n,a\n"}), "D/a.csv, line 2: the path is missing; a line is path,label."),
    "not UTF-8": ("D/a.csv", files(**{"a.csv": b"caf\xe9.png,a\n"}), "D/a.csv cannot be read as CSV: it is not UTF-8 text."),
    "open quote": ("D/a.csv", files(**{"a.csv": b'"1.png,a\n'}), "D/a.csv cannot be read as CSV: unexpected end of data."),
    "CSV of missing pictures": ("D/a.csv", files(**{"a.csv": b"1.png,a\n2.png,b\n", "1.png": P}), "2.png (a.csv, line 2) cannot be read as a picture: there is no such file; 1 of 2 pictures cannot be read. Repair or remove what is damaged, or leave such files out with --on-bad-file skip."),
    "CSV of one class": ("D/a.csv", files(**{"a.csv": b"1.png,a\n1.png,a\n", "1.png": P}), "a.csv holds images of fewer than 2 classes; a classifier needs at least 2."),
    # parquet
    "no parquet": ("D/a.parquet", files(**{"a.parquet": b"PAR1 nonsense"}), "D/a.parquet cannot be read as a parquet file; it is damaged or cut short."),
    "no picture column": ("D/a.parquet", parquet(a=[1], label=[0]), "D/a.parquet has no column of pictures (img, image, images, picture, pixels, bytes); its columns are a, label."),
    "no label in parquet": ("D/a.parquet", parquet(image=[P], kind=[0]), "D/a.parquet has no column of labels (label, labels, fine_label, class, target); its columns are image, kind."),
    "numbers for pictures": ("D/a.parquet", parquet(pixels=[[1, 2]], label=[0]), "D/a.parquet: column pixels must hold the bytes of picture files, but it holds list<element: int64>."),
    "no picture in a row": ("D/a.parquet", parquet(image=[P, None], label=[0, 1]), "D/a.parquet: 1 rows of column image hold no picture."),
    "fractional labels": ("D/a.parquet", parquet(image=[P], label=[0.5]), "D/a.parquet: column label must hold whole numbers or names, but it holds double."),
    "unlabelled row": ("D/a.parquet", parquet(image=[P, P], label=[0, -1]), "D/a.parquet: row 1 of column label has no label (it holds -1)."),
    "no rows": ("D/a.parquet", parquet(image=pa.array([], pa.binary()), label=pa.array([], pa.int64())), "D/a.parquet holds no rows."),
    "test alone": ("D", parquet("test.parquet", image=[P], label=[0]), "D holds parquet files to test on, but none to train on (train-*.parquet)."),
    "bad picture in parquet": ("D/a.parquet", parquet(image=[P, b"x"], label=[0, 1]), "D/a.parquet row 1 cannot be read as a picture: it is in no known picture format; 1 of 2 pictures cannot be read. Repair or remove what is damaged, or leave such files out with --on-bad-file skip."),
    # npz
    "no npz": ("D/a.npz", files(**{"a.npz": b"nonsense"}), "D/a.npz cannot be read as an .npz file; it is damaged or something else."),
    "empty npz": ("D/a.npz", files(**{"a.npz": b""}), "D/a.npz cannot be read as an .npz file; it is damaged or something else."),
    "pickled objects": ("D/a.npz", npz(images=np.array([{}], dtype=object), labels=LABELS), "D/a.npz holds pickled objects, which are never loaded; save plain arrays."),
    "no images in npz": ("D/a.npz", npz(pictures=PICTURES, labels=LABELS), "D/a.npz holds no images (images, x_train, train_images, x); it holds labels, pictures."),
    "no labels in npz": ("D/a.npz", npz(x=PICTURES), "D/a.npz holds no labels (labels, y_train, train_labels, y); it holds x."),
    "float images": ("D/a.npz", npz(x=PICTURES / 255 + 0.5, y=LABELS), "D/a.npz: x is float64 from 0.5 to 0.5; images must be uint8 from 0 to 255."),
    "flat images": ("D/a.npz", npz(x=PICTURES.reshape(4, -1), y=LABELS), "D/a.npz: x has the shape (4, 192); images must be (N, H, W), (N, H, W, C) or (N, C, H, W) with C 1 or 3."),
    "labels of another number": ("D/a.npz", npz(x=PICTURES, y=LABELS[:3]), "D/a.npz holds 4 images (x) but 3 labels (y)."),
    "one-hot labels": ("D/a.npz", npz(x=PICTURES, y=np.eye(4)), "D/a.npz: y is float64 of shape (4, 4); labels must be whole numbers or names, one an image."),
    "negative label": ("D/a.npz", npz(x=PICTURES, y=LABELS - 1), "D/a.npz: y holds the label -1; labels go from 0 up."),
    "label beyond the names": ("D/a.npz", npz(x=PICTURES, y=LABELS * 2, classes=np.array(["a", "b"])), "D/a.npz: y holds the label 2, but labels go from 0 to 1."),
    "doubled name": ("D/a.npz", npz(x=PICTURES, y=LABELS, classes=np.array(["a", "a"])), "a.npz names the class 'a' more than once; give each its own name."),
    "one class in npz": ("D/a.npz", npz(x=PICTURES, y=LABELS * 0), "a.npz holds images of fewer than 2 classes; a classifier needs at least 2."),
    "nothing in npz": ("D/a.npz", npz(x=PICTURES[:0], y=LABELS[:0]), "a.npz holds no pictures."),
    # CIFAR-10's own forms
    "cut archive": ("D/cifar-10-python.tar.gz", files(**{"cifar-10-python.tar.gz": b"\x1f\x8b\x08"}), "D/cifar-10-python.tar.gz cannot be read; it is damaged or cut short, so get it again."),
    "missing batch": ("D", files(**{"data_batch_1.bin": bytes(3073)}), "D holds no data_batch_2.bin, data_batch_3.bin, data_batch_4.bin, data_batch_5.bin; it is incomplete, so get it again."),
    "cut batch": ("D", files(**{f"data_batch_{i}.bin": bytes(3000 if i == 3 else 3073) for i in range(1, 6)}), "D: data_batch_3.bin holds 3000 bytes, which is no whole number of rows of 3073; it is cut short."),
    "label beyond nine": ("D", files(**{f"data_batch_{i}.bin": bytes([9 + i]) * 3073 for i in range(1, 6)}), "D holds the label 14, but labels go from 0 to 9."),
}  # fmt: skip


@pytest.mark.parametrize(("source", "build", "message"), CASES.values(), ids=CASES.keys())
def test_a_bad_source_is_one_exact_sentence(source, build, message, tmp_path, no_cifar10):
    folder = tmp_path / "d"
    folder.mkdir()
    build(folder)
    with pytest.raises(UserError) as caught:
        load_images(source.replace("D", str(folder)) if source.startswith("D") else source, "train", SourceOptions())
    assert str(caught.value).replace(str(folder), "D") == message
    assert caught.value.exit_code == 2
