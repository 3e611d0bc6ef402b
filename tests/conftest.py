"""What all tests share: an own cache folder, no network look-ups, and small real images."""

import os
from pathlib import Path

import pytest
import torch

torch.set_num_threads(2)


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No test reads or writes the user's cache."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("DYNACONV_CACHE", str(folder))
    return folder


@pytest.fixture
def no_cifar10(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine that has neither CIFAR-10 nor a network."""
    monkeypatch.delenv("DYNACONV_DATA", raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture
def real_cifar10() -> Path:
    """The folder of the real CIFAR-10; skips where it is not there."""
    folder = os.environ.get("DYNACONV_DATA")
    if not folder or not (Path(folder) / "cifar10").exists():
        pytest.skip("needs the real CIFAR-10: set DYNACONV_DATA")
    return Path(folder) / "cifar10"
