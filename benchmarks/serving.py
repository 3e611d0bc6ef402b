"""Loads `dynaconv serve` over 64 connections: rate, latency, memory, overload, and an end in the middle of it.

Command: python benchmarks/serving.py MODEL [SECONDS]    (a run or an .onnx file; 300 seconds of load for the memory)
Needs: dynaconv[serve]. Takes: SECONDS and about two minutes more. No data: pictures are made here, from a fixed seed.

The client shares the processor with the server. It sends one request after the other on each connection that is kept
open; at a given rate, each request has its time, and its latency counts from there, also if no connection was free.
"""

import asyncio
import contextlib
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from record import write_result

CONNECTIONS, OVERLOAD = 64, 640
SHORT, LONG = 10.0, 300.0
SHARE = 0.8
"""Of the highest rate, at which the latency is measured."""


def main() -> None:
    model = Path(sys.argv[1])
    seconds = float(sys.argv[2]) if len(sys.argv) > 2 else LONG
    requests = make_requests()
    found: dict[str, Any] = {}
    for name, words in (("one by one", ["--max-batch", "1"]), ("batched", [])):
        with serving(model, *words) as server:
            asyncio.run(load(server.port, requests, CONNECTIONS, 2.0))
            found[name] = asyncio.run(load(server.port, requests, CONNECTIONS, SHORT)).summary()
            print(name, found[name], flush=True)
    rate = found["batched"]["answers_per_second"]
    found["batching_gain"] = rate / found["one by one"]["answers_per_second"]
    with serving(model) as server:
        asyncio.run(load(server.port, requests, CONNECTIONS, 5.0))
        before = server.memory()
        parts = [asyncio.run(load(server.port, requests, CONNECTIONS, seconds / 3)) for _ in range(3)]
        middle = [part.summary() for part in parts]
        found["long"] = {"seconds": seconds, "parts": middle, "bytes_before": before, "bytes_after": server.memory()}
        print("long", found["long"], flush=True)
        found["at_80_percent"] = asyncio.run(load(server.port, requests, CONNECTIONS, SHORT, SHARE * rate)).summary()
        print("80%", found["at_80_percent"], flush=True)
        found["overload"] = asyncio.run(load(server.port, requests, OVERLOAD, SHORT)).summary()
        print("overload", found["overload"], flush=True)
        found["recovery_seconds"] = recover(server.port, requests[0])
        print("recovery", found["recovery_seconds"], flush=True)
    found["end"] = end_in_the_middle(model, requests)
    print("end", found["end"], flush=True)
    name = "serving" if model.suffix == ".onnx" else "serving-torch"
    print(write_result(name, {"model": "onnx" if model.suffix == ".onnx" else "run", **found}, [0]))


