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
            "Known: train, labels, resume, evaluate, compare, report, predict, recipes.",
        ),
        (["train", "coursewrok"], "Unknown recipe 'coursewrok'. Did you mean 'coursework'? Known: coursework, fast92."),
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
