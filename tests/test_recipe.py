"""The settings: JSON both ways, what is refused and in which words."""

import dataclasses
import json

import pytest

from dynaconv.errors import UserError
from dynaconv.recipe import GROUPS, ModelSettings, Recipe, with_settings
from dynaconv.recipe_json import from_json, load_recipe, to_json
from dynaconv.recipes import RECIPES


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_survives_json(name):
    recipe = RECIPES[name]()
    assert recipe.name == name
    assert from_json(to_json(recipe), "here") == recipe
    assert recipe.__class__ is Recipe


def test_setting_names_are_unique_across_groups():
    names = [field.name for kind in GROUPS.values() for field in dataclasses.fields(kind)]
    assert len(names) == len(set(names))


def test_every_setting_has_a_docstring():
    import ast
    import inspect

    for kind in GROUPS.values():
        body = ast.parse(inspect.getsource(kind)).body[0].body
        for field, after in zip(body, [*body[1:], None], strict=True):
            if isinstance(field, ast.AnnAssign):
                assert isinstance(after, ast.Expr), f"{kind.__name__}.{field.target.id} has no docstring"


def test_with_settings_replaces_in_the_right_group_and_nothing_else():
    changed = with_settings(Recipe(), epochs=3, widths=(8,), pool_after=(), num_convolutions=(2,))
    assert (changed.train.epochs, changed.model.widths) == (3, (8,))
    assert changed.data == Recipe().data


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"epochs": 0}, "--epochs must be at least 1, received 0."),
        ({"batch_size": 1}, "--batch-size must be at least 2, received 1."),
        ({"accumulation_steps": 0}, "--accumulation-steps must be at least 1, received 0."),
        ({"degrees": 181.0}, "--degrees must be from 0 to 180 degrees, received 181."),
        ({"degrees": float("nan")}, "--degrees must be from 0 to 180 degrees, received nan."),
        ({"hue": 0.6}, "--hue must be from 0 to 0.5, received 0.6."),
        ({"flip": 1.5}, "--flip must be from 0 to 1, received 1.5."),
        ({"scale_max": 0.5}, "--scale-max must be from 0.8 to 4, received 0.5."),
        ({"learning_rate": 0.0}, "--learning-rate must be above 0 and at most 1, received 0."),
        ({"validation_fraction": 0.9}, "--validation-fraction must be from 0.01 to 0.5, received 0.9."),
        ({"channels": 2}, "--channels must be 1 or 3, received 2."),
        ({"image_size": 3}, "--image-size must be from 4 to 512 pixels, received 3."),
        ({"source": " "}, "--data needs a source, received an empty one."),
        ({"widths": ()}, "--widths needs 1 to 64 numbers, received 0."),
        ({"kernel_sizes": (3, 2)}, "--kernel-sizes must be odd and from 1 to 11, received 2."),
        (
            {"pool_after": (9,)},
            f"--pool-after must be from 1 to {len(ModelSettings().widths)} (the number of blocks), received 9.",
        ),
        ({"pool_after": (1, 1)}, "--pool-after names a block twice: 1 1."),
        ({"num_grid_images": 101}, "--num-grid-images must be from 0 to 100, received 101."),
        ({"threads": -1}, "--threads must be from 0 to 1024, received -1."),
    ],
)
def test_impossible_values_are_refused(settings, message):
    with pytest.raises(UserError) as error:
        with_settings(Recipe(), **settings)
    assert str(error.value) == message


def test_number_of_convolutions_must_fit_the_blocks():
    with pytest.raises(
        UserError, match="--num-convolutions needs one number or one for each of the 3 blocks, received 2"
    ):
        ModelSettings(widths=(4, 4, 4), num_convolutions=(1, 2), pool_after=())


def test_unknown_setting_offers_the_nearest():
    with pytest.raises(UserError, match=r"^Unknown setting 'epoch'\. Did you mean 'epochs'\? Known: source, "):
        with_settings(Recipe(), epoch=3)


def broken(**changes):
    document = json.loads(to_json(Recipe()))
    for path, value in changes.items():
        group, _, name = path.partition("__")
        if name:
            document[group][name] = value
        else:
            document[group] = value
    return json.dumps(document)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "{",
            "r.json is not a recipe: it is not valid JSON "
            "(Expecting property name enclosed in double quotes: line 1 column 2 (char 1)).",
        ),
        ("[]", "r.json is not a recipe of format 1; write one with this version of dynaconv."),
        (broken(format=2), "r.json is not a recipe of format 1; write one with this version of dynaconv."),
        (broken(train__epochs="3"), "r.json: epochs has the wrong type, received '3'."),
        (broken(train__epochs=True), "r.json: epochs has the wrong type, received True."),
        (broken(model__widths=[8, "x"]), "r.json: widths has the wrong type, received [8, 'x']."),
        (broken(train__device="gpu"), "r.json: device has the wrong type, received 'gpu'."),
        (broken(train=3), "r.json: train must hold settings, received 3."),
        (broken(train__epochs=-1), "--epochs must be at least 1, received -1."),
    ],
)
def test_broken_recipe_files_are_refused(text, message):
    with pytest.raises(UserError) as error:
        from_json(text, "r.json")
    assert str(error.value) == message


def test_unknown_group_and_setting_in_a_file():
    with pytest.raises(UserError, match=r"^Unknown group of settings in r.json: 'trian'. Did you mean 'train'\?"):
        from_json(broken(trian={}), "r.json")
    with pytest.raises(UserError, match=r"^Unknown setting in r.json: 'epoch'. Did you mean 'epochs'\?"):
        from_json(broken(train__epoch=1), "r.json")


def test_recipe_file_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match=r"^The recipe .*/none.json cannot be read: "):
        load_recipe(tmp_path / "none.json")
