"""scripts/setup.py: what it asks for, where it looks, what it keeps, and what it says when nothing can be installed."""

import importlib.util
import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "scripts" / "setup.py"


def load_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("dynaconv_setup", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


setup = load_script()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
PINNED = setup.pins((ROOT / "constraints.txt").read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("environment", "folder"),
    [
        ({"DYNACONV_CACHE": "/c", "XDG_CACHE_HOME": "/x"}, "/c/wheels"),
        ({"XDG_CACHE_HOME": "/x"}, "/x/dynaconv/wheels"),
        ({"DYNACONV_CACHE": "", "XDG_CACHE_HOME": ""}, "/h/.cache/dynaconv/wheels"),
        ({}, "/h/.cache/dynaconv/wheels"),
    ],
)
def test_the_wheel_folder_lies_in_the_cache_that_the_user_named(environment: dict[str, str], folder: str) -> None:
    assert setup.wheel_folder(environment, Path("/h")) == Path(folder)


def test_training_asks_for_the_dependencies_alone_and_the_tests_for_the_extras_within_extras() -> None:
    project = {
        "name": "this",
        "dependencies": ["a>=1"],
        "optional-dependencies": {"dev": ["this[page,more]", "b"], "page": ["c"], "more": ["d"], "other": ["e"]},
    }
    assert setup.requirements(project, []) == ["a>=1"]
    assert setup.requirements(project, ["dev"]) == ["a>=1", "c", "d", "b"]


def test_everything_that_is_asked_for_is_pinned() -> None:
    asked = [*setup.requirements(PROJECT, ["dev"]), "torch", "flit-core"]
    names = {setup.re.split(r"[><=!~;\[ ]", line)[0].lower().replace("_", "-") for line in asked}
    assert names - PINNED.keys() == set()


def test_a_pin_is_read_without_comments_and_torch_has_no_local_suffix() -> None:
    assert setup.pins("# a==1\nb==2.0\n\nc_d==3  # why\n") == {"b": "2.0", "c_d": "3"}
    assert "+" not in PINNED["torch"]  # a pin on +cpu could be had on few machines


CUT = """\
WARNING: Retrying (Retry(total=0, connect=None, read=None, redirect=None, status=None)) after connection broken by \
'NewConnectionError('<pip._vendor.urllib3.connection.HTTPSConnection object at 0x7f>: Failed to establish a new \
connection: [Errno -3] Temporary failure in name resolution')': /simple/torch/
ERROR: Could not find a version that satisfies the requirement torch==2.13.0 (from versions: none)
ERROR: No matching distribution found for torch==2.13.0
"""
SLOW = """\
WARNING: Retrying (Retry(total=0, connect=None, read=None, redirect=None, status=None)) after connection broken by \
"ReadTimeoutError("HTTPSConnectionPool(host='somewhere', port=443): Read timed out. (read timeout=15.0)")": /simple/a/
"""
FULL = "ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device\n"


def test_a_cut_network_a_slow_one_and_a_full_disk_are_told_apart() -> None:
    verdicts = [(setup.network_is_cut(words), setup.network_is_slow(words)) for words in (CUT, SLOW, FULL)]
    assert verdicts == [(True, False), (True, True), (False, False)]


def test_what_is_lacking_is_named() -> None:
    assert setup.lacking(CUT) == "torch==2.13.0"
    assert setup.lacking(FULL) == ""


@pytest.fixture
def venv(tmp_path: Path) -> Path:
    """The outside of a .venv that a set-up has finished."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").touch()
    (tmp_path / "runtime.stamp").write_text(setup.identity(Path("/here"), (3, 11)), encoding="utf-8")
    return tmp_path


def test_a_whole_venv_of_this_folder_and_python_is_kept(venv: Path) -> None:
    assert setup.can_be_kept(venv, setup.identity(Path("/here"), (3, 11)))


@pytest.mark.parametrize(("root", "version"), [("/there", (3, 11)), ("/here", (3, 12))])
def test_a_venv_of_another_folder_or_python_is_made_anew(venv: Path, root: str, version: tuple[int, int]) -> None:
    assert not setup.can_be_kept(venv, setup.identity(Path(root), version))


def test_a_half_made_venv_is_made_anew(venv: Path) -> None:
    kept = setup.identity(Path("/here"), (3, 11))
    (venv / "unfinished").touch()
    assert not setup.can_be_kept(venv, kept)
    (venv / "unfinished").unlink()
    (venv / "bin" / "python").unlink()
    assert not setup.can_be_kept(venv, kept)


def test_a_removal_that_is_cut_short_leaves_nothing_that_looks_whole(
    venv: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(setup, "VENV", venv)
    monkeypatch.setattr(setup.shutil, "rmtree", stop)
    with pytest.raises(KeyboardInterrupt):
        setup.prepare(dev=False)
    assert not (venv / "runtime.stamp").exists()


def test_packages_are_borrowed_from_package_folders_only() -> None:
    paths = ["", "/usr/lib/python3.11", "/usr/lib/python3/dist-packages", "/v/lib/python3.11/site-packages"]
    assert setup.package_folders(paths) == paths[2:]


def test_an_old_python_is_told_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "version_info", (3, 10, 4))
    monkeypatch.setattr(setup, "prepare", lambda dev: pytest.fail("went on"))
    assert setup.main() == 2
    assert "needs Python 3.11 or newer" in capsys.readouterr().err


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A clone in a folder with a space whose pip is a program that always fails as on a cut network."""
    root = tmp_path / "a clone"
    (root / "scripts").mkdir(parents=True)
    for name in ("pyproject.toml", "constraints.txt", "scripts/setup.py"):
        shutil.copy(ROOT / name, root / name)
    return root


def run_setup(checkout: Path, pip: str) -> "subprocess.CompletedProcess[str]":
    """Runs the script's `main` with a virtual environment of one file, a `python` that is the shell script `pip`."""
    program = f"""
import sys
sys.path.insert(0, {str(checkout / "scripts")!r})
import setup
whole = setup.stage
def stage(name, *command):
    if "venv" not in command:
        return whole(name, *command)
    (setup.VENV / "bin").mkdir()
    (setup.VENV / "lib" / "python3.11" / "site-packages").mkdir(parents=True)
    setup.PYTHON.write_text({"#!/bin/sh" + chr(10) + pip!r})
    setup.PYTHON.chmod(0o755)
setup.stage = stage
sys.exit(setup.main())
"""
    environment = {**os.environ, "DYNACONV_CACHE": str(checkout / "cache")}
    return subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False)


