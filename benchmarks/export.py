"""Exports a run's classifier in every form and writes what their certificates say, on the test images.

Command: python benchmarks/export.py RUN
Needs: DYNACONV_DATA, dynaconv[export]. Takes: three minutes on two cores. Counts three looks at the test images in the
run. Also times `dynaconv predict` in a fresh process, from the ONNX file.
"""

import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image
from record import write_result

from dynaconv.shipping.export import ExportOptions, export_run

FORMS = {"onnx": ExportOptions(), "onnx int8": ExportOptions(int8=True), "torch.export": ExportOptions(form="pt2")}
STARTS = 5
LEFT_OUT = ("sample", "machine", "format")


def main() -> None:
    run = Path(sys.argv[1])
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, options in FORMS.items():
            into = Path(folder) / f"{name.replace(' ', '-')}.{options.form}"
            changed = ExportOptions(options.form, options.int8, into, options.max_drop, "test")
            certificate = export_run(run, changed)
            found[name] = {key: value for key, value in certificate.items() if key not in (*LEFT_OUT, "file")}
        picture = Path(folder) / "picture.png"
        pixels = np.random.default_rng(0).integers(0, 256, (240, 320, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(picture)
        seconds = [start(Path(folder) / "onnx.onnx", picture) for _ in range(STARTS)]
    print(
        write_result(
            "export", {**found, "predict_start_seconds": {"median": statistics.median(seconds), "values": seconds}}
        )
    )


def start(model: Path, picture: Path) -> float:
    """Seconds from a fresh process to its answer."""
    started = time.perf_counter()
    command = [sys.executable, "-m", "dynaconv", "predict", str(model), str(picture)]
    subprocess.run(command, check=True, capture_output=True)
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
