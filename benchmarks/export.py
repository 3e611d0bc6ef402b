"""Exports a run's classifier in every form and writes what their certificates say, on the test images.

Command: python benchmarks/export.py RUN
Needs: DYNACONV_DATA, dynaconv[export,serve]. Takes: six minutes on two cores. Counts five looks at the test images in
the run: give it a copy. Also sends pictures of every kind through Python, through `dynaconv predict` and over HTTP
through `dynaconv serve`, with the run and with the file, and times `dynaconv predict FILE` in a fresh process.
"""

import dataclasses
import http.client
import io
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from record import write_result
from serving import serving

from dynaconv.data.sources import SourceOptions, load_images
from dynaconv.errors import WorkError
from dynaconv.shipping.classifier import Classifier
from dynaconv.shipping.export import ExportOptions, export_run

FORMS = {
    "onnx": ExportOptions(),
    "onnx int8": ExportOptions(int8=True),
    "onnx folded": ExportOptions(fold=True),
    "onnx folded int8": ExportOptions(fold=True, int8=True),
    "torch.export": ExportOptions(form="pt2"),
}
STARTS = 5
LEFT_OUT = ("sample", "places", "format", "file")


def main() -> None:
    run = Path(sys.argv[1])
    found = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for form, options in FORMS.items():
            into = folder / f"{form.replace(' ', '-')}.{options.form}"
            # Any drop is let through: what falls short is to be seen here.
            try:
                certificate = export_run(run, dataclasses.replace(options, into=into, max_drop=1, split="test"))
            except WorkError as refusal:  # of a folded file: mixing is worth something
                found[form] = {"refused": str(refusal)}
                continue
            found[form] = {key: value for key, value in certificate.items() if key not in LEFT_OUT}
        paths = write_pictures(folder)
        parity = compare_ways(run, folder / "onnx.onnx", paths)
        seconds = [start(folder / "onnx.onnx", paths["jpeg"]) for _ in range(STARTS)]
    for kind, difference in parity.items():
        print(f"{kind:<12} {difference:.1e}")
    starts = {"median": statistics.median(seconds), "values": seconds}
    print(write_result("export", {**found, "parity": parity, "predict_start_seconds": starts}))


def write_pictures(folder: Path) -> dict[str, Path]:
    """Writes one real picture in every kind that cameras and programs make."""
    pixels = load_images("cifar10", "test", SourceOptions()).images[1].permute(1, 2, 0).numpy()
    colour = Image.fromarray(pixels).resize((160, 120), Image.Resampling.BICUBIC)
    turned = Image.Exif()
    turned[0x0112] = 6
    wide = (np.asarray(colour.convert("L")).astype(np.uint16) * 257).astype(np.uint16)
    faded = colour.convert("RGBA")
    faded.putalpha(Image.linear_gradient("L").resize(colour.size))
    kinds: dict[str, tuple[Image.Image, str, dict[str, Any]]] = {
        "jpeg": (colour, "JPEG", {}),
        "png": (colour, "PNG", {}),
        "webp": (colour, "WEBP", {}),
        "gif": (colour.quantize(64), "GIF", {}),
        "bmp": (colour, "BMP", {}),
        "grey": (colour.convert("L"), "PNG", {}),
        "alpha": (faded, "PNG", {}),
        "palette": (colour.quantize(16), "PNG", {}),
        "16-bit": (Image.fromarray(wide), "PNG", {}),
        "rotated": (colour, "JPEG", {"exif": turned}),
        "1x1": (colour.resize((1, 1)), "PNG", {}),
        "4000x3000": (colour.resize((4000, 3000)), "JPEG", {}),
    }
    paths = {}
    for kind, (image, form, more) in kinds.items():
        buffer = io.BytesIO()
        image.save(buffer, form, **more)
        paths[kind] = folder / f"{kind}.{form.lower()}"
        paths[kind].write_bytes(buffer.getvalue())
    return paths


def compare_ways(run: Path, model: Path, paths: dict[str, Path]) -> dict[str, float]:
    """Largest difference of a probability between Python, `predict` and HTTP, the latter two by both, for each kind."""
    ways = [np.array([each.probabilities for each in Classifier.load(run).predict_all(list(paths.values()))])]
    classes = Classifier.load(run).classes
    for each in (run, model):
        words = ["predict", str(each), *map(str, paths.values()), "--top", str(len(classes)), "--json"]
        done = subprocess.run([sys.executable, "-m", "dynaconv", *words], check=True, capture_output=True, text=True)
        ways.append(_by_class(json.loads(done.stdout), classes))
        with serving(each) as server:
            ways.append(_by_class([ask(server.port, path, len(classes)) for path in paths.values()], classes))
    return dict(zip(paths, np.ptp(np.stack(ways), axis=0).max(1).tolist(), strict=True))


def ask(port: int, picture: Path, top: int) -> dict[str, Any]:
    """Returns what the server at a port says about a picture."""
    connection = http.client.HTTPConnection("127.0.0.1", port)
    connection.request(
        "POST", f"/v1/predict?top={top}", picture.read_bytes(), {"Content-Type": "application/octet-stream"}
    )
    with connection.getresponse() as answer:
        return json.load(answer)["predictions"][0]


def _by_class(told: list[dict[str, Any]], classes: Sequence[str]) -> NDArray[np.float64]:
    found = [{one["label"]: one["probability"] for one in picture["top"]} for picture in told]
    return np.array([[picture[name] for name in classes] for picture in found])


def start(model: Path, picture: Path) -> float:
    """Seconds from a fresh process to its answer."""
    started = time.perf_counter()
    command = [sys.executable, "-m", "dynaconv", "predict", str(model), str(picture)]
    subprocess.run(command, check=True, capture_output=True)
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
