"""The shape that the code is held to: floors, sizes, names, and what stays unloaded until it is needed."""

import ast
import graphlib
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "src" / "dynaconv"

FLOORS = {
    **dict.fromkeys(["errors", "files", "folders", "native", "recipe", "recipe_json", "rundir", "device"], 0),
    **dict.fromkeys(["data", "model"], 1),
    "training": 2,
    "judging": 3,
    "reporting": 4,
    **dict.fromkeys(["evaluation", "label_search", "data_check", "shipping"], 5),
    "experiment": 6,
    "seeds": 7,
    **dict.fromkeys(["recipes", "arguments", "options", "terminal", "cli", "__main__"], 8),
}
"""The floor of every part, a part being a module of the package or a folder of modules."""

ENTRANCE = {"recipes", "arguments", "options", "terminal", "cli", "__main__"}
"""The parts that serve a user at the command line; they may use each other."""

MODULES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}
"""The file of every module by its dotted name below dynaconv; `__init__` is that of the package itself."""


def part(module: str) -> str:
    return module.split(".")[0]


def tree(module: str) -> ast.Module:
    return ast.parse(MODULES[module].read_text(encoding="utf-8"))


def imports(module: str) -> Iterator[str]:
    """The modules below dynaconv that a module imports, anywhere in its code."""
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.Import):
            yield from (name.name.removeprefix("dynaconv.") for name in node.names if name.name.startswith("dynaconv"))
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}, line {node.lineno}: a relative import hides the floor"
            if node.module == "dynaconv":
                # The public names are for users: inside, they would hide which floor a name comes from.
                yield from (name.name for name in node.names if name.name != "__version__")
            elif node.module and node.module.startswith("dynaconv."):
                yield node.module.removeprefix("dynaconv.")


INSIDE = [name for name in MODULES if name != "__init__"]


@pytest.mark.parametrize("module", INSIDE)
def test_a_module_has_a_floor_and_imports_from_lower_ones_only(module: str) -> None:
    here = part(module)
    assert here in FLOORS, f"give {here} a floor in FLOORS"
    for target in imports(module):
        there = part(target)
        assert there in FLOORS, f"{module} imports {target}, which is no part of dynaconv"
        neighbours = here == there or FLOORS[here] == FLOORS[there] == 0 or {here, there} <= ENTRANCE
        assert FLOORS[there] < FLOORS[here] or neighbours, f"{module} must not import {target}"
        assert there != "recipes" or here in ("arguments", "cli"), f"{module} must not know the named recipes"


def test_no_imports_go_in_a_circle() -> None:
    graphlib.TopologicalSorter({module: set(imports(module)) for module in INSIDE}).prepare()


@pytest.mark.parametrize("module", list(MODULES))
def test_a_module_has_one_subject_and_says_which(module: str) -> None:
    text = MODULES[module].read_text(encoding="utf-8")
    assert not {"utils", "util", "common", "helpers", "misc"} & set(module.split(".")), "name it after what it is about"
    assert ast.get_docstring(tree(module)), "the first statement is a docstring that says what the module is for"
    assert len(text.splitlines()) <= 400
    assert [line for line in text.splitlines() if len(line) > 120] == []


@pytest.mark.parametrize("module", list(MODULES))
def test_a_function_fits_on_a_screen(module: str) -> None:
    functions = [node for node in ast.walk(tree(module)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    sizes = {node.name: (node.end_lineno or 0) - node.lineno + 1 for node in functions}
    assert {name: lines for name, lines in sizes.items() if lines > 60} == {}


@pytest.mark.parametrize(
    ("program", "unloaded"),
    [
        ("import dynaconv", {"torch"}),
        ("import dynaconv.recipe", {"torch"}),
        ("from dynaconv.cli import main; assert main(['--help']) == 0", {"torch", "tyro", "numpy", "rich"}),
    ],
)
def test_nothing_heavy_is_loaded_before_it_is_needed(program: str, unloaded: set[str]) -> None:
    check = f"{program}\nimport sys\nsys.exit(' '.join({unloaded!r} & sys.modules.keys()) or 0)"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"loaded by `{program}`: {done.stderr}"


def test_the_help_answers_at_once() -> None:
    seconds: list[float] = []
    for _ in range(5):  # the best of five: what it takes, not what else the machine was doing
        started = time.perf_counter()
        done = subprocess.run([sys.executable, "-m", "dynaconv", "--help"], capture_output=True, check=False)
        seconds.append(time.perf_counter() - started)
        assert done.returncode == 0
        assert b"train" in done.stdout
    assert min(seconds) <= 0.3


# Written in pieces, so that this file does not name what it forbids.
REGISTRIES = "|".join(
    re.escape(host)
    for host in ("pypi" + ".org", "files.python" + "hosted", "registry.npm" + "js", "deb.deb" + "ian.org")
)
MACHINE_PATHS = r"(?<![\w.$~}/-])/(?:" + "|".join(("work", "opt", "home", "root", "Users", "farm", "mnt")) + r")/\w"


def test_no_file_names_a_registry_or_a_path_of_one_machine() -> None:
    listing = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(listing, cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode != 0:
        pytest.skip("needs a git checkout")
    found: list[str] = []
    for name in filter(None, listed.stdout.split("\0")):
        path = ROOT / name
        if not path.is_file() or b"\0" in path.read_bytes():
            continue
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            found += [f"{name}:{number}: {hit[0]}" for hit in re.finditer(f"{REGISTRIES}|{MACHINE_PATHS}", line)]
    assert found == []
