"""The server: every form of a request, every refusal, batching, and an end that answers what it accepted."""

import asyncio
import base64
import contextlib
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request

import numpy as np
import pytest
import uvicorn
from fastapi.testclient import TestClient
from PIL import Image

from dynaconv.cli import main
from dynaconv.errors import UserError
from dynaconv.shipping.batching import Batcher, BusyError, choose_size
from dynaconv.shipping.prediction import PictureClassifier
from dynaconv.shipping.serve import ServeSettings, build_app
from dynaconv.shipping.server import serve

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


class Brightness(PictureClassifier):
    """Bright or dark, by the mean; slow if asked to be."""

    classes = ("dark", "bright")
    image_size, channels, threshold = 8, 3, 0.8

    def __init__(self, seconds=0.0):
        self.seconds, self.batches = seconds, []

    def answer(self, images):
        self.batches.append(len(images))
        time.sleep(self.seconds)
        bright = images.reshape(len(images), -1).mean(1) / 255
        return np.stack([1 - bright, bright, np.where(bright == 1, 3.0, np.nan)], axis=1)

    def detail(self, image):
        return {"heat": "aGVhdA=="}

    def gallery(self):
        return [{"label": "dark", "png": "cG5n"}]


def picture(value, form="PNG", size=(10, 10)):
    buffer = io.BytesIO()
    Image.new("RGB", size, (value,) * 3).save(buffer, form)
    return buffer.getvalue()


