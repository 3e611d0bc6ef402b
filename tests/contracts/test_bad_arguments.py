"""What a user gets wrong on the command line: the exact sentence, exit code 2, nothing on standard output."""

import pytest

from dynaconv.cli import main

KNOWN_SETTINGS_START = "--data, --run-dir, --seeds, --check-resume, --check-repeat, --validation-fraction"


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (
            ["trian"],
            "Unknown verb 'trian'. Did you mean 'train'? "
            "Known: train, check, labels, resume, evaluate, compare, report, predict, export, verify, serve, publish, "
            "recipes.",
        ),
        (["resume"], "`dynaconv resume` needs the folder of a run: dynaconv resume runs/first."),
        (["resume", "a", "b"], "`dynaconv resume` takes the folder of a run and nothing else, received 'b'."),
        (
            ["resume", "a", "--epochs=3"],
            "`dynaconv resume` takes the folder of a run and nothing else, received '--epochs=3'.",
        ),
        (["resume", "gone"], "gone is not the folder of a run: it has no recipe.json."),
        (["evaluate"], "`dynaconv evaluate` needs the folder of a run: dynaconv evaluate runs/first."),
        (["evaluate", "gone", "--split", "train"], "--split takes one of validation, test, received 'train'."),
        (["evaluate", "gone", "--views", "7"], "--views takes one of one, mirror, six, received '7'."),
        (
            ["compare", "a"],
            "`dynaconv compare` needs the folders of two runs: dynaconv compare runs/first runs/second.",
        ),
        (["compare", "a", "b", "c"], "`dynaconv compare` takes no 'c': dynaconv compare runs/first runs/second."),
        (["compare", "gone", "lost"], "gone is not the folder of a run, and holds none (seed-*)."),
        (["report", "gone"], "gone is not the folder of a run: it has no recipe.json."),
        (["train", "--seeds", "0"], "--seeds must be from 1 to 100, received 0."),
        (
            ["train", "--checkpoint-every", "often"],
            "--checkpoint-every takes a time above zero, as 90s, 15m or 1.5h, received 'often'.",
        ),
        (
            ["train", "coursewrok"],
            "Unknown recipe 'coursewrok'. Did you mean 'coursework'? "
            "Known: coursework, fast92, fast94, fast96, strong.",
        ),
        (
            ["train", "none.json"],
            "The recipe none.json cannot be read: [Errno 2] No such file or directory: 'none.json'.",
        ),
        (["train", "--epochs", "x"], "--epochs takes a whole number, received 'x'."),
        (["train", "--degrees", "ten"], "--degrees takes a number, received 'ten'."),
        (["train", "--epochs", "0"], "--epochs must be at least 1, received 0."),
        (["train", "--device", "gpu"], "--device takes one of auto, cpu, cuda, mps, received 'gpu'."),
        (["train", "--learning-rate", "-1"], "--learning-rate must be above 0 and at most 1, received -1."),
        (["train", "--on-bad-file", "ignore"], "--on-bad-file takes one of stop, skip, received 'ignore'."),
        (["train", "coursework", "more"], "Unrecognized options: more. `dynaconv train --help` lists every setting."),
        (["recipes", "coursework"], "`dynaconv recipes` takes no arguments, received 'coursework'."),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_sentence(words, sentence, capsys):
    assert main(words) == 2
    shown = capsys.readouterr()
    assert shown.err == f"dynaconv: {sentence}\n"
    assert shown.out == ""


def test_unknown_setting_offers_the_nearest(capsys):
    assert main(["train", "--epoch", "3"]) == 2
    sentence = capsys.readouterr().err
    assert sentence.startswith("dynaconv: Unknown setting '--epoch'. Did you mean '--epochs'")
    assert KNOWN_SETTINGS_START in sentence


def test_a_value_that_is_missing(capsys):
    assert main(["train", "--epochs"]) == 2
    assert "--epochs" in capsys.readouterr().err


def test_no_verb_shows_the_help(capsys):
    assert main([]) == 2
    assert capsys.readouterr().out.startswith("usage: dynaconv VERB")
