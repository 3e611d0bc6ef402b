"""The command line: help, JSON, settings that arrive in the recipe."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from dynaconv.arguments import find_recipe, parse_training
from dynaconv.cli import VERBS, main
from dynaconv.recipe import Recipe, with_settings
from dynaconv.recipe_json import to_json
from dynaconv.recipes import RECIPES


def test_settings_arrive_in_the_recipe():
    words = ["coursework", "--data", "digits", "--run-dir", "a b", "--widths", "8", "16", "--num-convolutions", "2"]
    words += ["--pool-after", "1", "--learning_rate=0.01", "--image-size", "16", "--offline"]
    recipe, options = parse_training(words)
    assert options.run_dir == Path("a b")
    assert recipe == with_settings(
        RECIPES["coursework"](),
        source="digits",
        widths=(8, 16),
        num_convolutions=(2,),
        pool_after=(1,),
        learning_rate=0.01,
        image_size=16,
        offline=True,
    )


def test_a_switch_of_a_recipe_can_be_turned_off():
    recipe, _ = parse_training(["fast92", "--no-alternate-flip"])
    assert recipe == with_settings(RECIPES["fast92"](), alternate_flip=False)


def test_without_arguments_the_default_recipe():
    recipe, options = parse_training([])
    assert recipe == RECIPES["fast92"]()
    assert (options.run_dir, options.seeds, options.check_resume, options.check_repeat) == (None, 1, False, False)


def test_a_stored_recipe_is_the_base_that_settings_change(tmp_path):
    stored = with_settings(Recipe(name="mine"), epochs=7, degrees=3.0)
    (tmp_path / "recipe.json").write_text(to_json(stored))
    assert find_recipe(str(tmp_path / "recipe.json")) == find_recipe(str(tmp_path)) == stored
    recipe, _ = parse_training([str(tmp_path / "recipe.json"), "--epochs", "8"])
    assert recipe == with_settings(stored, epochs=8)


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help(verb, capsys):
    assert main([verb, "--help"]) == 0
    assert capsys.readouterr().out


def test_help_of_train_shows_every_setting_with_its_default(capsys):
    assert main(["train", "--help"]) == 0
    text = capsys.readouterr().out
    for needle in ("--learning-rate FLOAT", "(default: 0.03)", "--run-dir", "--hue FLOAT", "RandomAffine"):
        assert needle in text


def test_json_of_version_and_recipes(capsys):
    assert main(["--version", "--json"]) == 0
    shown = capsys.readouterr()
    assert set(json.loads(shown.out)) == {"version"}
    assert shown.err.startswith("dynaconv ")
    assert main(["recipes", "--json"]) == 0
    shown = capsys.readouterr()
    assert [row["name"] for row in json.loads(shown.out)] == list(RECIPES)
    assert "Command: dynaconv train coursework" in shown.err


def test_a_sigterm_that_python_drops_comes_again():
    code = """
import os, signal, time, weakref
from dynaconv.cli import stop_on_sigterm
stop_on_sigterm()
class Thing: pass
thing = Thing()
watch = weakref.ref(thing, lambda _: (os.kill(os.getpid(), signal.SIGTERM), time.sleep(0.1)))
del thing  # whatever is raised in the callback is ignored
try:
    time.sleep(20)
except KeyboardInterrupt:
    print("stopped")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=15, check=True)
    assert "Exception ignored" in done.stderr
    assert done.stdout == "stopped\n"
