"""Feeds mutated files to every reader: each must refuse with one of the documented errors, or read something.

Commands: python benchmarks/fuzz.py [COUNT] [SUBJECT ...]    (COUNT mutations of each subject; 4000 and all of them)
Takes: about half an hour on two cores. No data: the files are made here, from fixed seeds.

Mutation number n of a subject depends on (SEED, subject, n) alone. A mutation changes bits, bytes, blocks or lengths
of the file, or of what is inside it: a member of an archive before it is packed, a chunk of a PNG before its checksum
is made, a value of a JSON document. A case fails where another error than this project's own comes out, the process
dies, takes over 5 seconds or 1 GB more memory, or where a file appears outside the reader's own folder. Some seeds
carry code (pickles that would write such a file); running it shows as that file.
"""

import gzip
import io
import json
import mmap
import os
import pickle
import random
import resource
import shutil
import signal
import struct
import sys
import tarfile
import tempfile
import time
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from safetensors.torch import save

from dynaconv.data.batches import Batches
from dynaconv.data.cache import load_prepared, save_prepared
from dynaconv.data.decoding import decode_picture
from dynaconv.data.exclusions import read_exclusions
from dynaconv.data.images import ImageSet
from dynaconv.data.sources import SourceOptions, load_images
from dynaconv.errors import DynaconvError
from dynaconv.judging.robustness import read_cifar10_1
from dynaconv.judging.trained import load_trained
from dynaconv.recipe import Recipe, with_settings
from dynaconv.recipe_json import load_recipe, to_json
from dynaconv.rundir import RunDir
from dynaconv.training.fit import fit
from dynaconv.training.start import build_model, training_batches
from dynaconv.training.state import State

