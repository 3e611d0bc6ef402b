"""The prose against the facts: links resolve, commands parse, figures are those of the result files."""

import dataclasses
import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from dynaconv.arguments import parse_training
from dynaconv.cli import VERBS, main
from dynaconv.recipes import REACHED, RECIPES

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("benchmarks/*.md")])
RESULTS = ROOT / "benchmarks" / "results"


def page_id(page):
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_links_and_pictures_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#\s]+)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_named_files_exist(page):
    known = ("src/", "benchmarks/", "examples/", "docs/", "tests/")
    for name in re.findall(r"`([\w/.-]+\.(?:py|json|md|ipynb))`", page.read_text()):
        if name.startswith(known):
            assert (ROOT / name).exists(), name


def commands(page):
    for block in re.findall(r"```(?:sh|console)\n(.*?)```", page.read_text(), re.DOTALL):
        for line in block.splitlines():
            if line.startswith("dynaconv "):
                yield shlex.split(line, comments=True)[1:]


@pytest.mark.parametrize(
    "words", [words for page in PAGES for words in commands(page)], ids=lambda words: " ".join(words)
)
def test_commands_parse(words):
    assert words[0] in VERBS
    if words[0] == "train":
        if len(words) > 1 and words[1].endswith(".json"):
            words = [words[0], *words[2:]]  # the file is the reader's own
        parse_training(words[1:])


def test_figures_of_the_coursework_recipe_are_those_of_its_result():
    document = json.loads((RESULTS / "coursework.json").read_text())
    metrics = document["metrics"]
    readme = (ROOT / "README.md").read_text()
    told = RECIPES["coursework"].__doc__ or ""
    for text, where in ((readme, "README.md"), (told, "recipe")):
        for figure in (
            f"{metrics['test_accuracy']['mean']:.2%}",
            f"{metrics['validation_accuracy']['mean']:.2%}",
            f"{metrics['train_seconds']['mean'] / 60:.0f} minutes",
        ):
            assert figure in text, f"{figure} is not in the {where}"
        seeds = len(document["seeds"])
        assert f"{seeds} seed{'s' if seeds > 1 else ''}" in text, where


def test_figures_of_the_coursework_recipe_in_bfloat16_are_those_of_its_result():
    document = json.loads((RESULTS / "coursework-bfloat16.json").read_text())
    metrics, told = document["metrics"], " ".join((RECIPES["coursework"].__doc__ or "").split())
    assert document["precision"] == ["bfloat16"]
    test, validation = (f"{metrics[f'{split}_accuracy']['mean']:.2%}" for split in ("test", "validation"))
    minutes, seeds = f"{metrics['train_seconds']['mean'] / 60:.0f} minutes", f"{len(document['seeds'])} seed"
    row = f"| `coursework` | {test} | {validation} | {minutes} | {seeds} on the same, in bfloat16; "
    row += f"{metrics['peak_memory_bytes']['mean'] / 1e9:.1f} GB of memory |"
    assert row in (ROOT / "README.md").read_text()
    assert f"Cost: {minutes} on two cores with matrix tiles" in told
    assert f"{test} in bfloat16, {seeds}" in told


def test_figures_of_the_default_recipe_are_those_of_its_result():
    metrics = json.loads((RESULTS / "fast92.json").read_text())["metrics"]
    readme, told = (ROOT / "README.md").read_text(), RECIPES["fast92"].__doc__ or ""
    six = f"{metrics['test_accuracy_tta']['mean']:.2%} by six views"
    told = " ".join(told.split())
    (row,) = (line for line in readme.splitlines() if six in line and "| `fast92`" in line)
    for text in (row, told):
        assert six in text
        assert f"{metrics['test_accuracy']['mean']:.2%}" in text
        assert f"{metrics['train_seconds']['mean']:.0f} seconds" in text
        assert f"{metrics['peak_memory_bytes']['mean'] / 1e9:.1f} GB" in text
    assert f"| {metrics['validation_accuracy']['mean']:.2%} |" in row
    assert f"{len(metrics['test_accuracy']['values'])} seed" in row


