"""The cache of prepared images: found again, never wrong, never in the way."""

import os

import pytest
import torch

from dynaconv.data.cache import load_prepared, prepared_key, save_prepared
from dynaconv.data.images import ImageSet
from dynaconv.folders import cache_folder

IMAGES = ImageSet(
    torch.randint(0, 256, (20, 3, 6, 6), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)),
    torch.arange(20) % 2, ("été", "b"), "some images",
)  # fmt: skip


def prepared(own_cache):
    (path,) = (own_cache / "prepared").iterdir()
    return path


def test_images_come_back_as_they_were_with_their_notices(own_cache):
    save_prepared("key", IMAGES, ["Left out one."], pytest.fail)
    notices = []
    loaded = load_prepared("key", notices.append)
    assert loaded.sha256() == IMAGES.sha256()
    assert loaded.description == IMAGES.description
    assert notices == ["Left out one."]
    assert load_prepared("other", pytest.fail) is None
    assert prepared(own_cache).name == "key.safetensors"


@pytest.mark.parametrize("place", [0, 8, 40, -2000, -1])
def test_one_altered_byte_is_noticed(own_cache, place):
    save_prepared("key", IMAGES, [], pytest.fail)
    path = prepared(own_cache)
    content = bytearray(path.read_bytes())
    content[place] ^= 0xFF
    path.write_bytes(content)
    notices = []
    assert load_prepared("key", notices.append) is None
    assert len(notices) == 1
    assert "are damaged" in notices[0]


@pytest.mark.parametrize("length", [0, 5, 100, 1000])
def test_a_cut_file_is_noticed(own_cache, length):
    save_prepared("key", IMAGES, [], pytest.fail)
    os.truncate(prepared(own_cache), length)
    notices = []
    assert load_prepared("key", notices.append) is None
    assert len(notices) == 1


def test_a_cache_that_cannot_be_written_costs_a_notice(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("DYNACONV_CACHE", str(tmp_path / "file"))
    notices = []
    save_prepared("key", IMAGES, [], notices.append)
    assert len(notices) == 1
    assert notices[0].startswith(f"The prepared images cannot be kept in {tmp_path / 'file' / 'prepared'} (")


def test_a_full_disk_leaves_nothing_half_written(own_cache, monkeypatch):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    notices = []
    save_prepared("key", IMAGES, [], notices.append)
    assert "No space left on device" in notices[0]
    assert list((own_cache / "prepared").iterdir()) == []


def test_the_key_follows_the_files_and_the_options(tmp_path):
    file, other = tmp_path / "a", tmp_path / "b"
    file.write_text("1")
    other.write_text("1")
    os.utime(file, ns=(1, 1))
    os.utime(other, ns=(1, 1))
    key = prepared_key([file], size=None)
    assert prepared_key([file], size=None) == key
    different = {prepared_key([file], size=8), prepared_key([other], size=None), prepared_key([file, other], size=None)}
    os.utime(file, ns=(1, 2))
    different.add(prepared_key([file], size=None))
    file.write_text("12")
    os.utime(file, ns=(1, 1))
    different.add(prepared_key([file], size=None))
    assert len(different | {key}) == 6


@pytest.mark.parametrize(("own", "shared", "expected"), [
    ("/own", "/shared", "/own"), (None, "/shared", "/shared/dynaconv"), (None, None, "HOME/.cache/dynaconv"),
])  # fmt: skip
def test_where_the_cache_is(monkeypatch, tmp_path, own, shared, expected):
    monkeypatch.setenv("HOME", str(tmp_path))
    for name, value in (("DYNACONV_CACHE", own), ("XDG_CACHE_HOME", shared)):
        monkeypatch.delenv(name, raising=False)
        if value:
            monkeypatch.setenv(name, value)
    assert str(cache_folder()) == expected.replace("HOME", str(tmp_path))