SEED, COUNT = 0, 4000
SECONDS, BYTES = 5.0, 2**30
CPU = torch.device("cpu")
IMAGES = ImageSet(
    torch.randint(256, (20, 3, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8),
    torch.arange(20) % 2,
    ("cat", "dog"),
    "noise",
)
SMALL = with_settings(Recipe(), widths=(4,), num_convolutions=(2,), pool_after=(), batch_size=10, epochs=2)
ODD = (
    0,
    1,
    -1,
    2**31,
    2**32 - 1,
    2**63,
    -(2**63),
    10**30,
    1e308,
    float("nan"),
    True,
    None,
    "",
    "x" * 1000,
    [],
    {},
    [[]],
)
"""Values that a reader did not expect at this place of a JSON document."""

Mutate = Callable[[bytes, random.Random], bytes]
Change = Callable[[Mutate, random.Random], bytes]


@dataclass(frozen=True)
class Subject:
    """A reader and the files that it is fed.

    Attributes:
        seeds: For each, a function that makes its bytes, given how to mutate what is inside it.
        read: Reads the bytes of a file, in an empty folder of its own; raises what the reader raises.
    """

    seeds: tuple[Change, ...]
    read: Callable[[bytes, Path], object]


def main() -> None:
    from record import write_result

    words = sys.argv[1:]
    count = int(words.pop(0)) if words and words[0].isdigit() else COUNT
    subjects = make_subjects()
    outcomes: dict[str, Any] = {}
    for name in words or subjects:
        started = time.monotonic()
        outcomes[name] = attack(name, subjects[name], count)
        print(f"{name}: {outcomes[name]} in {time.monotonic() - started:.0f} s", flush=True)
    cases = sum(outcome["cases"] for outcome in outcomes.values())
    if not words:
        print(write_result("fuzz", {"cases": cases, "subjects": outcomes}, [SEED]))


def mutated(name: str, subject: Subject, number: int) -> bytes:
    """Returns mutation `number` of a subject; number 0 and on by one for each seed are the seeds themselves."""
    generator = random.Random(f"{SEED} {name} {number}")  # noqa: S311 -- nothing secret
    seed = subject.seeds[number % len(subject.seeds)]
    if number < len(subject.seeds):
        return seed(lambda content, _: content, generator)
    return seed(mutate, generator)


def mutate(content: bytes, generator: random.Random) -> bytes:
    """Changes bytes, blocks or lengths in one to four ways."""
    result = bytearray(content)
    for _ in range(generator.choice((1, 1, 2, 4))):
        if not result:
            return bytes(generator.randbytes(generator.randrange(64)))
        at = generator.randrange(len(result))
        size = generator.choice((1, 2, 4, 8, 64, 1024))
        match generator.randrange(7):
            case 0:
                result[at] ^= 1 << generator.randrange(8)
            case 1:
                result[at : at + size] = generator.randbytes(min(size, len(result) - at))
            case 2:
                extreme = generator.choice((b"\0", b"\xff", b"\x7f", b"\x80"))
                width = min(generator.choice((1, 2, 4, 8)), len(result) - at)
                result[at : at + width] = extreme * width
            case 3:
                del result[at : at + size]
            case 4:
                start = generator.randrange(len(result))
                result[at:at] = result[start : start + size]
            case 5:
                del result[at:]
            case _:
                result[at:at] = generator.randbytes(size)
    return bytes(result)


def mutate_json(document: Any, generator: random.Random) -> Any:
    """Returns a copy with one value replaced, removed or wrapped somewhere in it."""
    if isinstance(document, dict | list) and document and generator.random() < 0.9:
        copy = document.copy()
        key = generator.choice(list(copy)) if isinstance(copy, dict) else generator.randrange(len(copy))
        if generator.random() < 0.1:
            del copy[key]
        else:
            copy[key] = mutate_json(copy[key], generator)
        return copy
    choice = generator.random()
    if isinstance(document, int | float) and choice < 0.3:
        return document * generator.choice((-1, 0.5, 2, 1000, 10**9))
    return [document] if choice > 0.9 else generator.choice(ODD)


def plain(content: bytes) -> Change:
    """A file whose bytes are mutated as they are."""
    return lambda change, generator: change(content, generator)


def document(content: Any) -> Change:
    """A JSON document, mutated in its values and, more seldom, in its bytes."""

    def make(change: Mutate, generator: random.Random) -> bytes:
        if change(b"x", generator) == b"x":
            return json.dumps(content).encode()
        if generator.random() < 0.8:
            changed = content
            for _ in range(generator.choice((1, 2))):
                changed = mutate_json(changed, generator)
            return json.dumps(changed).encode()
        return change(json.dumps(content).encode(), generator)

    return make


def picture(form: str, mode: str = "RGB") -> Change:
    side = np.arange(12)
    pixels = (side[:, None, None] * side[None, :, None] * np.arange(1, 5) % 256).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels[:, :, :3]).convert(mode).save(buffer, form)
    return plain(buffer.getvalue())


def png_with_checksums() -> Change:
    """A PNG whose chunks are mutated before their checksums are made, so that what is in them is reached."""

    def make(change: Mutate, generator: random.Random) -> bytes:
        whole = picture("PNG")(lambda content, _: content, generator)
        chunks, at = [], 8
        while at < len(whole):
            (length,) = struct.unpack(">I", whole[at : at + 4])
            chunks.append((whole[at + 4 : at + 8], whole[at + 8 : at + 8 + length]))
            at += 12 + length
        place = generator.randrange(len(chunks))
        kind, content = chunks[place]
        if kind == b"IDAT" and generator.random() < 0.7:
            content = zlib.compress(change(zlib.decompress(content), generator))
        else:
            content = change(content, generator)
        chunks[place] = (kind, content)
        return whole[:8] + b"".join(
            struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
            for kind, content in chunks
        )

    return make


def png() -> bytes:
    return picture("PNG")(lambda content, _: content, random.Random(0))  # noqa: S311 -- nothing secret


