"""CIFAR-10 in its five forms, the order of the places, and files that want to do harm."""

import hashlib
import io
import json
import os
import pickle
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from loopback import Crawling, Whole
from PIL import Image

from dynaconv.data import cifar10, download
from dynaconv.data.cifar10 import CLASSES, find, find_archive, find_local, load_pickled_batch
from dynaconv.data.download import Checksum, Patience
from dynaconv.data.pictures import assemble
from dynaconv.errors import UserError

ROWS = 4
BATCHES = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
PIXELS = np.random.default_rng(7).integers(0, 256, (6 * ROWS, 3, 32, 32), dtype=np.uint8)
LABELS = np.random.default_rng(7).integers(0, 10, 6 * ROWS)


def python_form(protocol=2):
    files = {"batches.meta": pickle.dumps({"label_names": list(CLASSES), "num_vis": 3072}, protocol)}
    for i, name in enumerate(BATCHES):
        rows = slice(i * ROWS, (i + 1) * ROWS)
        data = PIXELS[rows].reshape(ROWS, 3072)
        batch = {b"data": data, b"labels": LABELS[rows].tolist(), b"batch_label": b"x", b"filenames": [b"y"]}
        files[name] = pickle.dumps(batch, protocol)
    return files


def binary_form():
    files = {"batches.meta.txt": "\n".join(CLASSES).encode() + b"\n\n"}
    for i, name in enumerate(BATCHES):
        rows = slice(i * ROWS, (i + 1) * ROWS)
        data = np.concatenate([LABELS[rows, None].astype(np.uint8), PIXELS[rows].reshape(ROWS, 3072)], axis=1)
        files[f"{name}.bin"] = data.tobytes()
    return files


