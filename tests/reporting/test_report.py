"""The report of real runs: what it tells, that it needs nothing from outside, that it reads without pictures."""

import re
import shutil
from html.parser import HTMLParser

import pytest

from dynaconv.cli import main
from dynaconv.errors import UserError
from dynaconv.evaluation import evaluate_run
from dynaconv.experiment import run_experiment
from dynaconv.recipe import Recipe, with_settings
from dynaconv.reporting.report import write_report
from dynaconv.rundir import RunDir

SMALL = with_settings(
    Recipe(name="<small & odd>"),
    source="digits",
    epochs=3,
    widths=(8, 16),
    num_convolutions=(2,),
    pool_after=(1,),
    batch_size=32,
    learning_rate=0.01,
    threads=1,
)


class Page(HTMLParser):
    """Elements with their attributes, and that each is closed."""

    VOID = frozenset(("meta", "img", "br", "link"))

    def __init__(self, text):
        super().__init__()
        self.elements, self.open = [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    for seed in (0, 1):
        run_experiment(with_settings(SMALL, seed=seed), folder / f"run{seed}", lambda line: None)
    return folder


@pytest.fixture(scope="module")
def page(runs):
    written = write_report([runs / "run0"])
    assert [path.name for path in written] == ["report.html", "model-card.md"]
    return written[0].read_text(encoding="utf-8")


def test_the_figures_are_those_of_the_run(runs, page):
    run = RunDir.open(runs / "run0")
    judged = run.read_json("evaluation-test.json")
    assert f"<strong>{judged['top1']['value']:.2%}</strong>" in page
    assert "The test images were looked at 1 time." in page.replace("\n", " ")
    for epoch in run.read_metrics():
        assert f"<td>{epoch['training_loss']:.4f}</td>" in page
    for row in judged["confusion"]:
        for count in row:
            assert f">{count}</td>" in page
    assert page.count("<li") >= 20 + len(run.read_json("pictures-test.json")["mistakes"])


def test_names_are_escaped(page):
    assert "<small & odd>" not in page
    assert "&lt;small &amp; odd&gt;" in page


def test_nothing_is_asked_for_from_outside(page):
    parsed = Page(page)
    for tag, attributes in parsed.elements:
        for name in ("src", "href", "xlink:href", "srcset", "action", "data"):
            value = attributes.get(name)
            assert value is None or value.startswith(("data:", "#")), (tag, name, value)
    assert "@import" not in page
    assert not re.search(r"url\((?!#)", page)
    assert parsed.all("script") == []
    assert len(page) < 4_000_000


def test_every_picture_and_figure_has_a_text(page):
    parsed = Page(page)
    assert all(image.get("alt") for image in parsed.all("img"))
    assert len(parsed.all("img")) >= 20
    assert all(figure.get("aria-label") for figure in parsed.all("figure"))
    assert len(parsed.all("figure")) == 3
    assert all(heading.get("scope") for heading in parsed.all("th"))
    assert parsed.all("html")[0]["lang"] == "en"


def test_every_id_stands_once_and_every_reference_has_one(page):
    ids = [attributes["id"] for _, attributes in Page(page).elements if "id" in attributes]
    assert len(ids) > 100
    assert len(ids) == len(set(ids))
    references = re.findall(r'(?:href="#|url\(#)([^")]+)', page)
    assert references
    assert set(references) <= set(ids)


def test_what_no_report_wrote_is_not_replaced(runs, tmp_path, capsys):
    words = ["report", str(runs / "run0"), "--into"]
    for name, content in (("own.html", "<p>mine</p>"), ("model-card.md", "# mine"), ("folder.html", None)):
        folder = tmp_path / name.partition(".")[0]
        folder.mkdir()
        (folder / name).mkdir() if content is None else (folder / name).write_text(content)
        into = folder / (name if name.endswith("html") else "page.html")
        assert main([*words, str(into)]) == 2
        assert f"{name} was not written by `dynaconv report`" in capsys.readouterr().err
        assert [path.name for path in folder.iterdir()] == [name]
        assert content is None or (folder / name).read_text() == content
    for _ in range(2):  # its own it writes anew
        assert main([*words, str(tmp_path / "page.html")]) == 0


def test_the_page_is_the_same_each_time(runs, page, tmp_path):
    (path, _) = write_report([runs / "run0"], tmp_path / "again.html")
    assert path.read_text(encoding="utf-8") == page


def test_several_runs_stand_side_by_side(runs, tmp_path):
    (path, _) = write_report([runs / "run0", runs / "run1"], tmp_path / "both.html")
    text = path.read_text(encoding="utf-8")
    assert "Side by side" in text
    assert "exact test" in text


def test_the_card_has_the_figures(runs, page):
    card = (runs / "run0" / "model-card.md").read_text(encoding="utf-8")
    value = RunDir.open(runs / "run0").read_json("evaluation-test.json")["top1"]["value"]
    assert f"| test accuracy, one view | {value:.2%} (95% interval " in card
    assert "| 3 |" in card


def test_robustness_is_shown_where_it_was_judged(runs, tmp_path):
    shutil.copytree(runs / "run0", tmp_path / "run")
    cell = {"corruption": "fog", "severity": 1, "value": 0.5, "interval": [0.4, 0.6], "count": 5, "images": 10}
    found = {"name": "own", "seed": 0, "clean": None, "mean": 0.5, "relative": None, "worst": cell,
             "by_corruption": {"fog": 0.5}, "cells": [cell]}  # fmt: skip
    RunDir.open(tmp_path / "run").write_json("robustness-test.json", {"own": found})
    (path, _) = write_report([tmp_path / "run"])
    assert "own: 50.00% on average; worst: fog at severity 1, 50.00%." in path.read_text()


def test_views_that_were_asked_for_are_shown_beside_the_one(runs, tmp_path):
    shutil.copytree(runs / "run0", tmp_path / "run")
    run = RunDir.open(tmp_path / "run")
    run.write_recipe(with_settings(SMALL, views="six"))
    run.write_json("result.json", {**run.read_json("result.json"), "test_accuracy_tta": 0.4321})
    page, card = (path.read_text() for path in write_report([run.path]))
    assert "43.21% with six views of each" in page
    assert "| test accuracy, six views averaged | 43.21% |" in card


def test_labels_of_cells_have_a_colour_that_does_not_follow_the_page(runs, tmp_path):
    shutil.copytree(runs / "run0", tmp_path / "run")
    evaluate_run(tmp_path / "run", mixture=True, say=lambda line: None)
    (path, _) = write_report([tmp_path / "run"])
    labels = re.findall(r'<text style="([^"]*)"[^>]*>-?[0-9]+\.[0-9]{2}</text>', path.read_text())
    labels = [style for style in labels if "font-size: 7px" in style]
    assert len(labels) >= 10
    assert all(re.search(r"fill: #(f8f8f8|111111)", style) for style in labels)


def test_what_has_no_report(runs, tmp_path, capsys):
    assert main(["report"]) == 2
    assert "needs the folder of a run" in capsys.readouterr().err
    assert main(["report", str(tmp_path)]) == 2
    assert "is not the folder of a run" in capsys.readouterr().err
    kept = (runs / "run0" / "result.json").read_bytes()
    assert main(["report", str(runs / "run0"), "--into", str(runs / "run0" / "result.json")]) == 2
    assert "the name of a page, ending in .html" in capsys.readouterr().err
    assert (runs / "run0" / "result.json").read_bytes() == kept
    assert main(["report", str(runs / "run0"), str(runs / "run0" / "..") + "/run0"]) == 2
    assert "is named twice" in capsys.readouterr().err
    shutil.copytree(runs / "run0", tmp_path / "run")
    (tmp_path / "run" / "evaluation-test.json").unlink()
    with pytest.raises(UserError, match=r"`dynaconv evaluate .* --split test` makes one"):
        write_report([tmp_path / "run"])
    (tmp_path / "run" / "result.json").unlink()
    with pytest.raises(UserError, match="has not finished"):
        write_report([tmp_path / "run"])


@pytest.mark.parametrize("content", ['{"a": 1}', "[1, 2]", "3", '{"a": [1, {"b": NaN}]}'])
@pytest.mark.parametrize(
    "name",
    [
        "result.json",
        "environment.json",
        "evaluation-test.json",
        "evaluation-validation.json",
        "metrics.jsonl",
        "pictures-test.json",
        "looks.json",
        "split.json",
    ],
)
def test_json_of_another_form_than_a_run_writes_ends_in_a_sentence(runs, tmp_path, name, content, capsys):
    run = tmp_path / "run"
    shutil.copytree(runs / "run0", run)
    (run / name).write_text(content)
    before = sorted(path.name for path in run.iterdir())
    if name == "split.json" and content.startswith("{"):  # the report tells what else there is
        assert main(["report", str(run)]) == 0
        return
    assert main(["report", str(run)]) == 2
    assert capsys.readouterr().err.startswith("dynaconv: ")
    assert sorted(path.name for path in run.iterdir()) == before


@pytest.mark.parametrize("splits", [("validation",), ("validation", "test")])
def test_explained_mistakes_are_shown_those_on_test_images_first(runs, tmp_path, splits):
    run = tmp_path / "run"
    shutil.copytree(runs / "run0", run)
    for split in splits:
        evaluate_run(run, split, explain=True, say=lambda line: None)
    page = write_report([run])[0].read_text(encoding="utf-8")
    told = re.findall(r'alt="[\w -]+ of (\w+) image \d+, taken for', page)
    mistakes = RunDir.open(run).read_json(f"pictures-{splits[-1]}.json")["mistakes"]
    explained = [each for each in mistakes if "explained" in each]
    assert told == [splits[-1]] * sum(len(each["explained"]) for each in explained) != []
    assert f"In its surest mistakes on the {splits[-1]} images" in page


def test_nothing_is_explained_unasked(page):
    assert "Where it looked" not in page
