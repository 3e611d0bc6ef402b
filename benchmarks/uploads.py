"""Sends mutated uploads to `dynaconv serve`: each must be answered or refused, quickly, and the memory must not grow.

Command: python benchmarks/uploads.py MODEL [COUNT]    (a run or an .onnx file; 20,000)
Needs: dynaconv[serve]. Takes: a few minutes on two cores. No data: pictures are made here, from fixed seeds.

Upload number n depends on (SEED, n) alone: a picture of one of seven kinds, sent as it is, in a form, or as base64 in
JSON; then bytes of the picture, of the body, of the headers or the stated length are changed. A case fails where the
answer is a 5xx, none at all to a whole request, or takes over 5 seconds.
"""

import asyncio
import base64
import io
import json
import random
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image
from record import write_result
from serving import Server, serving

SEED, COUNT, AT_ONCE = 0, 20_000, 16
SECONDS = 5.0
KINDS = ("PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF", "PPM")
TYPES = ("image/png", "application/octet-stream", "text/html", "", "image/\x00", "multipart/form-data", "x" * 3000)


def main() -> None:
    model = Path(sys.argv[1])
    count = int(sys.argv[2]) if len(sys.argv) > 2 else COUNT
    pictures = make_pictures()
    with serving(model) as server:
        await_all(server, pictures, range(count // 20))  # buffers grow to their size
        memory = [server.memory()]
        started = time.monotonic()
        statuses, failures, slowest = Counter[str](), dict[str, str](), 0.0
        for quarter in range(4):
            part = await_all(server, pictures, range(quarter * count // 4, (quarter + 1) * count // 4))
            statuses, failures, slowest = statuses + part[0], failures | part[1], max(slowest, part[2])
            memory.append(server.memory())
        seconds = time.monotonic() - started
    found = {
        "uploads": count,
        "statuses": dict(sorted(statuses.items())),
        "failures": failures,
        "slowest_seconds": slowest,
        "seconds": seconds,
        "bytes_by_quarter": memory,
    }
    print(found)
    print(write_result("uploads", found, [SEED]))


def make_pictures() -> list[tuple[str, bytes]]:
    """Returns a small picture of each kind, with its content type."""
    pixels = np.random.default_rng(SEED).integers(0, 256, (12, 16, 3), dtype=np.uint8)
    made: list[tuple[str, bytes]] = []
    for kind in KINDS:
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, kind)
        made.append((f"image/{kind.lower()}", buffer.getvalue()))
    return made


def await_all(
    server: Server, pictures: list[tuple[str, bytes]], numbers: range
) -> tuple[Counter[str], dict[str, str], float]:
    """Runs `send_all`."""
    return asyncio.run(send_all(server, pictures, numbers))


async def send_all(
    server: Server, pictures: list[tuple[str, bytes]], numbers: range
) -> tuple[Counter[str], dict[str, str], float]:
    """Sends uploads, some at once; returns how often each status came, what failed by number, the longest time."""
    statuses: Counter[str] = Counter()
    failures: dict[str, str] = {}
    slowest = 0.0
    waiting = iter(numbers)

    async def work() -> None:
        nonlocal slowest
        for number in waiting:
            request, is_whole = make_upload(pictures, number)
            started = time.monotonic()
            try:
                status = await asyncio.wait_for(send(server.port, request, is_whole), SECONDS)
            except TimeoutError:
                status = "hangs"
            slowest = max(slowest, time.monotonic() - started)
            statuses[status] += 1
            if status[0] == "5" or status == "hangs" or (status == "none" and is_whole):
                failures[str(number)] = status

    await asyncio.gather(*(work() for _ in range(AT_ONCE)))
    return statuses, failures, slowest


async def send(port: int, request: bytes, is_whole: bool) -> str:
    """Sends a request on a connection of its own; returns the status, "none" without an answer."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(request)
        if not is_whole:
            writer.write_eof()  # the rest will never come
        line = await reader.readline()
        await reader.read()
        return line[9:12].decode() or "none"
    except OSError:
        return "none"
    finally:
        writer.close()


def make_upload(pictures: list[tuple[str, bytes]], number: int) -> tuple[bytes, bool]:
    """Returns request number `number`, and whether its body is as long as it says."""
    chance = random.Random(f"{SEED}-{number}")  # noqa: S311 -- mutations, no secrets
    kind, content = chance.choice(pictures)
    target = chance.choice(("picture", "picture", "body", "type", "length", "head", "query"))
    if target == "picture":
        content = mutate(content, chance)
    form = chance.choice(("raw", "form", "json"))
    if form == "raw":
        body = content
    elif form == "json":
        kind, body = "application/json", json.dumps({"pictures": [base64.b64encode(content).decode()]}).encode()
    else:
        kind = "multipart/form-data; boundary=b"
        head = (
            b'--b\r\nContent-Disposition: form-data; name="pictures"; filename="a"\r\nContent-Type: image/png\r\n\r\n'
        )
        body = head + content + b"\r\n--b--\r\n"
    if target == "body":
        body = mutate(body, chance)
    if target == "type":
        kind = chance.choice(TYPES)
    length = len(body) + (chance.choice((-5, -1, 1, 5, 10**6, 10**9, 10**18)) if target == "length" else 0)
    query = chance.choice(("?top=0", "?top=x", "?top=99999999999999999999", "?detail=1", "?detail=%00", "?%ff"))
    path = "/v1/predict" + (query if target == "query" else "")
    lines = ("Host: x", "Connection: close", f"Content-Type: {kind}", f"Content-Length: {length}", "", "")
    start = "\r\n".join((f"POST {path} HTTP/1.1", *lines)).encode("latin-1")
    if target == "head":
        start = mutate(start, chance)
    return start + body, target not in ("length", "head")


def mutate(content: bytes, chance: random.Random) -> bytes:
    """Changes bits, cuts, doubles or overwrites a part."""
    changed = bytearray(content)
    for _ in range(chance.choice((1, 1, 2, 8))):
        place, size = chance.randrange(len(changed) + 1), chance.choice((1, 2, 4, 16, 64))
        match chance.randrange(5):
            case 0 if changed:
                changed[place % len(changed)] ^= 1 << chance.randrange(8)
            case 1:
                changed[place : place + size] = chance.randbytes(size)
            case 2:
                del changed[place : place + size]
            case 3:
                changed[place:place] = changed[place : place + size]
            case _:
                changed[place : place + size] = chance.choice((b"\x00", b"\xff", b"\x7f")) * size
    return bytes(changed)


if __name__ == "__main__":
    main()