@pytest.mark.parametrize(
    ("name", "recipe", "words"),
    [
        ("fast92-all", "fast92", "`fast92` with `--validation-fraction 0`"),
        (
            "fast92-short",
            "fast92",
            "`fast92` in 8 epochs, 3 at 16 pixels, 3 at 24, 2 at 32, `--validation-fraction 0`",
        ),
        ("fast92-avx512", "fast92", "`fast92` in the 8 epochs above, `--validation-fraction 0`"),
        ("fast94", "fast94", "`fast94` with `--validation-fraction 0`"),
    ],
)
def test_figures_of_several_seeds_are_those_of_their_result(name, recipe, words):
    document = json.loads((RESULTS / f"{name}.json").read_text())
    metrics, told = document["metrics"], " ".join((RECIPES[recipe].__doc__ or "").split())
    test = metrics["test_accuracy"]
    between = f"{test['mean']:.2%} ({min(test['values']):.2%} to {max(test['values']):.2%})"
    (row,) = (line for line in (ROOT / "README.md").read_text().splitlines() if between in line)
    assert row.startswith(f"| {words} |")
    assert f"| {metrics['train_seconds']['mean']:.0f} seconds" in row
    assert f"{len(document['seeds'])} seeds" in row
    assert f"{metrics['peak_memory_bytes']['mean'] / 1e9:.1f} GB" in row
    figures = f"{test['mean']:.2%}"
    if "test_accuracy_tta" in metrics:
        six = f"{metrics['test_accuracy_tta']['mean']:.2%} by six views"
        assert six in row
        figures += f" of the test images, {six},"
    assert f"{figures} in the mean of {len(document['seeds'])} seeds" in told
    assert document["recipe"]["data"]["validation_fraction"] == 0


@pytest.mark.parametrize("name", ["fast92-all", "fast92", "fast94", "fast96", "strong"])
def test_what_was_measured_are_the_recipes_as_they_are(name):
    document = json.loads((RESULTS / f"{name}.json").read_text())
    stored = document.get("recipe") or next(iter(document["recipes"].values()))
    named = json.loads(json.dumps(dataclasses.asdict(RECIPES[name.removesuffix("-all")]())))
    for part in ("augment", "model", "optim"):
        # Settings that are newer than the file are at rest.
        assert named[part] | stored[part] == named[part], part
    for key in ("epochs", "batch_size", "accumulation_steps", "train_scales"):
        assert stored["train"][key] == named["train"][key], key
    assert stored["data"]["image_size"] == named["data"]["image_size"]


def test_figures_of_the_longest_training_on_a_cpu_are_those_of_its_result():
    document = json.loads((RESULTS / "fast96.json").read_text())
    metrics, told = document["metrics"], " ".join((RECIPES["fast96"].__doc__ or "").split())
    (row,) = (
        line for line in (ROOT / "README.md").read_text().splitlines() if line.startswith("| `fast96` with `--val")
    )
    plain, six = (f"{metrics[name]['mean']:.2%}" for name in ("test_accuracy", "test_accuracy_tta"))
    minutes, memory = metrics["train_seconds"]["mean"] / 60, metrics["peak_memory_bytes"]["mean"] / 1e9
    assert f"| {plain}" in row
    assert f"{six} by six views | none held out | {minutes:.0f} minutes" in row
    assert f"{plain} of the test images, {six} by six views, " in told
    for text in (row, told):
        assert f"{len(document['seeds'])} seed" in text
        assert f"{memory:.1f} GB" in text
    assert document["recipe"]["data"]["validation_fraction"] == 0


