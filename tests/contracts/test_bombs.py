"""Files made to exhaust their reader: each is refused, or read, within two seconds and a bounded memory."""

import gzip
import io
import json
import os
import resource
import struct
import tarfile
import time
import zipfile
import zlib

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from dynaconv.data.decoding import decode_picture
from dynaconv.data.exclusions import read_exclusions
from dynaconv.data.images import ImageSet
from dynaconv.data.sources import SourceOptions, load_images
from dynaconv.errors import UserError
from dynaconv.judging.trained import load_trained
from dynaconv.recipe import Recipe
from dynaconv.recipe_json import load_recipe
from dynaconv.rundir import RunDir

SECONDS, BYTES = 2.0, 2**30


def png(width, height):
    """A PNG whose header claims this size."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(bytes(10_000)))
        + chunk(b"IEND", b"")
    )


def read(path):
    return load_images(str(path), "train", SourceOptions(offline=True))


def huge_picture(folder):
    decode_picture(png(100_000, 100_000), "picture")


def huge_picture_in_a_folder(folder):
    for name, content in (("cat", png(100_000, 100_000)), ("dog", png(8, 8))):
        (folder / name).mkdir()
        (folder / name / "1.png").write_bytes(content)
    read(folder)


def picture_of_many_chunks(folder):
    whole = png(8, 8)
    text = struct.pack(">I", 4) + b"tEXta\0bc" + struct.pack(">I", zlib.crc32(b"tEXta\0bc"))
    decode_picture(whole[:33] + text * 40_000 + whole[33:], "picture")
    raise UserError("read, in bounded time")


def compressed_text_in_a_picture(folder):
    whole = png(8, 8)
    body = b"zTXta\0\0" + zlib.compress(bytes(50 * 2**20))
    text = struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))
    decode_picture(whole[:33] + text + whole[33:], "picture")


def zip_of_zeros(folder):
    """An npz whose directory claims 12 GiB, as that of a real bomb would."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in ("images.npy", "labels.npy", "classes.npy"):
            archive.writestr(name, bytes(2**20))
    content = bytearray(buffer.getvalue())
    place = content.find(b"PK\x01\x02")
    while place >= 0:
        content[place + 24 : place + 28] = struct.pack("<I", 2**32 - 2)
        place = content.find(b"PK\x01\x02", place + 1)
    (folder / "a.npz").write_bytes(content)
    read(folder / "a.npz")


def array_that_claims_too_much(folder):
    text = "{'descr': '|u1', 'fortran_order': False, 'shape': (10000000, 32, 32, 3), }"
    text += " " * (128 - 11 - len(text)) + "\n"
    with zipfile.ZipFile(folder / "a.npz", "w") as archive:
        archive.writestr("images.npy", b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text.encode())
        archive.writestr("labels.npy", b"")
    read(folder / "a.npz")


def archive_of_zeros(folder):
    """A tar.gz in which a member that nobody wants claims a terabyte, a gigabyte of which is there."""
    about = tarfile.TarInfo("cifar-10-batches-py/readme.html")
    about.size = 2**40
    zeros = gzip.compress(bytes(64 * 2**20), 1)
    content = gzip.compress(about.tobuf(tarfile.PAX_FORMAT)) + zeros * 16  # gzip files may be put behind each other
    (folder / "cifar-10-python.tar.gz").write_bytes(content)
    read(folder / "cifar-10-python.tar.gz")


def parquet_of_a_billion_rows(folder):
    buffer = io.BytesIO()
    pq.write_table(pa.table({"img": [b"x"] * 100, "label": [0] * 100}), buffer)
    content = buffer.getvalue()
    # The footer's third field is the number of rows, a zigzag varint: 100 is c8 01, and a billion takes five bytes.
    (length,) = struct.unpack("<I", content[-8:-4])
    start = len(content) - 8 - length
    footer = content[start:-8]
    place = footer.index(b"\x16\xc8\x01", footer.index(b"label"))
    footer = footer[:place] + b"\x16\x80\xa8\xd6\xb9\x07" + footer[place + 3 :]
    (folder / "a.parquet").write_bytes(content[:start] + footer + struct.pack("<I", len(footer)) + b"PAR1")
    assert pq.ParquetFile(folder / "a.parquet").metadata.num_rows == 10**9
    read(folder / "a.parquet")


def run_with(name, content):
    def feed(folder):
        run = RunDir.create(folder / "run")
        run.write_recipe(Recipe())
        (run.path / name).write_bytes(content)
        if name == "metrics.jsonl":
            run.read_metrics()
        load_trained(run.path, torch.device("cpu"))

    return feed