class _Harmful:
    """Unpickling this writes a file: shows whether a reader runs what a file says."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch ../ran",)


def zipped(members: dict[str, bytes]) -> Change:
    """An npz whose members are mutated before they are packed, or whose zip is mutated itself."""

    def make(change: Mutate, generator: random.Random) -> bytes:
        inside = generator.random() < 0.6
        chosen = generator.choice(list(members))
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w", generator.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))) as archive:
            for name, content in members.items():
                archive.writestr(name, change(content, generator) if inside and name == chosen else content)
        return buffer.getvalue() if inside else change(buffer.getvalue(), generator)

    return make


def npy(array: np.ndarray, **more: Any) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, **more)
    return buffer.getvalue()


def tarred(members: dict[str, bytes]) -> Change:
    """A tar.gz whose members or headers are mutated before they are packed, or which is mutated itself."""

    def make(change: Mutate, generator: random.Random) -> bytes:
        where = generator.choice(("member", "member", "tar", "gz"))
        chosen = generator.choice(list(members))
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w") as archive:
            for name, content in members.items():
                content = change(content, generator) if where == "member" and name == chosen else content
                about = tarfile.TarInfo(f"cifar-10-batches/{name}")
                about.size = len(content)
                archive.addfile(about, io.BytesIO(content))
        content = buffer.getvalue()
        packed = gzip.compress(change(content, generator) if where == "tar" else content, 1, mtime=0)
        return change(packed, generator) if where == "gz" else packed

    return make


def pickled_archive() -> Change:
    classes = [f"class{number}" for number in range(10)]
    rows = np.zeros((4, 3072), np.uint8)
    batch = pickle.dumps({b"data": rows, b"labels": [0, 1, 2, 3], b"filenames": [b"a"] * 4}, protocol=2)
    names = [*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"]
    meta = pickle.dumps({b"label_names": [name.encode() for name in classes]}, protocol=2)
    return tarred({**dict.fromkeys(names, batch), "batches.meta": meta})


def parquet(table: pa.Table) -> Change:
    buffer = io.BytesIO()
    pq.write_table(table, buffer)
    return plain(buffer.getvalue())


def safetensors(tensors: dict[str, torch.Tensor], facts: dict[str, Any] | None = None) -> Change:
    """A file of tensors: bytes mutated, or its header, or the facts in its header."""
    whole = save(tensors, metadata={"facts": json.dumps(facts)} if facts is not None else None)
    (length,) = struct.unpack("<Q", whole[:8])
    header, rest = json.loads(whole[8 : 8 + length]), whole[8 + length :]

    def make(change: Mutate, generator: random.Random) -> bytes:
        choice = generator.random()
        if change(b"x", generator) == b"x":
            return whole
        if choice < 0.3:
            return change(whole, generator)
        changed = header
        if facts is not None and choice < 0.7:
            inner = json.dumps(mutate_json(facts, generator))
            changed = {**header, "__metadata__": {"facts": inner}}
        else:
            changed = mutate_json(header, generator)
        text = json.dumps(changed).encode()
        return struct.pack("<Q", len(text)) + text + rest

    return make


def make_state() -> State:
    kept: list[State] = []
    model = build_model(SMALL, IMAGES, CPU)
    fit(model, training_batches(SMALL, IMAGES), [], SMALL, CPU, keep=lambda take: kept.append(take()))
    return kept[3]


def read_source(name: str) -> Callable[[bytes, Path], object]:
    """Reads a source's file of that name, beside two pictures that a CSV may name."""

    def read(content: bytes, folder: Path) -> object:
        for number in range(2):
            (folder / f"{number}.png").write_bytes(png())
        (folder / name).write_bytes(content)
        return load_images(str(folder / name), "train", SourceOptions(offline=True))

    return read


def read_picture(content: bytes, folder: Path) -> object:
    return decode_picture(content, "picture", image_size=32, channels=3)


def read_prepared(content: bytes, folder: Path) -> object:
    os.environ["DYNACONV_CACHE"] = str(folder)
    (folder / "prepared").mkdir()
    (folder / "prepared" / f"{'0' * 32}.safetensors").write_bytes(content)
    return load_prepared("0" * 32, lambda notice: None)


def prepared_file() -> Change:
    with tempfile.TemporaryDirectory() as folder:
        before = os.environ.get("DYNACONV_CACHE")
        os.environ["DYNACONV_CACHE"] = folder
        save_prepared("0" * 32, IMAGES, ["a notice"], lambda notice: None)
        content = (Path(folder) / "prepared" / f"{'0' * 32}.safetensors").read_bytes()
        os.environ.pop("DYNACONV_CACHE")
        if before is not None:
            os.environ["DYNACONV_CACHE"] = before
    return plain(content)


