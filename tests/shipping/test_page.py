"""The page in a real browser: dropped pictures, the keyboard alone, a phone, the dark, a broken file, and no request
that leaves the server. Driven by ChromeDriver over its plain HTTP protocol (W3C WebDriver)."""

import base64
import contextlib
import io
import json
import shutil
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.request

import numpy as np
import pytest
import uvicorn
from PIL import Image

from dynaconv.cli import main
from dynaconv.data.sources import SourceOptions, load_images
from dynaconv.experiment import run_experiment
from dynaconv.recipe import Recipe, with_settings
from dynaconv.shipping.classifier import Classifier
from dynaconv.shipping.serve import ServeSettings, build_app

DRIVER, BROWSER = shutil.which("chromedriver"), shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.skipif(not (DRIVER and BROWSER), reason="needs Chromium and its driver: chromium, chromium-driver"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]
SMALL = with_settings(
    Recipe(name="small"),
    source="digits",
    epochs=4,
    widths=(8, 16),
    num_convolutions=(2,),
    pool_after=(1,),
    batch_size=32,
    learning_rate=0.01,
    threads=1,
    validation_fraction=0.2,
)
DROP = """
const bytes = Uint8Array.from(atob(arguments[0]), (each) => each.charCodeAt(0));
const carried = new DataTransfer();
carried.items.add(new File([bytes], "dropped.png", { type: "image/png" }));
document.dispatchEvent(new DragEvent("drop", { dataTransfer: carried, bubbles: true, cancelable: true }));
"""


def free_port():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


def until(found, seconds=10.0):
    """Waits for something that is true, and returns it."""
    stop = time.monotonic() + seconds
    while not (value := found()):
        assert time.monotonic() < stop, "it did not come"
        time.sleep(0.05)
    return value


class Browser:
    """A session of ChromeDriver."""

    def __init__(self, port):
        self.base = f"http://127.0.0.1:{port}/session"
        arguments = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        options = {"binary": BROWSER, "args": arguments}
        wanted = {"goog:chromeOptions": options, "goog:loggingPrefs": {"performance": "ALL"}}
        self.base += "/" + self.call("POST", "", {"capabilities": {"alwaysMatch": wanted}})["sessionId"]

    def call(self, method, path, content=None):
        body = None if content is None else json.dumps(content).encode()
        request = urllib.request.Request(self.base + path, body, {"Content-Type": "application/json"}, method=method)
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)["value"]

    def run(self, code, *arguments):
        return self.call("POST", "/execute/sync", {"script": code, "args": list(arguments)})

    def emulate(self, command, **options):
        self.call("POST", "/goog/cdp/execute", {"cmd": f"Emulation.{command}", "params": options})

    def press(self, *keys):
        strokes = [{"type": kind, "value": key} for key in keys for kind in ("keyDown", "keyUp")]
        self.call("POST", "/actions", {"actions": [{"type": "key", "id": "keyboard", "actions": strokes}]})

    def choose(self, path):
        (found,) = self.call("POST", "/element", {"using": "css selector", "value": "#file"}).values()
        self.call("POST", f"/element/{found}/value", {"text": str(path)})

    def requests(self):
        events = [
            json.loads(each["message"])["message"] for each in self.call("POST", "/se/log", {"type": "performance"})
        ]
        return [each["params"]["request"]["url"] for each in events if each["method"] == "Network.requestWillBeSent"]

    def verdict(self):
        return until(lambda: self.run("return !document.getElementById('result').hidden && verdict.textContent"))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    path = tmp_path_factory.mktemp("runs") / "run"
    run_experiment(SMALL, path, lambda line: None)
    assert main(["evaluate", str(path), "--neighbours"]) == 0
    return path