def weights_of_a_huge_header(folder):
    RunDir(folder).path.joinpath("model.safetensors").write_bytes(struct.pack("<Q", 2**32) + b"{" * 1000)
    RunDir(folder).read_weights()


def weights_that_claim_too_much(folder):
    header = json.dumps({"a": {"dtype": "F32", "shape": [2**31, 2**10], "data_offsets": [0, 2**43]}}).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    RunDir(folder).read_weights()


def deep_json(folder):
    (folder / "recipe.json").write_text("[" * 100_000)
    load_recipe(folder / "recipe.json")


def huge_network(folder):
    settings = {"widths": [10**6] * 3, "num_convolutions": [10**4], "pool_after": []}
    run_with(
        "model.json",
        json.dumps({"architecture": settings, "classes": ["a", "b"], "channels": 3, "image_size": 32}).encode(),
    )(folder)


def many_entries(folder):
    for name in ("cat", "dog"):
        (folder / name).mkdir()
    for number in range(5_000):
        (folder / "cat" / f"{number}.txt").touch()
    (folder / "cat" / "1.png").write_bytes(png(8, 8))
    Image.new("RGB", (8, 8)).save(folder / "dog" / "1.png")
    started = time.process_time()
    try:
        read(folder)
    finally:
        assert time.process_time() - started < SECONDS


def link_loop(folder):
    for name in ("cat", "dog"):
        (folder / name).mkdir()
        (folder / name / "loop").symlink_to(folder)
        (folder / name / "itself").symlink_to(folder / name / "itself")
        for number in range(5):
            Image.new("RGB", (8, 8)).save(folder / name / f"{number}.png")
    assert len(read(folder)) == 8  # and a fifth is kept apart
    raise UserError("read, and every picture once")


def pipe(name):
    def feed(folder):
        os.mkfifo(folder / name)
        read(folder / name)

    return feed


def pipe_among_pictures(folder):
    for name in ("cat", "dog"):
        (folder / name).mkdir()
        os.mkfifo(folder / name / "1.png")
    read(folder)


def device_in_a_csv(folder):
    (folder / "a.csv").write_text("path,label\n/dev/zero,cat\n/dev/zero,dog\n")
    read(folder / "a.csv")


def pipe_in_a_run(folder):
    run = RunDir.create(folder / "run")
    os.mkfifo(run.path / "recipe.json")
    load_trained(run.path, torch.device("cpu"))


def pipe_for_a_recipe(folder):
    os.mkfifo(folder / "recipe.json")
    load_recipe(folder / "recipe.json")


def pipe_for_exclusions(folder):
    os.mkfifo(folder / "without.csv")
    read_exclusions(
        folder / "without.csv",
        ImageSet(torch.zeros(2, 1, 8, 8, dtype=torch.uint8), torch.arange(2), ("a", "b"), "zeros"),
    )


BOMBS = [
    huge_picture,
    huge_picture_in_a_folder,
    picture_of_many_chunks,
    compressed_text_in_a_picture,
    zip_of_zeros,
    array_that_claims_too_much,
    archive_of_zeros,
    parquet_of_a_billion_rows,
    weights_of_a_huge_header,
    weights_that_claim_too_much,
    deep_json,
    huge_network,
    many_entries,
    link_loop,
    pipe_among_pictures,
    device_in_a_csv,
    pipe_in_a_run,
    pipe_for_a_recipe,
    pipe_for_exclusions,
]
NAMED = {bomb.__name__: bomb for bomb in BOMBS} | {
    "pipe_for_a_csv": pipe("a.csv"),
    "pipe_for_an_npz": pipe("a.npz"),
    "pipe_for_a_parquet": pipe("a.parquet"),
    "deep_json_in_model": run_with("model.json", b"[" * 100_000),
    "deep_json_in_metrics": run_with("metrics.jsonl", b"[" * 100_000),
    "huge_number": run_with("model.json", b"9" * 1_000_000),
}


@pytest.mark.parametrize("name", NAMED)
def test_bomb(name, tmp_path, monkeypatch):
    monkeypatch.setenv("DYNACONV_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "bomb"
    folder.mkdir()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.process_time()
    with pytest.raises(UserError):
        NAMED[name](folder)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    assert grown < BYTES
    # Processor time, so that other work on the machine does not count; what makes the bomb does.
    assert time.process_time() - started < (SECONDS if name != "many_entries" else 10)