def test_figures_of_the_trainings_on_a_gpu_are_those_of_their_results():
    readme = (ROOT / "README.md").read_text()
    ((words, five),) = json.loads((RESULTS / "fast92-gpu.json").read_text())["metrics"].items()
    assert words.startswith("fast92 --epochs 12 ")
    (row,) = (line for line in readme.splitlines() if "| `fast92`" in line and "H100" in line)
    assert f"{five['test_accuracy']['mean']:.2%}, {five['test_accuracy_tta']['mean']:.2%} by six views" in row
    ((words, one),) = json.loads((RESULTS / "strong.json").read_text())["metrics"].items()
    assert words.startswith("fast96 --compile --epochs 130 ")
    (row,) = (line for line in readme.splitlines() if "| `strong`" in line)
    for text in (row, RECIPES["strong"].__doc__ or ""):
        assert f"{one['test_accuracy_tta']['mean']:.2%}" in text
        assert f"{one['seconds']['mean']:.0f} seconds" in text
    page = (ROOT / "docs" / "speed.md").read_text()
    for level in ("94", "96"):
        document = json.loads((RESULTS / f"race-{level}.json").read_text())
        race, seeds = document["metrics"], len(document["seeds"])
        seconds, accuracy = race[f"fast{level}_seconds"]["median"], race[f"fast{level}_test_accuracy_tta"]["mean"]
        wanted = f"{accuracy:.2%} by six views | none held out | {seconds:.1f} seconds | {seeds} seeds"
        (row,) = (line for line in readme.splitlines() if wanted in line)
        assert row.startswith(f"| `fast{level}`")
        for name, told in ((f"fast{level}", f"`fast{level}`"), (f"airbench{level}", f"airbench's `train{level}`")):
            seconds, accuracy = race[f"{name}_seconds"]["median"], race[f"{name}_test_accuracy_tta"]["mean"]
            assert f"| {told} | {seeds} | {seconds:.1f} s | {accuracy:.2%} |" in page
        assert f"{race['times_airbench']['median']:.2f} times" in page
    mixture = json.loads((RESULTS / "mixture-cuda.json").read_text())["metrics"]
    for shape in ("64->64@32", "128->128@16", "256->256@8", "512->512@4"):
        channels, side = shape.partition("->")[0], shape.rpartition("@")[2]
        whole, single = (mixture[f"{shape} kernels 3 3 3 3 batch {batch} bfloat16"] for batch in (128, 1))
        one, two = (f"{row['chosen']}, {row['times_static'][row['chosen']]['median']:.2f}" for row in (whole, single))
        assert f"| {channels} at {side}x{side} | {one} | {two} |" in page


@pytest.mark.parametrize("machine", ["", "-avx512"])
def test_figures_of_the_mixture_and_of_the_step_are_those_of_their_results(machine):
    page = (ROOT / "docs" / "speed.md").read_text()
    mixture = json.loads((RESULTS / f"mixture{machine}.json").read_text())["metrics"]
    for shape in ("64->64@32", "128->128@16", "256->256@8", "512->512@4"):
        channels, side = shape.partition("->")[0], shape.rpartition("@")[2]
        for batch in ("128", "1", "128 bfloat16", "1 bfloat16"):
            row = mixture[f"{shape} kernels 3 3 3 3 batch {batch}"]
            told = f"{row['chosen']}, {row['times_static'][row['chosen']]['median']:.2f}"
            assert re.search(rf"\| {channels} at {side}x{side} \|.*{re.escape(told)}", page), (shape, batch, told)
    steps = json.loads((RESULTS / f"train_speed{machine}.json").read_text())["metrics"]
    for recipe, found in steps.items():
        if recipe == "peak_flops_per_second":
            assert f"The peak is {found['value'] / 1e9:.0f} GFLOP/s" in page
            continue
        rate, times = found["images_per_second"]["median"], found["times_plain"]["median"]
        share = found["literal_flops_over_peak"]["value"]
        assert f"| `{recipe}` | {rate:.0f} | {times:.2f}x | {share:.0%} |" in page
    one, three = (
        json.loads((RESULTS / f"{name}.json").read_text())["metrics"]["test_accuracy"]["values"]
        for name in ("coursework-bfloat16", "coursework")
    )
    told = " ".join(page.split())
    assert f"`coursework` reached {one[0]:.2%} of the test" in told
    assert f"{100 * min(three):.2f} to {max(three):.2%}" in told


def test_what_mixing_and_what_a_length_buys_are_those_of_their_results():
    page = (ROOT / "docs" / "speed.md").read_text()
    ablation = json.loads((RESULTS / "ablation.json").read_text())["metrics"]
    rows = [line for line in page.splitlines() if re.fullmatch(r"\|[^|]+\| \d+ \| [^|]+\([^|]+\) \|[^|]+\|", line)]
    assert len(rows) == len(ablation)
    for row, found in zip(rows, ablation.values(), strict=True):  # in one order
        accuracy = found["validation_accuracy"]
        values = ", ".join(f"{value:.2%}" for value in accuracy["values"])
        averaged = found["validation_accuracy_tta"]["mean"]
        wanted = f" {found['epochs']['mean']:g} | {accuracy['mean']:.2%} ({values}) | {averaged:.2%} |"
        assert row.endswith(f" |{wanted}"), row
    lengths = json.loads((RESULTS / "frontier.json").read_text())["metrics"]
    assert lengths.keys() == REACHED.keys()
    for recipe, reached in REACHED.items():
        assert {int(epochs) for epochs in lengths[recipe]} == reached.keys()
        for epochs, accuracy in reached.items():
            one, six = (lengths[recipe][str(epochs)][f"validation_accuracy{views}"]["mean"] for views in ("", "_tta"))
            assert accuracy == pytest.approx(one, abs=1e-6)
            count = len(lengths[recipe][str(epochs)]["runs"])
            assert f"| `{recipe}` | {epochs} | {one:.2%} | {six:.2%} | {count} |" in page


