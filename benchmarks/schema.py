"""Tests `dynaconv serve` against the OpenAPI document that it gives out, by schemathesis.

Command: python benchmarks/schema.py MODEL    (a run or an .onnx file)
Needs: dynaconv[serve], and schemathesis where `SCHEMATHESIS` says how to run it (by default `schemathesis`). It is no
dependency of this project: nothing else needs it, and it asks for thirty packages. Takes: a minute. No data.

All of its checks but one: that a request which fits the document is accepted. A document cannot say which bytes are a
picture, so that nearly all of its requests are rightly refused.
"""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

from record import write_result
from serving import serving

EXAMPLES, SEED = 1000, 0
LEFT_OUT = "positive_data_acceptance"


def main() -> None:
    command = shlex.split(os.environ.get("SCHEMATHESIS", "schemathesis"))
    options = ["--checks", "all", "--exclude-checks", LEFT_OUT, "--max-examples", str(EXAMPLES), "--seed", str(SEED)]
    with serving(Path(sys.argv[1])) as server:
        document = f"http://127.0.0.1:{server.port}/openapi.json"
        done = subprocess.run([*command, "run", document, *options], capture_output=True, text=True)
    print(done.stdout)
    version = re.search(r"Schemathesis v(\S+)", done.stdout)
    generated = re.search(r"Test cases:\s*(\d+) generated", done.stdout)
    if version is None or generated is None:
        raise SystemExit(f"schemathesis did not run: {done.stderr}")
    unique = re.search(r"found (\d+) unique", done.stdout)
    found = {
        "schemathesis": version[1],
        "checks_left_out": [LEFT_OUT],
        "requests": int(generated[1]),
        "failures": int(unique[1]) if unique else 0,
        "exit": done.returncode,
    }
    print(write_result("schema", found, [SEED]))


if __name__ == "__main__":
    main()