@pytest.fixture(scope="module")
def site(run):
    port = free_port()
    app = build_app(Classifier.load(run), ServeSettings())
    server = uvicorn.Server(uvicorn.Config(app, port=port, log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    until(lambda: server.started)
    yield f"http://127.0.0.1:{port}/"
    server.should_exit = True
    thread.join()


@pytest.fixture(scope="module")
def session():
    port = free_port()
    driver = subprocess.Popen([DRIVER, f"--port={port}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def is_up():
        with contextlib.suppress(urllib.error.URLError), urllib.request.urlopen(f"http://127.0.0.1:{port}/status"):
            return True
        return False

    try:
        until(is_up)
        opened = Browser(port)
        yield opened
        opened.call("DELETE", "")
    finally:
        driver.terminate()
        driver.wait(20)


@pytest.fixture
def page(session, site):
    """A laptop's window with the page, freshly loaded."""
    session.emulate("setDeviceMetricsOverride", width=1280, height=900, deviceScaleFactor=1, mobile=False)
    session.emulate("setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": "light"}])
    session.call("POST", "/url", {"url": site})
    until(lambda: session.run("return document.querySelectorAll('#samples button').length === 20"))
    return session


@pytest.fixture(scope="module")
def digit(tmp_path_factory):
    images = load_images("digits", "test", SourceOptions())
    path = tmp_path_factory.mktemp("pictures") / "digit.png"
    Image.fromarray(images.images[0, 0].numpy()).save(path)
    return path


def test_a_dropped_picture_is_answered_with_all_there_is_to_show(page, run, digit):
    page.run(DROP, base64.b64encode(digit.read_bytes()).decode())
    expected = Classifier.load(run).predict(digit)
    assert page.verdict() == f"{expected.label}, {100 * expected.confidence:.1f}%"
    assert page.run("return [...classes.children].map((each) => each.querySelector('.name').textContent)") == [
        label for label, _ in expected.top(10)
    ]
    # Every picture was decoded: where it comes from is right, and the policy of the page lets it in.
    sizes = "return ['given', 'seen', 'heat'].map((id) => document.getElementById(id).naturalWidth)"
    assert until(lambda: page.run(sizes) == [8, 8, 48] and page.run(sizes)) == [8, 8, 48]
    assert page.run("return document.querySelectorAll('#neighbours img').length") == 5
    assert page.run("return document.querySelectorAll('#weights tr').length") == 4  # two blocks of two
    assert page.run("return [truth.hidden, abstain.hidden]") == [True, not expected.abstains]


def test_a_picture_of_the_gallery_tells_whether_it_is_right(page, run):
    page.run("document.querySelectorAll('#samples button')[3].click()")
    label = page.verdict().split(",")[0]
    truth = Classifier.load(run).gallery()[3]["label"]
    word = "Right" if truth == label else "Wrong"
    assert page.run("return truth.textContent") == f"{word}: it is {truth}."


def test_by_keyboard_alone(page, digit):
    page.press("\ue004")  # tab
    assert page.run("return document.activeElement.id") == "file"
    page.choose(digit)
    page.verdict()
    assert page.run("return document.activeElement.id") == "verdict"  # a screen reader goes on from there
    page.press("\ue004")
    assert page.run("return document.activeElement.tagName") == "SUMMARY"
    page.press("\ue007")  # enter
    assert page.run("return mixture.open") is True
    assert page.run("return document.getElementById('status').getAttribute('aria-live')") == "polite"


def test_on_a_phone_in_the_dark(page, digit):
    page.emulate("setDeviceMetricsOverride", width=360, height=740, deviceScaleFactor=2, mobile=True)
    page.emulate("setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": "dark"}])
    page.choose(digit)
    page.verdict()
    page.run("mixture.open = true")
    assert page.run("return document.documentElement.scrollWidth <= innerWidth")
    assert page.run("return getComputedStyle(document.body).backgroundColor") == "rgb(13, 17, 23)"
    small = "return [...document.querySelectorAll('#samples button, #drop, summary')].map((e) => e.clientHeight)"
    assert min(page.run(small)) >= 24  # a finger finds it


def test_a_broken_file_is_told_and_the_next_picture_works(page, digit, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes(digit.read_bytes()[:40])
    page.choose(broken)
    problem = "return document.querySelector('#status.problem')?.textContent"
    assert "cannot be read as a picture" in until(lambda: page.run(problem))
    assert page.run("return result.hidden") is True
    page.choose(digit)
    page.verdict()
    assert page.run(problem) is None


def test_a_picture_unlike_what_trained_is_told(page, tmp_path):
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8), dtype=np.uint8)).save(buffer, "PNG")
    page.run(DROP, base64.b64encode(buffer.getvalue()).decode())
    page.verdict()
    assert page.run("return notes.textContent").startswith("It is unlike the pictures that trained")


def test_no_request_leaves_the_server(page, site, digit):
    page.choose(digit)
    page.verdict()
    asked = page.requests()
    assert f"{site}v1/predict?top=10&detail=1" in asked
    assert [each for each in asked if not each.startswith((site, "data:", f"blob:{site}"))] == []