def test_without_any_way_one_sentence_says_what_to_do_and_nothing_is_left(checkout: Path) -> None:
    done = run_setup(checkout, f"cat <<'E'\n{CUT}E\nexit 1\n")
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    for part in ("network could not be reached", str(checkout / "cache" / "wheels"), "torch==2.13.0", "connect to"):
        assert part in done.stderr
    assert not (checkout / ".venv").exists()


def test_what_pip_says_is_shown_when_the_network_is_not_to_blame(checkout: Path) -> None:
    done = run_setup(checkout, f"cat <<'E'\n{FULL}E\nexit 1\n")
    assert done.returncode == 2
    assert "No space left on device" in done.stderr


def test_the_wheel_folder_alone_is_enough(checkout: Path) -> None:
    done = run_setup(checkout, f'case "$*" in *--no-index*) exit 0;; *) echo "{FULL}"; exit 1;; esac\n')
    assert done.returncode == 0, done.stderr
    assert (checkout / ".venv" / "runtime.stamp").exists()
    assert not (checkout / ".venv" / "unfinished").exists()


def test_torch_is_fetched_first_and_pinned(checkout: Path) -> None:
    words = (
        'echo "$*" >> "$(dirname "$0")/said"; case "$*" in *wheel\\ --*) touch "$0.had";; *) test -e "$0.had";; esac\n'
    )
    done = run_setup(checkout, words)
    assert done.returncode == 0, done.stderr
    said = (checkout / ".venv" / "bin" / "said").read_text(encoding="utf-8").splitlines()
    fetches = [line for line in said if " wheel " in line]
    assert fetches[0].endswith(f"torch=={PINNED['torch']}")
    assert all(f"torch=={PINNED['torch']}" in line for line in fetches)


def test_a_python_that_has_everything_lends_it(checkout: Path) -> None:
    refuse = f'case "$*" in *constraints.txt*|*"-e "*) echo "{CUT}"; exit 1;; esac\n'
    done = run_setup(checkout, refuse)
    assert done.returncode == 0, done.stderr
    packages = checkout / ".venv" / "lib" / "python3.11" / "site-packages"
    assert "site.addsitedir" in (packages / "borrowed.pth").read_text(encoding="utf-8")
    assert (packages / "dynaconv.pth").read_text(encoding="utf-8").strip() == str(checkout / "src")
    assert os.access(checkout / ".venv" / "bin" / "dynaconv", os.X_OK)


def test_a_failure_leaves_a_whole_venv_as_it_was(checkout: Path) -> None:
    assert run_setup(checkout, "exit 0\n").returncode == 0
    failing = checkout / ".venv" / "bin" / "python"
    failing.write_text(f"#!/bin/sh\ncat <<'E'\n{CUT}E\nexit 1\n", encoding="utf-8")
    assert run_setup(checkout, "exit 0\n").returncode == 2
    assert (checkout / ".venv" / "runtime.stamp").exists()
    assert not (checkout / ".venv" / "unfinished").exists()


@pytest.mark.parametrize(("told", "compiles"), [("1", True), ("", False)])
def test_bytecode_is_made_once_where_python_is_told_to_keep_none(
    checkout: Path, monkeypatch: pytest.MonkeyPatch, told: str, compiles: bool
) -> None:
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", told)
    said = checkout / "said"
    done = run_setup(checkout, f'echo "$* told=$PYTHONDONTWRITEBYTECODE" >> "{said}"\n')
    assert done.returncode == 0, done.stderr
    assert ("-c import dynaconv.experiment, torch._dynamo told=\n" in said.read_text(encoding="utf-8")) == compiles
