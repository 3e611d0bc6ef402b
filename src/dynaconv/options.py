"""Options of verbs: described in one line each, parsed by tyro, its complaints in our words. Imports no torch."""

import contextlib
import dataclasses
import io
import itertools
import re
from pathlib import Path
from typing import Annotated, Any

import tyro

from dynaconv.errors import UserError, unknown


def take_folders(words: list[str], verb: str, example: str, names: list[str]) -> list[str]:
    """Gives the folders that stand first in a command their names, as options; raises UserError if one is missing."""
    words = [dashed(word) for word in words]
    if "--help" in words or "-h" in words:
        return ["--help"]
    count = next((place for place, word in enumerate(words) if word.startswith("-")), len(words))
    if count < len(names):
        what = {"run": "the folder of a run", "file": "an exported file", "source": "a source of images"}.get(
            names[0], "the folders of two runs"
        )
        raise UserError(f"`dynaconv {verb}` needs {what}: {example}.")
    if count > len(names):
        raise UserError(f"`dynaconv {verb}` takes no {words[len(names)]!r}: {example}.")
    named = [word for name, folder in zip(names, words, strict=False) for word in (f"--{name}", folder)]
    return [*named, *words[count:]]


def parse_options(words: list[str], usage: str, description: str, *options: Any) -> Any:
    """Parses options that are no settings of a recipe."""
    known = [f"--{name.replace('_', '-')}" for name, _, _ in options]
    for word in words:
        name = word.partition("=")[0]
        if name.startswith("--") and name not in (*known, "--help"):
            raise unknown("option", name, known)
    return understand(words, usage, description, list(options))


def folder(name: str, told: str) -> tuple[str, Any, Any]:
    """Describes a folder that a verb needs."""
    return name, Annotated[Path, tyro.conf.arg(help=told)], dataclasses.field()


def option(kind: Any, name: str, told: str, default: Any = None) -> tuple[str, Any, Any]:
    """Describes an option of a verb that is no setting of a recipe."""
    return name, Annotated[kind, tyro.conf.arg(help=told)], dataclasses.field(default=default)


def understand(words: list[str], usage: str, description: str, fields: list[Any]) -> Any:
    """Returns an object with the fields; raises UserError in our words where tyro complains."""
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            return tyro.cli(
                dataclasses.make_dataclass("Arguments", fields),
                args=words,
                prog=f"dynaconv {usage}",
                description=description,
                config=(tyro.conf.OmitArgPrefixes,),
            )
    except SystemExit as end:
        if not end.code:
            raise
        raise UserError(_as_sentence(complaint.getvalue(), usage.split()[0])) from None


def dashed(word: str) -> str:
    """Takes underscores in the name of an option as dashes."""
    name, equals, value = word.partition("=")
    return f"{name.replace('_', '-')}{equals}{value}" if word.startswith("--") else word


def _as_sentence(box: str, verb: str) -> str:
    """Takes the complaint out of the frame that tyro draws around it, in our words where its own are Python's."""
    lines = [line.strip("│ ") for line in box.splitlines()[1:]]  # the first holds a title

    def is_rule(line: str) -> bool:
        return set(line) <= set("─-╰╯")  # drawn in ASCII where the terminal cannot show lines

    said = " ".join(itertools.takewhile(lambda line: not is_rule(line), itertools.dropwhile(is_rule, lines)))
    if match := re.search(r"parsing (--\S+): (invalid literal for int|could not convert)[^']*('.*')", said):
        kind = "a whole number" if "int" in match[2] else "a number"
        return f"{match[1].replace('--source', '--data')} takes {kind}, received {match[3]}."
    if match := re.search(r"invalid choice '(.*)' for argument '(--\S+)'. Expected one of \((.*)\)", said):
        return f"{match[2]} takes one of {match[3].replace(chr(39), '')}, received {match[1]!r}."
    said = (said or "The arguments cannot be understood").rstrip(".")
    return f"{said}. `dynaconv {verb} --help` lists every setting."