@contextlib.contextmanager
def serving(classifier, settings):
    """Serves in a thread, for what a test client cannot do: send half of a request."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = uvicorn.Server(uvicorn.Config(build_app(classifier, settings), log_config=None))
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        yield listener.getsockname()[1]
        server.should_exit = True
        thread.join()


@pytest.fixture
def client():
    with TestClient(build_app(Brightness(), ServeSettings(most_bytes=50_000, most_pictures=3))) as opened:
        yield opened


PNG = {"Content-Type": "image/png"}


@pytest.mark.parametrize("query", ["top=0", "top=x", "top=1001", "detail=perhaps"])
def test_a_wrong_query_is_a_problem_as_well(client, query):
    answer = client.post(f"/v1/predict?{query}", content=picture(0), headers=PNG)
    assert (answer.status_code, answer.headers["content-type"]) == (422, "application/problem+json")
    assert answer.json()["detail"].startswith(f"query.{query.partition('=')[0]}: Input should be")


def test_a_full_house_refuses_before_it_reads():
    slow = Brightness(seconds=0.3)
    with TestClient(build_app(slow, ServeSettings(most_waiting=1, max_wait_ms=0))) as opened:
        answers = []
        first = threading.Thread(
            target=lambda: answers.append(opened.post("/v1/predict", content=picture(0), headers=PNG))
        )
        first.start()
        time.sleep(0.1)
        started = time.perf_counter()
        refused = opened.post("/v1/predict", content=b"no picture at all", headers=PNG)
        seconds = time.perf_counter() - started
        assert opened.get("/healthz").status_code == 200
        first.join()
    assert refused.status_code == 503  # not 422: nobody looked at the body
    assert refused.headers["retry-after"] == "1"
    assert seconds < 0.15
    assert answers[0].status_code == 200


def test_who_goes_away_leaves_no_trace(client, caplog):
    messages = iter([{"type": "http.request", "body": b"half", "more_body": True}, {"type": "http.disconnect"}])
    sent = []

    async def receive():
        return next(messages)

    async def send(message):
        sent.append(message)

    headers = [(b"content-type", b"image/png"), (b"content-length", b"100")]
    scope = {"type": "http", "method": "POST", "path": "/v1/predict", "query_string": b"", "headers": headers}
    with caplog.at_level("INFO", logger="dynaconv.serve"):
        asyncio.run(client.app(scope, receive, send))
    assert sent[0]["status"] == 400
    (line,) = caplog.messages
    assert json.loads(line)["status"] == 400


def test_what_the_page_shows_more(client):
    plain = client.post("/v1/predict", content=picture(0), headers=PNG).json()["predictions"][0]
    assert not {"seen", "heat"} & set(plain)
    detailed = client.post("/v1/predict?detail=1", content=picture(0), headers=PNG).json()["predictions"][0]
    assert detailed["heat"] == "aGVhdA=="
    assert Image.open(io.BytesIO(base64.b64decode(detailed["seen"]))).size == (8, 8)
    assert client.get("/v1/gallery").json() == {"samples": [{"label": "dark", "png": "cG5n"}]}


def test_a_picture_unlike_what_trained_is_told(client):
    far, near = (
        client.post("/v1/predict", content=picture(value), headers=PNG).json()["predictions"][0] for value in (255, 0)
    )
    assert far["notes"][0].startswith("It is unlike the pictures that trained: 3.0 times as far")
    assert near["notes"] == []


def test_a_picture_as_it_is(client):
    answer = client.post("/v1/predict?top=1&detail=1", content=picture(255), headers=PNG)
    assert answer.status_code == 200
    (found,) = answer.json()["predictions"]
    assert (found["label"], found["confidence"], found["abstains"]) == ("bright", 1.0, False)
    assert len(found["top"]) == 1
    with Image.open(io.BytesIO(base64.b64decode(found["seen"]))) as seen:
        assert (seen.size, seen.getpixel((0, 0))) == ((8, 8), (255, 255, 255))
    unsure = client.post("/v1/predict", content=picture(128), headers=PNG).json()["predictions"][0]
    assert unsure["abstains"]
    assert "seen" not in unsure


def test_several_pictures_as_a_form_and_as_json(client):
    uploads = [("pictures", ("a.png", picture(0))), ("pictures", ("b.jpg", picture(255, "JPEG")))]
    by_form = client.post("/v1/predict", files=uploads).json()["predictions"]
    coded = [base64.b64encode(content).decode() for content in (picture(0), picture(255, "JPEG"))]
    by_json = client.post("/v1/predict", json={"pictures": coded}).json()["predictions"]
    assert [each["label"] for each in by_form] == ["dark", "bright"]
    assert by_json == by_form
    assert [each["picture"] for each in by_json] == ["picture 1", "picture 2"]


@pytest.mark.parametrize(
    ("content", "headers", "status", "said"),
    [
        (b"no picture", PNG, 422, "cannot be read as a picture"),
        (b"", PNG, 400, "no picture in the request"),
        (picture(0), {"Content-Type": "text/plain"}, 415, "Send a picture as"),
        (picture(0), {}, 415, "Send a picture as"),
        (b"x" * 50_001, PNG, 413, "At most 50000 bytes"),
        (b"{", {"Content-Type": "application/json"}, 400, "The body must be"),
        (b'{"pictures": "one"}', {"Content-Type": "application/json"}, 400, "The body must be"),
        (b'{"pictures": ["&"]}', {"Content-Type": "application/json"}, 400, "The body must be"),
        (b"[" * 9000, {"Content-Type": "application/json"}, 400, "The body must be"),
        (b'{"pictures": []}', {"Content-Type": "application/json"}, 400, "no picture in the request"),
        (b"--x", {"Content-Type": "multipart/form-data"}, 400, "The form cannot be read"),
    ],
)
def test_what_is_refused(client, content, headers, status, said):
    answer = client.post("/v1/predict", content=content, headers=headers)
    assert answer.status_code == status
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.json()["status"] == status
    assert said in answer.json()["detail"]
    assert client.post("/v1/predict", content=picture(255), headers=PNG).status_code == 200  # it goes on


def test_too_many_pictures_unknown_paths_and_a_bomb(client):
    coded = [base64.b64encode(picture(0)).decode()] * 4
    assert client.post("/v1/predict", json={"pictures": coded}).status_code == 413
    assert client.get("/v1/none").status_code == 404
    assert client.get("/v1/predict").status_code == 405
    bomb = io.BytesIO()
    Image.new("1", (10_000, 10_000)).save(bomb, "PNG")
    answer = client.post("/v1/predict", content=bomb.getvalue(), headers=PNG)
    assert answer.status_code == 422
    assert "million pixels" in answer.json()["detail"]


def test_what_it_says_of_itself(client):
    assert client.get("/v1/model").json()["classes"] == ["dark", "bright"]
    assert client.get("/healthz").json() == {"status": "alive"}
    assert client.get("/readyz").status_code == 200
    client.post("/v1/predict", content=picture(0), headers=PNG)
    told = client.get("/metrics").text
    assert 'dynaconv_requests_total{path="/v1/predict",status="200"} 1.0' in told
    assert "dynaconv_images_waiting 0.0" in told
    schema = client.get("/openapi.json").json()
    assert set(schema["paths"]["/v1/predict"]["post"]["requestBody"]["content"]) == {
        "image/*",
        "multipart/form-data",
        "application/json",
    }


def test_the_page_needs_nothing_from_elsewhere(client):
    page = client.get("/")
    assert page.status_code == 200
    assert "default-src 'self'" in page.headers["content-security-policy"]
    texts = [page.text, client.get("/page.css").text, client.get("/page.js").text]
    assert not [found for text in texts for found in re.findall(r"https?://[^\s\"']+", text)]
    assert 'role="status"' in page.text


def test_a_token_is_asked_for_and_compared():
    with TestClient(build_app(Brightness(), ServeSettings(token="secret"))) as client:  # noqa: S106
        assert client.get("/healthz").status_code == 200
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic secret"}):
            assert client.get("/v1/model", headers=headers).status_code == 401
        assert client.get("/v1/model", headers={"Authorization": "Bearer secret"}).status_code == 200


def test_a_slow_answer_is_given_up():
    with TestClient(build_app(Brightness(0.6), ServeSettings(seconds=0.2))) as client:
        assert client.post("/v1/predict", content=picture(0), headers=PNG).status_code == 504


def test_who_sends_too_slowly_is_refused_and_another_is_answered():
    with serving(Brightness(), ServeSettings(seconds=0.3, most_waiting=1, max_batch=1)) as port:
        head = b"POST /v1/predict HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\nContent-Length: 1000\r\n\r\n"
        with socket.create_connection(("127.0.0.1", port), timeout=10) as slow:
            slow.sendall(head + b"only this")
            answer = slow.makefile("rb").read()  # until it is closed
        assert answer.startswith(b"HTTP/1.1 408")
        assert b"application/problem+json" in answer
        request = urllib.request.Request(f"http://127.0.0.1:{port}/v1/predict", picture(255), PNG)
        assert json.load(urllib.request.urlopen(request))["predictions"][0]["label"] == "bright"


def test_head_is_get_without_its_content(client):
    for path in ("/", "/healthz", "/v1/model"):
        asked, got = client.head(path), client.get(path)
        assert (asked.status_code, asked.content) == (200, b"")
        assert asked.headers["content-length"] == got.headers["content-length"]
    assert client.head("/v1/predict").status_code == 405


def test_who_gave_up_costs_nobody_his_answer():
    started, finish = threading.Event(), threading.Event()
    sizes = []

    def compute(images):
        sizes.append(len(images))
        started.set()
        finish.wait(5)
        if len(sizes) == 2:
            raise RuntimeError("broken")
        return np.zeros((len(images), 2))

    batcher = Batcher(compute, max_batch=2, max_wait=0)
    one = np.zeros((1, 3, 8, 8), dtype=np.uint8)
    first = batcher.submit(one)
    started.wait(5)
    assert not first.cancel()  # it is being computed
    given_up, waits, last = batcher.submit(one), batcher.submit(one), batcher.submit(one)
    assert given_up.cancel()
    finish.set()
    assert first.result(5).shape == (1, 2)
    with pytest.raises(RuntimeError, match="broken"):
        waits.result(5)
    assert last.result(5).shape == (1, 2)
    assert sum(sizes) == 3
    batcher.close()
    assert batcher.waiting == 0


def test_images_are_computed_together_and_each_gets_its_own():
    classifier = Brightness(0.05)
    batcher = Batcher(classifier.probabilities, max_batch=8, max_wait=0.05)
    values = [np.full((1, 3, 8, 8), value, dtype=np.uint8) for value in range(20)]
    answers = [batcher.submit(value) for value in values]
    found = [answer.result(5)[0, 1] for answer in answers]
    assert found == pytest.approx([value / 255 for value in range(20)])
    assert sum(classifier.batches) == 20
    assert max(classifier.batches) == 8
    batcher.close()
    with pytest.raises(BusyError):
        batcher.submit(values[0])


@pytest.mark.parametrize(
    ("fixed", "each", "chosen"),
    [
        (0, 0.002, 1),  # a batch gains nothing
        (0.005, 0.0001, 64),  # the larger, the better, to the last
        (0.004, 0.004, 4),  # 200 a second, of 16 it would be 235
        (0.04, 0.0025, 16),  # 200 a second; 32 would take longer than anybody should wait
        (0.15, 0, 1),  # none is computed soon enough
    ],
)
def test_as_many_are_computed_at_once_as_are_worth_the_wait(fixed, each, chosen):
    sizes = []

    def compute(images):
        assert images.shape[1:] == (3, 8, 8)
        sizes.append(len(images))
        time.sleep(fixed + each * len(images))
        return np.zeros((len(images), 2))

    assert choose_size(compute, (3, 8, 8)) == chosen
    assert max(sizes) <= 64


def test_the_log_tells_how_many_are_computed_together(caplog):
    caplog.set_level("INFO", "dynaconv.serve")
    for settings, told in ((ServeSettings(max_batch=3), 3), (ServeSettings(), 64)):
        with TestClient(build_app(Brightness(0.003), settings)):
            assert f"At most {told} pictures are computed together." in caplog.text


def test_more_than_may_wait_are_refused_and_those_before_answered():
    batcher = Batcher(Brightness(0.1).probabilities, max_batch=1, most_waiting=3)
    one = np.zeros((1, 3, 8, 8), dtype=np.uint8)
    answers = [batcher.submit(one) for _ in range(3)]
    with pytest.raises(BusyError):
        batcher.submit(one)
    batcher.close()
    assert all(answer.done() for answer in answers)


def test_who_has_an_answer_is_not_counted_as_waiting():
    finish = threading.Event()

    def compute(images):
        finish.wait(5)
        return np.zeros((len(images), 2))

    told, still = [], []
    batcher = Batcher(compute, max_batch=8, max_wait=0, on_batch=lambda images, seconds: told.append(images))
    answer = batcher.submit(np.zeros((3, 3, 8, 8), dtype=np.uint8))
    assert batcher.waiting == 3
    answer.add_done_callback(lambda _: still.append((batcher.waiting, list(told))))  # called as it is answered
    finish.set()
    answer.result(5)
    batcher.close()
    assert still == [(0, [3])]


def test_a_failed_batch_is_told_to_its_callers_and_the_next_goes_on():
    calls = []

    def compute(images):
        calls.append(len(images))
        if len(calls) == 1:
            raise RuntimeError("broken")
        return np.zeros((len(images), 2))

    batcher = Batcher(compute, max_batch=8, max_wait=0)
    one = np.zeros((1, 3, 8, 8), dtype=np.uint8)
    with pytest.raises(RuntimeError, match="broken"):
        batcher.submit(one).result(5)
    assert batcher.submit(one).result(5).shape == (1, 2)
    batcher.close()


def test_overload_answers_503_at_once_and_recovers():
    with TestClient(build_app(Brightness(0.3), ServeSettings(max_batch=1, most_waiting=2))) as client:
        statuses, times = [], []

        def ask():
            started = time.monotonic()
            answer = client.post("/v1/predict", content=picture(0), headers=PNG)
            statuses.append(answer.status_code)
            if answer.status_code == 503:
                times.append(time.monotonic() - started)
                assert answer.headers["retry-after"] == "1"

        threads = [threading.Thread(target=ask) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert set(statuses) == {200, 503}
        assert statuses.count(200) >= 2
        assert max(times) < 0.3
        assert client.post("/v1/predict", content=picture(0), headers=PNG).status_code == 200


def test_wrong_use(tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("DYNACONV_TOKEN", raising=False)
    assert main(["serve"]) == 2
    assert main(["serve", str(tmp_path / "none")]) == 2
    assert main(["serve", str(tmp_path), "--port", "70000"]) == 2
    assert "--port must be from 0 to 65535" in capsys.readouterr().err


PROGRAM = """
import sys; sys.path.insert(0, sys.argv[1])
from test_serve import Brightness
from dynaconv.shipping.serve import ServeSettings
from dynaconv.shipping.server import serve
serve(Brightness(0.5), sys.argv[2], int(sys.argv[3]), ServeSettings())
"""


def test_sigterm_in_the_middle_answers_what_was_accepted():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder = os.path.dirname(__file__)  # noqa: PTH120
    process = subprocess.Popen([sys.executable, "-c", PROGRAM, folder, "127.0.0.1", str(port)], stderr=subprocess.PIPE)
    url = f"http://127.0.0.1:{port}"
    for _ in range(600):
        try:
            urllib.request.urlopen(f"{url}/readyz", timeout=1).close()
            break
        except OSError:
            time.sleep(0.1)
    answers = []

    def ask():
        request = urllib.request.Request(f"{url}/v1/predict", picture(255), PNG)
        with urllib.request.urlopen(request, timeout=10) as answer:
            answers.append(json.loads(answer.read())["predictions"][0]["label"])

    threads = [threading.Thread(target=ask) for _ in range(6)]
    for thread in threads:
        thread.start()
    for _ in range(300):  # until all are accepted, be they answered already or not
        with urllib.request.urlopen(f"{url}/metrics", timeout=10) as told:
            waiting = re.search(r"^dynaconv_images_waiting (\S+)", told.read().decode(), re.MULTILINE)
        if float(waiting[1]) + len(answers) >= 6:
            break
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    for thread in threads:
        thread.join()
    _, log = process.communicate(timeout=10)
    assert answers == ["bright"] * 6
    assert process.returncode == 0
    lines = [json.loads(line) for line in log.decode().splitlines() if line.startswith("{")]
    assert sum(line["path"] == "/v1/predict" and line["status"] == 200 for line in lines) == 6


def test_ctrl_c_ends_it_as_sigterm_does_and_a_taken_port_is_told():
    folder = os.path.dirname(__file__)  # noqa: PTH120
    with socket.create_server(("127.0.0.1", 0)) as taken:
        command = [sys.executable, "-c", PROGRAM, folder, "127.0.0.1", str(taken.getsockname()[1])]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 1  # of an error that nothing caught; the command line makes 2 of it
        assert "cannot be listened at: address already in use; name another" in done.stderr
    process = subprocess.Popen([*command[:-1], "0"], stderr=subprocess.PIPE, text=True)
    told = process.stderr.readline()
    while "Application startup complete" not in told:
        told += process.stderr.readline()
    assert re.match(r"Serving on http://127\.0\.0\.1:[1-9][0-9]+, Ctrl-C ends it\.", told)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=10)
    assert process.returncode == 0


def test_another_host_needs_a_token():
    environment = {name: value for name, value in os.environ.items() if name != "DYNACONV_TOKEN"}
    folder = os.path.dirname(__file__)  # noqa: PTH120
    command = [sys.executable, "-c", PROGRAM, folder, "0.0.0.0", "0"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 1
    assert "set DYNACONV_TOKEN" in done.stderr


@pytest.mark.parametrize("host", ["a..b", "a" * 70])
def test_what_is_no_name_of_a_host_is_told(host, monkeypatch):
    monkeypatch.setenv("DYNACONV_TOKEN", "secret")
    with pytest.raises(UserError, match="cannot be listened at"):
        serve(Brightness(), host, 0, ServeSettings(max_batch=1))
