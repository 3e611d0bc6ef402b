"""A few mutations of every kind of file, and those that once went wrong; benchmarks/fuzz.py runs many."""

import importlib.util
import sys
from pathlib import Path

import pytest

FUZZ = Path(__file__).parents[2] / "benchmarks" / "fuzz.py"
CASES = 60
ONCE_WRONG = {
    "npz": [7, 14, 54],  # tokens of a damaged header; a member that is no array
    "parquet": [233],  # a column's name that is no UTF-8
    "state": [9, 12, 16, 19, 28, 32, 38, 49, 197, 294, 613, 646, 1224],  # facts of another type, size or number
}


@pytest.fixture(scope="module")
def fuzz():
    specification = importlib.util.spec_from_file_location("fuzz", FUZZ)
    module = importlib.util.module_from_spec(specification)
    sys.modules["fuzz"] = module
    specification.loader.exec_module(module)
    yield module
    del sys.modules["fuzz"]


@pytest.fixture(scope="module")
def subjects(fuzz):
    return fuzz.make_subjects()


NAMES = ["pictures", "parquet", "csv", "npz", "archive", "weights", "model", "recipe", "metrics", "state", "prepared",
         "exclusions", "npy"]  # fmt: skip


def test_names(subjects):
    assert list(subjects) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_every_mutation_is_read_or_refused(name, fuzz, subjects, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DYNACONV_CACHE", str(tmp_path / "place" / "cache"))
    outcomes = {
        number: fuzz.try_case(subjects[name], fuzz.mutated(name, subjects[name], number), tmp_path / "place")
        for number in [*range(CASES), *ONCE_WRONG.get(name, [])]
    }
    assert {number: outcome for number, outcome in outcomes.items() if outcome not in (None, "refused")} == {}
    assert None in outcomes.values(), "the files themselves must be readable"
    assert name == "prepared" or "refused" in outcomes.values()


def test_code_in_a_file_would_be_noticed(fuzz, tmp_path, monkeypatch):
    import pickle

    monkeypatch.chdir(tmp_path)
    subject = fuzz.Subject((), lambda content, folder: pickle.loads(content))
    outcome = fuzz.try_case(subject, pickle.dumps(fuzz._Harmful()), tmp_path / "place")
    assert outcome == "wrote ['ran']"
