"""The loopback server as a fixture."""

import threading
from collections.abc import Iterator

import pytest
from loopback import Server


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """A running server; nothing else on the network can be meant by mistake."""
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_TOKEN", "DYNACONV_DATA"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    running = Server()
    monkeypatch.setenv("HF_ENDPOINT", running.url)
    monkeypatch.setenv("DYNACONV_CIFAR10_URL", f"{running.url}/cifar-10-python.tar.gz")
    thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield running
    running.stop.set()
    running.shutdown()
    thread.join()
    running.server_close()