def pack(files, folder, extra=()):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for member in extra:
            archive.addfile(member)
        for name, content in files.items():
            member = tarfile.TarInfo(f"{folder}/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def write_parquet(folder):
    folder.mkdir(parents=True, exist_ok=True)
    for split, rows in (("train", slice(0, 5 * ROWS)), ("test", slice(5 * ROWS, None))):
        images = []
        for pixels in PIXELS[rows]:
            buffer = io.BytesIO()
            Image.fromarray(pixels.transpose(1, 2, 0)).save(buffer, "PNG")
            images.append({"bytes": buffer.getvalue(), "path": None})
        table = pa.table({"img": images, "label": pa.array(LABELS[rows])})
        pq.write_table(table, folder / f"{split}-00000-of-00001.parquet")


def place(form, data):
    """Puts CIFAR-10 where DYNACONV_DATA=data finds it."""
    files, folder = (
        (binary_form(), "cifar-10-batches-bin") if "binary" in form else (python_form(), "cifar-10-batches-py")
    )
    archive = f"cifar-10-{'binary' if 'binary' in form else 'python'}.tar.gz"
    if form == "parquet":
        return write_parquet(data / "cifar10" / "plain_text")
    where = {"inside cifar10": data / "cifar10", "beside": data, "itself": data / "cifar10"}[form.split(", ")[2]]
    where.mkdir(parents=True, exist_ok=True)
    if "archive" in form:
        (where / archive).write_bytes(pack(files, folder))
    else:
        inner = where if "itself" in form else where / folder
        inner.mkdir(exist_ok=True)
        for name, content in files.items():
            (inner / name).write_bytes(content)


@pytest.mark.parametrize("form", [
    "parquet", "python, archive, inside cifar10", "python, archive, beside", "python, folder, inside cifar10",
    "python, folder, itself", "binary, archive, inside cifar10", "binary, folder, beside", "binary, folder, itself",
])  # fmt: skip
def test_every_form_gives_the_same_images(form, tmp_path, monkeypatch):
    place(form, tmp_path)
    monkeypatch.setenv("DYNACONV_DATA", str(tmp_path))
    before = set(tmp_path.rglob("*"))
    splits = find(offline=True)
    for split, rows in (("train", slice(0, 5 * ROWS)), ("test", slice(5 * ROWS, None))):
        images = assemble(splits[split].read())
        assert torch.equal(images.images, torch.from_numpy(PIXELS[rows]))
        assert images.labels.tolist() == LABELS[rows].tolist()
        assert images.classes == CLASSES
        assert images.description.startswith(f"CIFAR-10, {split}, ")
    assert set(tmp_path.rglob("*")) == before, "an archive must be read in place"


@pytest.mark.parametrize("protocol", range(6))
def test_batches_of_every_pickle_protocol_are_read(protocol):
    for data in (PIXELS[:ROWS].reshape(ROWS, 3072), np.asfortranarray(PIXELS[:ROWS].reshape(ROWS, 3072))):
        batch = load_pickled_batch(pickle.dumps({"data": data, b"labels": [1]}, protocol), "x")
        assert np.array_equal(batch["data"], data)
        assert batch["labels"] == [1]


def test_a_batch_as_python_2_wrote_it_is_read():
    content = (
        b"\x80\x02}q\x01(U\x04dataq\x02cnumpy.core.multiarray\n_reconstruct\nq\x03cnumpy\nndarray\nq\x04K\x00\x85U\x01b\x87"
        b"Rq\x05(K\x01K\x01K\x03\x86cnumpy\ndtype\nq\x06U\x02u1K\x00K\x01\x87Rq\x07(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff"
        b"\xff\xffK\x00tb\x89U\x03\x01\x02\xfftbU\x06labelsq\x08]q\tK\x05au."
    )
    batch = load_pickled_batch(content, "x")
    assert batch["data"].tolist() == [[1, 2, 255]]
    assert batch["labels"] == [5]


class Harmful:
    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


@pytest.mark.parametrize("protocol", range(6))
def test_a_pickle_that_runs_a_command_is_refused_and_not_run(tmp_path, protocol):
    marker = tmp_path / "marker"
    files = python_form() | {"data_batch_3": pickle.dumps(Harmful(os.system, f"touch {marker}"), protocol)}
    (tmp_path / "cifar-10-python.tar.gz").write_bytes(pack(files, "cifar-10-batches-py"))
    with pytest.raises(UserError) as caught:
        find_archive(tmp_path)["train"].read()
    assert not marker.exists()
    assert str(caught.value) == (
        f"{tmp_path}/cifar-10-python.tar.gz: data_batch_3 refers to posix.system, which no batch of CIFAR-10 needs; "
        "nothing of it was run. Get the file from a source that you trust."
    )
    pickle.loads(files["data_batch_3"])
    assert marker.exists(), "the pickle must be one that does harm when it is loaded the usual way"


@pytest.mark.parametrize("harmful", [
    Harmful(eval, "1"), Harmful(getattr, {}, "keys"), Harmful(np.load, "x"), Harmful(np.frombuffer, b"x"),
    Harmful(__import__, "os"), Harmful(pickle.loads, b"x"),
], ids=lambda harmful: harmful.function.__name__)  # fmt: skip
def test_other_globals_are_refused(harmful):
    with pytest.raises(UserError, match="which no batch of CIFAR-10 needs"):
        load_pickled_batch(pickle.dumps(harmful), "x")


@pytest.mark.parametrize("array", [np.zeros(3), np.array([object], dtype=object), np.array(["a"])], ids=str)
def test_arrays_of_anything_but_bytes_are_refused(array):
    with pytest.raises(UserError):
        load_pickled_batch(pickle.dumps({"data": array}, 2), "x")


def test_links_and_odd_members_of_an_archive_are_passed_over(tmp_path):
    link, device = tarfile.TarInfo("cifar-10-batches-py/data_batch_1"), tarfile.TarInfo("x/test_batch")
    link.type, link.linkname, device.type = tarfile.SYMTYPE, "/etc/passwd", tarfile.CHRTYPE
    escape = tarfile.TarInfo("../../escape")
    (tmp_path / "cifar-10-python.tar.gz").write_bytes(pack(python_form(), "../..", [link, device, escape]))
    assert len(find_archive(tmp_path)["train"].read().labels) == 5 * ROWS
    assert [path.name for path in tmp_path.iterdir()] == ["cifar-10-python.tar.gz"]


@pytest.mark.parametrize("length", range(0, 60_000, 3500))
def test_a_cut_archive_is_one_sentence(tmp_path, length):
    content = pack(python_form(), "cifar-10-batches-py")
    assert len(content) > 60_000
    (tmp_path / "cifar-10-python.tar.gz").write_bytes(content[:length])
    with pytest.raises(UserError, match=r"it is damaged or cut short, so get it again|it is incomplete"):
        find_archive(tmp_path)["test"].read()


# ------------------------------------------------------------------------------------------------ finding, downloading


def serve_archive(server, monkeypatch):
    content = pack(python_form(), "cifar-10-batches-py")
    digits = hashlib.new("md5", content).hexdigest()  # noqa: S324 (what the official site publishes)
    monkeypatch.setattr(cifar10, "OFFICIAL_CHECKSUM", Checksum("md5", digits))
    monkeypatch.setattr(cifar10, "OFFICIAL_BYTES", len(content))
    server.routes["/cifar-10-python.tar.gz"] = Whole(content)


def serve_hub(server, tmp_path, route=Whole):
    write_parquet(tmp_path / "hub")
    listing = []
    for path in sorted((tmp_path / "hub").iterdir()):
        content, remote = path.read_bytes(), f"plain_text/{path.name}"
        oid = hashlib.sha256(content).hexdigest()
        listing.append({"type": "file", "path": remote, "size": len(content), "lfs": {"oid": oid}})
        server.routes[f"/datasets/uoft-cs/cifar10/resolve/main/{remote}"] = route(content)
    server.routes["/api/datasets/uoft-cs/cifar10/tree/main?recursive=true"] = Whole(json.dumps(listing).encode())


def test_the_hub_comes_before_the_official_site_and_is_kept(server, tmp_path, monkeypatch):
    serve_hub(server, tmp_path)
    serve_archive(server, monkeypatch)
    assert torch.equal(assemble(find()["test"].read()).images, torch.from_numpy(PIXELS[5 * ROWS :]))
    asked = len(server.seen)
    assert not any("tar.gz" in path for path, _ in server.seen)
    assert find(offline=True)["train"].read().classes == CLASSES
    assert len(server.seen) == asked


def test_without_the_hub_the_official_site_is_asked(server, monkeypatch, own_cache):
    serve_archive(server, monkeypatch)
    notices = []
    splits = find(notify=notices.append)
    assert torch.equal(assemble(splits["train"].read()).images, torch.from_numpy(PIXELS[: 5 * ROWS]))
    assert (own_cache / "cifar10" / "cifar-10-python.tar.gz").is_file()
    assert any("hf:uoft-cs/cifar10 does not exist" in notice for notice in notices)
    assert find_local() is not None


def test_a_hub_that_crawls_gives_way_to_the_official_site(server, tmp_path, monkeypatch):
    serve_hub(server, tmp_path, Crawling)
    serve_archive(server, monkeypatch)
    impatient = Patience(slow_seconds=0.3, bear_last=False)
    monkeypatch.setattr(cifar10, "Patience", lambda **_: impatient)
    assert "python" in assemble(find()["test"].read()).description


def test_an_archive_with_another_checksum_is_never_used(server, monkeypatch, own_cache):
    serve_archive(server, monkeypatch)
    monkeypatch.setattr(cifar10, "OFFICIAL_CHECKSUM", Checksum("md5", "0" * 32))
    with pytest.raises(UserError, match="wrong md5 checksum, twice"):
        find()
    assert not list(own_cache.rglob("cifar*.tar.gz*"))


def test_offline_asks_nobody(server):
    with pytest.raises(UserError) as caught:
        find(offline=True)
    assert str(caught.value) == (
        "CIFAR-10 is not on this machine, and nothing is looked up offline. Download "
        "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz on any machine, put it into a folder as it is, and "
        "set DYNACONV_DATA to that folder."
    )
    assert server.seen == []


def test_a_data_folder_that_is_not_there_is_told(tmp_path, monkeypatch):
    monkeypatch.setenv("DYNACONV_DATA", str(tmp_path / "gone"))
    notices = []
    assert find_local(notices.append) is None
    assert notices == [
        f"DYNACONV_DATA names {tmp_path / 'gone'}, which is no folder; CIFAR-10 is looked for elsewhere."
    ]


def test_the_published_checksum_is_what_a_download_is_held_to():
    assert Checksum("md5", "c58f30108f718f92721af3b95e74349a") == cifar10.OFFICIAL_CHECKSUM
    assert cifar10.OFFICIAL_URL == "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz"
    assert download.Checksum is Checksum


def test_the_real_test_split(real_cifar10):
    images = assemble(find_local()["test"].read())
    assert images.images.shape == (10_000, 3, 32, 32)
    assert torch.bincount(images.labels).tolist() == [1000] * 10
    assert images.classes == CLASSES
    # Known means of the test images, in fractions of 255.
    means = images.images.float().mean((0, 2, 3)) / 255
    assert torch.allclose(means, torch.tensor([0.4942, 0.4851, 0.4504]), atol=2e-4)