def read_recipe(content: bytes, folder: Path) -> object:
    (folder / "recipe.json").write_bytes(content)
    return load_recipe(folder / "recipe.json")


def read_exclusion_list(content: bytes, folder: Path) -> object:
    (folder / "without.csv").write_bytes(content)
    return read_exclusions(folder / "without.csv", IMAGES)


def read_run(name: str) -> Callable[[bytes, Path], object]:
    """Reads a run, one file of which is mutated."""
    model = build_model(SMALL, IMAGES, CPU)
    about = make_about()

    def read(content: bytes, folder: Path) -> object:
        run = RunDir.create(folder / "run")
        run.write_recipe(SMALL)
        run.write_json("model.json", about)
        run.write_weights(model.state_dict())
        (run.path / name).write_bytes(content)
        if name == "metrics.jsonl":
            return run.read_metrics()
        return load_trained(run.path, CPU)

    return read


def make_about() -> dict[str, Any]:
    import dataclasses

    return {
        "architecture": dataclasses.asdict(SMALL.model),
        "classes": ["cat", "dog"],
        "channels": 3,
        "image_size": 8,
        "normalize_mean": 0.5,
        "normalize_std": 0.5,
    }


def read_state(content: bytes, folder: Path) -> object:
    """Goes on from a state whose name holds the right hash, as one from a stranger would."""
    import hashlib

    digest = hashlib.sha256(content).hexdigest()[:16]
    (folder / "state").mkdir()
    (folder / "state" / f"000002-00000001-{digest}.safetensors").write_bytes(content)
    stored = RunDir(folder).read_state(lambda notice: None)
    if stored is None:
        return None
    model = build_model(SMALL, IMAGES, CPU)
    validation = Batches(IMAGES, 20, SMALL.augment)
    return fit(model, training_batches(SMALL, IMAGES), validation, SMALL, CPU, begin=State(*stored))


def read_new_test_images(content: bytes, folder: Path) -> object:
    (folder / "cifar10.1_v6_labels.npy").write_bytes(npy(np.zeros(3, np.int64)))
    (folder / "cifar10.1_v6_data.npy").write_bytes(content)
    return list(read_cifar10_1(folder, count=3))


def make_subjects() -> dict[str, Subject]:
    state = make_state()
    weights = build_model(SMALL, IMAGES, CPU).state_dict()
    pixels, labels = npy(np.zeros((8, 8, 8, 3), np.uint8)), npy(np.arange(8) % 2)
    harmful = npy(np.array([_Harmful()] * 8, object), allow_pickle=True)
    table = pa.table({"img": [{"bytes": png(), "path": None}] * 8, "label": [0, 1] * 4})
    lines = b"path,label\n" + b"0.png,cat\n1.png,dog\n" * 4
    recipe = json.loads(to_json(SMALL))
    metrics = {"epoch": 1, "training_loss": 1.0, "validation_loss": None}
    without = b"index,path,label\n" + b"".join(b"%d,,cat\n" % number for number in range(5))
    forms = [picture(form) for form in ("PNG", "JPEG", "WEBP", "BMP")] + [picture("GIF", "P"), picture("PNG", "LA")]
    return {
        "pictures": Subject((*forms, png_with_checksums(), png_with_checksums()), read_picture),
        "parquet": Subject((parquet(table),), read_source("a.parquet")),
        "csv": Subject((plain(lines),), read_source("a.csv")),
        "npz": Subject(
            (
                zipped({"images.npy": pixels, "labels.npy": labels}),
                zipped({"images.npy": pixels, "labels.npy": harmful}),
            ),
            read_source("a.npz"),
        ),
        "archive": Subject(
            (pickled_archive(), tarred({"data_batch_1": pickle.dumps(_Harmful()), "batches.meta": b""})),
            read_source("cifar-10-python.tar.gz"),
        ),
        "weights": Subject((safetensors(weights),), read_run("model.safetensors")),
        "model": Subject((document(make_about()),), read_run("model.json")),
        "recipe": Subject((document(recipe),), read_recipe),
        "metrics": Subject((document(metrics),), read_run("metrics.jsonl")),
        "state": Subject((safetensors(state.tensors, state.facts),), read_state),
        "prepared": Subject((prepared_file(),), read_prepared),
        "exclusions": Subject((plain(without),), read_exclusion_list),
        "npy": Subject((plain(npy(np.zeros((3, 32, 32, 3), np.uint8))), plain(harmful)), read_new_test_images),
    }


