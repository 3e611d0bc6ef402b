"""Makes .venv and installs dynaconv in it, with or without a network: `python3 scripts/setup.py [--dev]`.

Three ways are tried in turn, and the first that succeeds is taken:

1. the wheel folder in the user's cache, which a set-up with a network filled: the fastest, and enough for every
   further clone;
2. the network: fetches into that folder what constraints.txt pins, then goes the first way;
3. the packages of the Python that runs this script, and the wheel folder for what that Python lacks: for a machine
   that comes with its own torch and has no network.

Standard library only: this is what runs before anything is installed.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from typing import Any

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
CONSTRAINTS = ROOT / "constraints.txt"
OLDEST_PYTHON = (3, 11)

UNFINISHED = VENV / "unfinished"
"""Stands while .venv is worked on; one that is still there was left by a set-up that was killed."""
BORROWED = VENV / "borrowed"
"""Stands in a .venv that uses packages of the Python it was made with (the third way)."""

LAZY = "--no-compile"
"""For installing: Python compiles what is imported, when it is; all of torch beforehand took 55 of 75 seconds."""

IMPATIENT = ("--retries", "1", "--timeout", "15")
"""For the network: where it is cut this is noticed in seconds; pip's own settings would wait for minutes."""


class SetupError(Exception):
    """No way led to an installation; the text is for the user."""


class PipError(Exception):
    """pip, or another command of a stage, failed; the text is all that it printed."""


# ---- Decisions: what is asked for, and what pip's words mean -------------------------------------------------------


def wheel_folder(environment: Mapping[str, str], home: Path) -> Path:
    """The folder that keeps the wheels from one clone to the next."""
    if environment.get("DYNACONV_CACHE"):
        return Path(environment["DYNACONV_CACHE"]) / "wheels"
    cache = environment.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else home / ".cache") / "dynaconv" / "wheels"


def pins(constraints: str) -> dict[str, str]:
    """The version of every package that a constraints file pins, by its name."""
    return dict(re.findall(r"^([\w.-]+)==([^\s#]+)", constraints, re.MULTILINE))


def requirements(project: Mapping[str, Any], extras: Sequence[str]) -> list[str]:
    """What a project table asks for with these extras; an extra that names the project itself stands for its extras."""
    wanted = list(project["dependencies"])
    itself = re.compile(re.escape(project["name"]) + r"\[(.+)\]$")
    for extra in extras:
        for line in project["optional-dependencies"][extra]:
            own = itself.match(line)
            wanted += requirements({**project, "dependencies": []}, own[1].split(",")) if own else [line]
    return wanted


def network_is_cut(output: str) -> bool:
    """Whether pip's words say that nothing outside could be reached."""
    words = "connection broken|name resolution|new connection|unreachable|connect timeout|ProxyError"
    return re.search(words, output, re.IGNORECASE) is not None


def network_is_slow(output: str) -> bool:
    """Whether pip's words say that somebody answered the call and then took too long."""
    return "read timeout=" in output.lower()


def lacking(output: str) -> str:
    """The requirement that pip could not meet, or an empty text."""
    found = re.search(r"No matching distribution found for (\S+)", output)
    return found[1] if found else ""


def identity(root: Path, version: tuple[int, ...]) -> str:
    """What a .venv holds for good: its scripts name the folder, its packages are built for one Python."""
    return f"{root}\nPython {version[0]}.{version[1]}\n"


def can_be_kept(venv: Path, wanted: str) -> bool:
    """Whether a .venv is whole and of this identity; any other is made anew."""
    stamp = venv / "runtime.stamp"
    if (venv / UNFINISHED.name).exists() or not stamp.exists() or not (venv / "bin" / "python").exists():
        return False
    return stamp.read_text(encoding="utf-8") == wanted


def package_folders(paths: Iterable[str]) -> list[str]:
    """Those of the paths that hold installed packages."""
    return [path for path in paths if Path(path).name in ("site-packages", "dist-packages")]