def test_figures_of_exported_files_and_of_the_check_are_those_of_their_results():
    shipped = json.loads((RESULTS / "export.json").read_text())["metrics"]
    page = (ROOT / "docs" / "ship.md").read_text()
    for form in ("onnx", "onnx int8", "torch.export"):
        assert f"{shipped[form]['accuracy_after']['value']:.2%}" in page
        assert f"{shipped[form]['speed_after']['images_per_second']:.0f} a second" in page
    assert re.search(r"is worth [0-9.]+ points", shipped["onnx folded"]["refused"])[0] in page
    doctor = json.loads((RESULTS / "doctor.json").read_text())["metrics"]
    page = (ROOT / "docs" / "check.md").read_text()
    assert f"share {doctor['own']['near_duplicates_across']['value']} pairs" in page
    assert f"{doctor['near']['found']} ([results]" in page
    assert f"{doctor['seconds']['value']:.0f} s on two cores" in page


def test_the_measured_coursework_recipe_is_the_one_in_the_table():
    stored = json.loads((RESULTS / "coursework.json").read_text())["recipe"]
    recipe = RECIPES["coursework"]()
    # A setting that came after the measurement has the default that means what was done before it came.
    for group in ("model", "augment", "optim"):
        assert stored[group].items() <= json.loads(json.dumps(getattr(recipe, group).__dict__)).items()
    assert (stored["train"]["epochs"], stored["train"]["batch_size"]) == (50, 75)


def test_the_readmes_way_from_training_to_use_works_when_pasted(tmp_path, monkeypatch, capsys):
    section = (ROOT / "README.md").read_text().partition("## From training to use")[2].partition("\n## ")[0]
    (shell,) = re.findall(r"```sh\n(.*?)```", section, re.DOTALL)
    (python,) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    digit = np.kron(load_digits().images[0], np.ones((16, 16))) * 15  # a zero
    Image.fromarray(digit.astype(np.uint8)).save("picture.png")
    for line in shell.splitlines():
        program, *words = shlex.split(line)
        assert program == "dynaconv"
        assert main(words) == 0
    capsys.readouterr()
    exec(python, {})  # noqa: S102 -- the README's own lines
    assert capsys.readouterr().out.strip() == "0"


def test_figures_of_what_the_server_stands_and_of_strange_pictures_are_those_of_their_results():
    page = (ROOT / "docs" / "serve.md").read_text()
    for name in ("serving", "serving-torch"):
        found = json.loads((RESULTS / f"{name}.json").read_text())["metrics"]
        assert f"| {found['batched']['answers_per_second']:.0f} |" in page
        assert f"{found['at_80_percent']['milliseconds']['200']['p99']:.0f} ms |" in page
        assert all(set(part["statuses"]) == {"200"} for part in found["long"]["parts"])
        assert "before, not answered" not in found["end"]["asked"]
    page = (ROOT / "docs" / "predict.md").read_text()
    for name, told in json.loads((RESULTS / "familiar.json").read_text())["metrics"].items():
        assert f"| {name} | {told['share']:.1%} |" in page


def test_the_promises_quote_what_was_tried():
    page = (ROOT / "docs" / "promises.md").read_text()
    kills = json.loads((RESULTS / "kills.json").read_text())["metrics"]
    assert sum(kind["tried"] for kind in kills.values()) == sum(kind["same"] for kind in kills.values()) == 948
    assert "all 948 went on to the same bits" in page
    fuzz = json.loads((RESULTS / "fuzz.json").read_text())["metrics"]
    assert f"Of {fuzz['cases']:,} mutated files" in page
    assert all(not subject["failed"] for subject in fuzz["subjects"].values())