def attack(name: str, subject: Subject, count: int) -> dict[str, Any]:
    """Runs all mutations in processes of their own, started anew after one that died or hung."""
    shared = mmap.mmap(-1, 24)  # the case at work, those read, those refused
    failures: dict[str, list[int]] = {}
    begin = 0
    with tempfile.TemporaryDirectory() as folder:
        while begin < count:
            process = os.fork()
            if not process:
                try:
                    _work(name, subject, range(begin, count), Path(folder), shared)
                finally:
                    os._exit(70)
            reason = _watch(process, shared)
            at = struct.unpack("q", shared[:8])[0]
            if reason is None:
                break
            failures.setdefault(reason, []).append(at)
            begin = at + 1
        log = Path(folder) / "failures.jsonl"
        for line in log.read_text().splitlines() if log.exists() else []:
            number, reason = json.loads(line)
            failures.setdefault(reason, []).append(number)
    read, refused = struct.unpack("qq", shared[8:])
    return {
        "cases": count,
        "read": read,
        "refused": refused,
        "failed": {reason: {"cases": len(found), "first": min(found)} for reason, found in failures.items()},
    }


def _watch(process: int, shared: mmap.mmap) -> str | None:
    """Waits for a worker; returns why it ended early, or None. Kills it where a case takes too long."""
    last, since = -1, time.monotonic()
    while True:
        ended, status = os.waitpid(process, os.WNOHANG)
        if ended:
            code = os.waitstatus_to_exitcode(status)
            return None if code == 0 else f"the process ended with {code}"
        at = struct.unpack("q", shared[:8])[0]
        if at != last:
            last, since = at, time.monotonic()
        elif time.monotonic() - since > SECONDS:
            os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)
            return f"took over {SECONDS:.0f} s"
        time.sleep(0.02)


def _work(name: str, subject: Subject, numbers: range, folder: Path, shared: mmap.mmap) -> None:
    torch.set_num_threads(1)
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)
    os.dup2(silence, 2)
    place = folder / "place"
    for number in numbers:
        shared[:8] = struct.pack("q", number)
        problem = try_case(subject, mutated(name, subject, number), place)
        if problem is not None and problem != "refused":
            with (folder / "failures.jsonl").open("a") as log:
                log.write(json.dumps([number, problem]) + "\n")
        counts = list(struct.unpack("qq", shared[8:]))
        counts[problem == "refused"] += problem in (None, "refused")
        shared[8:] = struct.pack("qq", *counts)
    os._exit(0)


def try_case(subject: Subject, content: bytes, place: Path) -> str | None:
    """Feeds one file to its reader, in the folder `place`; returns None if it was read, "refused", or what is wrong."""
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    os.environ.setdefault("DYNACONV_CACHE", str(place / "cache"))
    around = {path.name for path in place.parent.iterdir()}
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    outcome = None
    os.chdir(place)
    try:
        subject.read(content, place)
    except DynaconvError as error:
        outcome = "refused" if str(error).strip() else "an empty message"
    except BaseException as error:
        outcome = f"{type(error).__name__}: {str(error).splitlines()[0][:80] if str(error) else ''}"
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    if grown > BYTES:
        return "took over 1 GB of memory"
    appeared = {path.name for path in place.parent.iterdir()} - around - {"failures.jsonl"}
    return f"wrote {sorted(appeared)}" if appeared else outcome


if __name__ == "__main__":
    main()
