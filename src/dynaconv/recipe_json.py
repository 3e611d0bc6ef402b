"""A recipe as a JSON file: every setting by its group, in a numbered format. Imports no torch."""

import dataclasses
import json
import types
import typing
from pathlib import Path
from typing import Any, Literal

from dynaconv.errors import UserError, unknown
from dynaconv.files import read_bounded
from dynaconv.recipe import GROUPS, Recipe

MOST_BYTES = 2**20
"""A larger file is no recipe."""
FORMAT = 1
"""Version of the JSON form. A file with another version is refused by name, never guessed at."""


def to_json(recipe: Recipe) -> str:
    """Writes every setting, defaults included, as indented JSON."""
    return json.dumps({"format": FORMAT, **dataclasses.asdict(recipe)}, indent=2) + "\n"


def from_json(text: str, where: str) -> Recipe:
    """Reads what `to_json` wrote.

    Args:
        text: The JSON text.
        where: Name of the file, for the error message.

    Raises:
        UserError: not JSON, another format version, an unknown or missing setting, a wrong type or value.
    """
    try:
        document = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise UserError(f"{where} is not a recipe: it is not valid JSON ({error}).") from error
    if not isinstance(document, dict) or document.pop("format", None) != FORMAT:
        raise UserError(f"{where} is not a recipe of format {FORMAT}; write one with this version of dynaconv.")
    parts: dict[str, Any] = {}
    for group, content in document.items():
        if group == "name":
            parts["name"] = str(content)
        elif group not in GROUPS:
            raise unknown(f"group of settings in {where}:", group, GROUPS)
        elif not isinstance(content, dict):
            raise UserError(f"{where}: {group} must hold settings, received {content!r}.")
        else:
            parts[group] = read_settings(GROUPS[group], content, where)
    return Recipe(**parts)


def load_recipe(path: Path) -> Recipe:
    """Reads a recipe.json; raises UserError if it cannot be read or is not one."""
    try:
        text = read_bounded(path, MOST_BYTES).decode()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"The recipe {path} cannot be read: {error}.") from error
    return from_json(text, str(path))


def read_settings(kind: type, content: dict[str, Any], where: str) -> Any:
    """Makes one group of settings, a dataclass, from a JSON object; what it lacks keeps its default.

    Raises:
        UserError: an unknown setting, a wrong type or value; `where` names the file.
    """
    hints = typing.get_type_hints(kind)
    values: dict[str, Any] = {}
    for name, value in content.items():
        if name not in hints:
            raise unknown(f"setting in {where}:", name, hints)
        if not _fits(value, hints[name]):
            raise UserError(f"{where}: {name} has the wrong type, received {value!r}.")
        values[name] = tuple(value) if isinstance(value, list) else value
    return kind(**values)


def _fits(value: Any, hint: Any) -> bool:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return value in arguments
    if origin in (types.UnionType, typing.Union):
        return any(_fits(value, option) for option in arguments)
    if origin is tuple:
        return isinstance(value, list) and all(_fits(item, arguments[0]) for item in value)
    if hint is type(None):
        return value is None
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    return isinstance(value, hint) and (hint is bool or not isinstance(value, bool))