# ---- Stages: each prints one line with its seconds -----------------------------------------------------------------


def stage(name: str, *command: str | Path) -> None:
    """Runs one command quietly and prints its name and seconds.

    Raises:
        PipError: The command failed; holds what it printed.
    """
    started = time.monotonic()
    done = subprocess.run([str(word) for word in command], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    seconds = time.monotonic() - started
    sys.stdout.write(f"setup: {name + ('' if done.returncode == 0 else ': no'):<58}{seconds:6.1f} s\n")
    sys.stdout.flush()
    if done.returncode != 0:
        raise PipError(done.stdout.decode(errors="replace"))


def pip(name: str, verb: str, *words: str | Path) -> None:
    """Runs the pip of .venv as one stage; it finds the wheel folder and asks nothing."""
    wheels = wheel_folder(os.environ, Path.home())
    wheels.mkdir(parents=True, exist_ok=True)  # pip warns of a folder that is not there
    quiet = ("--disable-pip-version-check", "--no-input")
    stage(name, PYTHON, "-m", "pip", verb, *quiet, "--find-links", wheels, *words)


def fetch(name: str, *words: str | Path) -> None:
    """Fetches wheels into the wheel folder; whole or not at all, so that a cut download never lies there."""
    wheels = wheel_folder(os.environ, Path.home())
    wheels.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=wheels) as arriving:
        try:
            pip(name, "wheel", "--wheel-dir", arriving, *IMPATIENT, *words)
        except PipError as error:
            if not network_is_slow(str(error)):
                raise
            pip(f"{name}, with more patience", "wheel", "--wheel-dir", arriving, *words)
        for wheel in Path(arriving).iterdir():
            wheel.replace(wheels / wheel.name)


def install_pinned(wanted: Sequence[str]) -> None:
    """The first way: everything as pinned, from the wheel folder alone."""
    pip("packages from the wheel folder", "install", LAZY, "--no-index", "-c", CONSTRAINTS, *wanted)
    install_itself()


def install_itself() -> None:
    """Installs dynaconv, editable, with the flit_core that .venv has."""
    pip("dynaconv, editable", "install", "--no-index", "--no-deps", "--no-build-isolation", "-e", ROOT)


def install_fetched(wanted: Sequence[str]) -> None:
    """The second way: over the network into the wheel folder, then as the first."""
    # torch comes first and pinned: any request that leaves its version open draws gigabytes of CUDA packages, also on
    # a machine where pip finds a small CPU build of the pinned version. What follows then finds it in the folder.
    fetch("torch over the network", "-c", CONSTRAINTS, wanted[0])
    fetch("packages over the network", "-c", CONSTRAINTS, *wanted)
    install_pinned(wanted)


def install_borrowed(wanted: Sequence[str]) -> None:
    """The third way: this Python's packages are visible in .venv, the wheel folder adds what they lack.

    A .pth file, not --system-site-packages, which shows the packages of the base Python only: this one may itself be
    that of a virtual environment. Nothing is pinned here, since the machine's torch may be older than our pin.
    """
    site_packages = next((VENV / "lib").glob("python*/site-packages"))
    lines = [f"import site; site.addsitedir({folder!r})" for folder in package_folders(sys.path)]
    (site_packages / "borrowed.pth").write_text("\n".join(lines) + "\n", encoding="utf-8")
    BORROWED.touch()
    for own in site_packages.glob("setuptools*"):  # Python 3.11 puts an old one here, which would hide the borrowed one
        shutil.rmtree(own)
    pip("packages of this Python", "install", LAZY, "--no-index", *wanted)
    try:
        install_itself()
    except PipError:  # there is no flit_core: two small files do what an editable installation does
        (site_packages / "dynaconv.pth").write_text(f"{ROOT / 'src'}\n", encoding="utf-8")
        launcher = VENV / "bin" / "dynaconv"
        launcher.write_text('#!/bin/sh\nexec "$(dirname "$0")/python" -m dynaconv.cli "$@"\n', encoding="utf-8")
        launcher.chmod(0o755)