@dataclass
class Server:
    """A server in a process of its own."""

    process: subprocess.Popen[bytes]
    port: int
    log: Path

    def memory(self) -> int:
        """Resident bytes."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.search(r"VmRSS:\s+(\d+)", status)[1]) * 1024  # pyright: ignore[reportOptionalSubscript]


@contextlib.contextmanager
def serving(model: Path, *words: str) -> Iterator[Server]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder, (Path(folder) / "log").open("wb") as log:
        command = [sys.executable, "-m", "dynaconv", "serve", str(model), "--port", str(port), *words]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=log)
        try:
            until = time.monotonic() + 60
            while time.monotonic() < until:
                with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/readyz"):
                    break
                time.sleep(0.1)
            yield Server(process, port, Path(folder) / "log")
        finally:
            process.terminate()
            process.wait(60)


def make_requests() -> list[bytes]:
    """Sixteen requests with a picture each: smooth, so that they are as large as photographs; PNG and JPEG."""
    generator = np.random.default_rng(0)
    requests: list[bytes] = []
    for place in range(16):
        small = Image.fromarray(generator.integers(0, 256, (6, 6, 3), dtype=np.uint8))
        form, size = ("PNG", (32, 32)) if place % 4 else ("JPEG", (300, 200))
        buffer = io.BytesIO()
        small.resize(size, Image.Resampling.BICUBIC).save(buffer, form)
        body = buffer.getvalue()
        head = f"POST /v1/predict HTTP/1.1\r\nHost: x\r\nContent-Type: image/{form.lower()}\r\n"
        requests.append(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
    return requests


@dataclass
class Load:
    """What came of a load."""

    seconds: float
    statuses: Counter[str] = field(default_factory=Counter[str])
    latencies: dict[str, list[float]] = field(default_factory=dict[str, list[float]])

    def add(self, status: str, latency: float) -> None:
        """Counts an answer, or "broken" for none, and its seconds."""
        self.statuses[status] += 1
        self.latencies.setdefault(status, []).append(latency)

    def summary(self) -> dict[str, Any]:
        """Returns the rate of good answers, and for each status its count and milliseconds."""
        spread = {
            status: {f"p{share}": float(np.percentile(values, share)) * 1e3 for share in (50, 99)}
            for status, values in self.latencies.items()
        }
        rate = self.statuses["200"] / self.seconds
        return {"answers_per_second": rate, "statuses": dict(self.statuses), "milliseconds": spread}


async def load(port: int, requests: list[bytes], connections: int, seconds: float, rate: float | None = None) -> Load:
    """Loads for a time: as fast as answers come, or at a rate."""
    found = Load(seconds)
    start = time.monotonic()
    turns = iter(range(sys.maxsize))

    async def work(place: int) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        while (now := time.monotonic()) < start + seconds:
            turn = next(turns)
            if rate is not None:
                due = start + turn / rate
                if due >= start + seconds:
                    break
                await asyncio.sleep(max(0.0, due - now))
                now = due
            try:
                status = await ask(reader, writer, requests[(turn + place) % len(requests)])
            except (OSError, EOFError):
                found.add("broken", time.monotonic() - now)
                reader, writer = await asyncio.open_connection("127.0.0.1", port)
                continue
            found.add(status, time.monotonic() - now)
            if status == "503":  # a client that is told to come later comes later, if only a little
                await asyncio.sleep(0.05)
        writer.close()

    await asyncio.gather(*(work(place) for place in range(connections)))
    return found


async def ask(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, request: bytes) -> str:
    """Sends a request and reads its answer; returns the status."""
    writer.write(request)
    head = await reader.readuntil(b"\r\n\r\n")
    length = re.search(rb"content-length: (\d+)", head, re.IGNORECASE)
    if length is None:
        raise EOFError
    await reader.readexactly(int(length[1]))
    return head[9:12].decode()


def recover(port: int, request: bytes) -> float:
    """Seconds until ten requests in a row are answered, each within 0.1 seconds."""
    started = time.monotonic()
    good = 0
    while good < 10:
        found = asyncio.run(load_one(port, request))
        good = good + 1 if found < 0.1 else 0
    return time.monotonic() - started


async def load_one(port: int, request: bytes) -> float:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    started = time.monotonic()
    status = await ask(reader, writer, request)
    writer.close()
    return time.monotonic() - started if status == "200" else float("inf")


def end_in_the_middle(model: Path, requests: list[bytes]) -> dict[str, Any]:
    """Sends SIGTERM while all connections wait for an answer; tells what became of what was asked before it."""
    asked: Counter[str] = Counter()
    with serving(model) as server:

        async def work(stop_at: float) -> None:
            reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
            with contextlib.suppress(OSError):
                while True:
                    before = time.monotonic() < stop_at - 0.02  # later ones may cross the end on their way
                    try:
                        status = await ask(reader, writer, requests[0])
                    except (OSError, EOFError):
                        asked["before, not answered" if before else "at the end, not answered"] += 1
                        return
                    asked[f"{'before' if before else 'at the end'}, {status}"] += 1

        async def run() -> None:
            stop_at = time.monotonic() + 3
            loads = [asyncio.create_task(work(stop_at)) for _ in range(CONNECTIONS)]
            await asyncio.sleep(3)
            os.kill(server.process.pid, signal.SIGTERM)
            await asyncio.gather(*loads)

        asyncio.run(run())
        code = server.process.wait(60)
        told = Counter(
            json.loads(line)["status"] for line in server.log.read_text().splitlines() if "/v1/predict" in line
        )
    return {
        "asked": dict(asked),
        "logged_by_the_server": {str(key): value for key, value in told.items()},
        "exit": code,
    }


if __name__ == "__main__":
    main()