# ---- The whole -----------------------------------------------------------------------------------------------------


def compile_imported() -> None:
    """Compiles what a training imports, where this Python is told not to: it would do so at each start, for seconds."""
    if sys.dont_write_bytecode:
        words = ("env", "-u", "PYTHONDONTWRITEBYTECODE", PYTHON, "-c", "import dynaconv.experiment, torch._dynamo")
        with contextlib.suppress(PipError):  # it only saves time
            stage("bytecode of what a training imports", *words)


def install(dev: bool, may_borrow: bool) -> None:
    """Tries the three ways in turn.

    Raises:
        SetupError: None of them succeeded.
    """
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    asked = requirements(project, ["dev"] if dev else [])
    pinned = pins(CONSTRAINTS.read_text(encoding="utf-8"))
    exact = [f"{name}=={pinned[name]}" for name in ("torch", "flit-core")] + asked
    try:
        return install_pinned(exact)
    except PipError:
        pass
    try:
        return install_fetched(exact)
    except PipError as error:
        words = str(error)
    cause = "the network could not be reached" if network_is_cut(words) else "pip could not install from the network"
    missing = ""
    if may_borrow:
        try:
            return install_borrowed(asked)
        except PipError as error:
            missing = f", and {sys.executable} does not have {lacking(str(error)) or 'all that is needed'}"
    if not network_is_cut(words):
        sys.stderr.write(words)
    raise SetupError(
        f"{cause}, and {wheel_folder(os.environ, Path.home())} does not hold the wheels that constraints.txt pins"
        f"{missing}: connect to a network once and run this again, or copy that folder from a machine that has it."
    )


def prepare(dev: bool) -> None:
    """Makes .venv, or keeps one that is whole, and installs in it.

    Raises:
        SetupError: .venv could not be made, or there is no way to install.
    """
    wanted = identity(ROOT, sys.version_info[:2])
    kept = can_be_kept(VENV, wanted)
    if not kept:
        for stamp in VENV.glob("*.stamp"):  # first, so that a removal that is cut short does not leave what looks whole
            stamp.unlink()
        shutil.rmtree(VENV, ignore_errors=True)
        VENV.mkdir()
    UNFINISHED.touch()
    try:
        if not kept:
            stage(f"virtual environment of Python {platform.python_version()}", sys.executable, "-m", "venv", VENV)
        install(dev, may_borrow=not kept or BORROWED.exists())
        compile_imported()
    except (PipError, SetupError) as error:
        # What stood before still works: pip settles on all versions before it changes the first package.
        UNFINISHED.unlink()
        if not kept:
            shutil.rmtree(VENV, ignore_errors=True)
        if isinstance(error, SetupError):
            raise
        sys.stderr.write(str(error))
        raise SetupError(f"{sys.executable} -m venv failed as shown above.") from None
    for name in ("runtime", "dev") if dev else ("runtime",):
        (VENV / f"{name}.stamp").write_text(wanted, encoding="utf-8")
    UNFINISHED.unlink()


def main() -> int:
    """Runs the set-up and returns its exit code."""
    if sys.version_info < OLDEST_PYTHON:
        sys.stderr.write(
            f"setup: dynaconv needs Python 3.11 or newer, this is {platform.python_version()} ({sys.executable}): "
            "name another one, for example `make setup PYTHON=python3.12`.\n"
        )
        return 2
    parser = argparse.ArgumentParser(description="Makes .venv and installs dynaconv in it, with or without a network.")
    parser.add_argument("--dev", action="store_true", help="also install what the tests and the notebook need")
    dev = parser.parse_args().dev
    try:
        prepare(dev)
    except (SetupError, OSError) as error:
        sys.stderr.write(f"setup: {error}\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write("setup: stopped; the next set-up starts anew.\n")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
