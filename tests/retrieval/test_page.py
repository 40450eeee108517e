"""The page: what it serves and what it does not, and in headless Chromium what a visitor sees."""

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import tiny
from uploads import BAD, PICTURES, REPO, write_bad, write_pictures

from vit_embed import VitEmbedForDepthEstimation
from vit_embed.retrieval import embed_command, page_command
from vit_embed.retrieval.views import load_views

gradio = pytest.importorskip("gradio", reason="the page needs gradio: pip install 'vit_embed[app]'")

CHROMIUM, DRIVER = Path("/usr/bin/chromium"), Path("/usr/bin/chromedriver")
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    "--window-size=1280,900",
)
SECONDS = 30


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def launched(views) -> tuple:
    """The page and its address, served by a thread of this process."""
    from vit_embed.retrieval.page import build_page, launch

    page, port = build_page(views), free_port()
    launch(page, "127.0.0.1", port)
    return page, f"http://127.0.0.1:{port}/"


@pytest.fixture(scope="module", autouse=True)
def copies(tmp_path_factory):
    """Where Gradio keeps uploads and results: one folder for a process."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("copies")
        patch.setenv("GRADIO_TEMP_DIR", str(folder))
        yield folder


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return write_pictures(tmp_path_factory.mktemp("page") / "pictures")


@pytest.fixture(scope="module")
def store(pictures):
    store = pictures.parent / "photos.parquet"
    arguments = [str(pictures), "--model", str(REPO), "--output", str(store)]
    assert embed_command.main([*arguments, "--dtype", "float32"]) == 0
    return store


@pytest.fixture(scope="module")
def bad(tmp_path_factory):
    return write_bad(tmp_path_factory.mktemp("bad"))


@pytest.fixture(scope="module")
def address(store):
    page, address = launched(load_views(None, store))
    yield address
    page.close()


@pytest.fixture(scope="module")
def depth_address(tmp_path_factory):
    """Of a depth model without a store."""
    folder = tmp_path_factory.mktemp("depth")
    tiny.randomised(VitEmbedForDepthEstimation(tiny.vision_config(max_depth=10.0))).save_pretrained(folder)
    page, address = launched(load_views(str(folder), None))
    yield address
    page.close()


def get(address: str, data: dict | None = None) -> tuple[int, bytes]:
    """Status and body."""
    body = None if data is None else json.dumps(data).encode()
    request = urllib.request.Request(address, body, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=SECONDS) as response:
            return response.status, response.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


def asked(address: str, button: str, values: list) -> dict:
    """What the page answers to a click on a button, as its script asks for it; the last message of the queue."""
    config = json.loads(get(f"{address}config")[1])
    (target,) = (each["id"] for each in config["components"] if each["props"].get("elem_id") == button)
    (call,) = (each["id"] for each in config["dependencies"] if [target, "click"] in each["targets"])
    session = os.urandom(8).hex()
    status, body = get(f"{address}gradio_api/queue/join", {"data": values, "fn_index": call, "session_hash": session})
    assert status == 200, body
    with urllib.request.urlopen(f"{address}gradio_api/queue/data?session_hash={session}", timeout=SECONDS) as stream:
        for line in stream:
            if line.startswith(b"data:"):
                message = json.loads(line[5:])
                if message["msg"] == "process_completed":
                    return message
    raise AssertionError("the queue said nothing")


# ------------------------------------------------------------------------------------------------- what is served


def test_results_are_served_and_nothing_else(address, pictures, store):
    tiles, note = asked(address, "search", ["a red heart", None, "", "", 3])["output"]["data"]
    assert [tile["caption"].split("  ")[1] for tile in tiles[:2]] == [
        "hearts/red-heart.png",
        "hearts/heart-with-arrow.png",
    ]
    assert "3 of 31 pictures" in note
    served = tiles[0]["image"]["path"]
    assert not served.startswith(str(pictures))  # a copy
    assert get(f"{address}gradio_api/file={served}")[0] == 200
    for path in (
        "/etc/passwd",
        f"{pictures}/cat.png",
        f"{pictures}/hearts/red-heart.png",  # the original of a result is not served, either
        f"{served}/../../../../../../../etc/passwd",
        "../../etc/passwd",
        "..%2f..%2fetc%2fpasswd",
        f"{store}/part-00000.parquet",
        "config.json",
        "model.safetensors",
    ):
        status, body = get(f"{address}gradio_api/file={path}")
        assert status in (403, 404), (path, status)
        assert b"root:" not in body and b"PNG" not in body
    for other in ("file=http://127.0.0.1:1/x", "file=https://example.com/x.png", "proxy=https://x.hf.space/"):
        assert get(f"{address}gradio_api/{other}") == (403, b"not served")  # nor fetched


@pytest.mark.parametrize("place", ["picture", "/etc/hostname", "http://127.0.0.1:1/x.png"])
def test_a_path_in_the_place_of_an_upload_is_not_opened(address, pictures, place):
    """Else the maps would show any picture of the machine."""
    path = str(pictures / "cat.png") if place == "picture" else place
    upload = {"path": path, "meta": {"_type": "gradio.FileData"}}
    for button, values in (
        ("search", ["", upload, "", "", 3]),
        ("classify", [upload, "cat\ndog", "{}"]),
        ("draw", [upload, "", 4, 1]),
    ):
        message = asked(address, button, values)
        assert not message["success"], message
        assert "traceback" not in json.dumps(message).lower()


def test_a_failure_of_ours_is_a_line_on_the_page(address):
    for values in ([None, None, None, None, 3], ["cat", None, "", "", "many"], ["cat", {"path": None}, "", "", 2]):
        message = asked(address, "search", values)
        assert "Traceback" not in json.dumps(message)
    assert asked(address, "search", ["a cat", None, "", "", 2])["success"]  # and the queue goes on


def test_it_listens_on_this_machine_alone(address):
    port = int(address.rsplit(":", 1)[1].strip("/"))
    listening = [line.split()[1] for line in Path("/proc/net/tcp").read_text().splitlines()[1:] if " 0A " in line]
    assert [each for each in listening if each.endswith(f":{port:04X}")] == [f"0100007F:{port:04X}"]


def test_the_browser_is_told_to_ask_nobody_else(address):
    with urllib.request.urlopen(address) as response:
        policy = response.headers["Content-Security-Policy"]
        html = response.read().decode()
    assert policy.startswith("default-src 'self';") and "http" not in policy
    assert "fonts.googleapis.com" not in html


def test_text_from_strangers_stays_text():
    from vit_embed.retrieval.page import note

    assert note("<img src=x onerror=alert(1)>") == (
        '<div class="note" role="status">&lt;img src=x onerror=alert(1)&gt;</div>'
    )


@pytest.fixture
def restored(monkeypatch, copies):
    """`main` gives Gradio a folder of its own, by a variable of the process."""
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(copies))


def test_a_missing_gradio_is_named(monkeypatch, capsys, restored):
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.delitem(sys.modules, "vit_embed.retrieval.page", raising=False)
    assert page_command.main(["--model", str(REPO)]) == 1
    assert "pip install 'vit_embed[app]'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere.parquet"], "expected a folder that vit_embed.embed_images wrote, found none at nowhere.parquet"),
        (["--model", "/nowhere"], "expected --model to be a folder or Hub id"),
    ],
)
def test_what_is_not_there_is_named(arguments, message, capsys, restored):
    assert page_command.main(arguments) == 1
    assert message in capsys.readouterr().err


def test_a_taken_port_is_named(capsys, store, restored):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        assert page_command.main([str(store), "--port", str(taken.getsockname()[1])]) == 1
    said = capsys.readouterr()
    assert "error: " in said.err and "port" in said.err
    assert "the page is" not in said.out


# ------------------------------------------------------------------------------------------- what a visitor sees


class Browser:
    """Headless Chromium with a profile of its own."""

    def __init__(self, address: str, profile: str):
        from selenium import webdriver

        options = webdriver.ChromeOptions()
        options.binary_location = str(CHROMIUM)
        for flag in (*FLAGS, f"--user-data-dir={profile}"):
            options.add_argument(flag)
        options.set_capability("goog:loggingPrefs", {"performance": "ALL"})
        self.driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(str(DRIVER)))
        self.open(address)

    def open(self, address: str) -> None:
        self.driver.get(address)
        self.until(lambda: self.all("button[role=tab]"))

    def all(self, css: str) -> list:
        return self.driver.find_elements("css selector", css)

    def one(self, css: str):
        return self.until(lambda: self.all(css))[0]

    def until(self, condition):
        """The first true value of a condition; an AssertionError with the page's text where there is none."""
        from selenium.common.exceptions import WebDriverException

        end = time.monotonic() + SECONDS
        while time.monotonic() < end:
            try:
                if value := condition():
                    return value
            except (WebDriverException, IndexError):
                pass  # being drawn
            time.sleep(0.1)
        raise AssertionError(self.one("body").text)

    def tab(self, name: str) -> None:
        (button,) = (each for each in self.all("button[role=tab]") if each.text == name and each.is_displayed())
        button.click()

    def type(self, box: str, text: str) -> None:
        area = self.one(f"#{box} textarea, #{box} input")
        area.send_keys("\ue009a\ue000\ue003")  # Ctrl-A, Backspace
        area.send_keys(text)

    def upload(self, box: str, file: Path) -> None:
        """Through the file dialogue's own input; any picture before it is taken away."""
        for button in self.all(f"#{box} button[aria-label=Clear], #{box} button[aria-label='Remove Image']"):
            button.click()
        self.one(f"#{box} input[type=file]").send_keys(str(file))
        self.until(lambda: self.all(f"#{box} img"))

    def click(self, button: str) -> None:
        self.one(f"#{button}").click()

    def note(self, box: str) -> str:
        return self.one(f"#{box} .note").text

    def said(self, box: str, words: str) -> str:
        """The note, as soon as it has these words."""
        return self.until(lambda: words in self.note(box) and self.note(box))

    def captions(self, box: str) -> list[str]:
        return [each.text for each in self.all(f"#{box} .caption-label")]

    def loaded(self, box: str) -> int:
        """How many pictures of a gallery the browser has drawn."""
        return self.driver.execute_script(
            f"return [...document.querySelectorAll('#{box} img')].filter(i => i.complete && i.naturalWidth > 0).length"
        )

    def requests(self) -> set[str]:
        messages = [json.loads(each["message"])["message"] for each in self.driver.get_log("performance")]
        sent = [each["params"] for each in messages if each["method"] == "Network.requestWillBeSent"]
        return {each["request"]["url"] for each in sent if each["request"]["url"].startswith(("http", "ws"))}

    def screenshot(self, name: str) -> None:
        """Kept where VIT_EMBED_SCREENSHOTS names a folder."""
        if folder := os.environ.get("VIT_EMBED_SCREENSHOTS"):
            self.driver.save_screenshot(str(Path(folder) / f"{name}.png"))


in_chromium = pytest.mark.skipif(
    not (CHROMIUM.exists() and DRIVER.exists()), reason="no Chromium: apt-get install chromium chromium-driver"
)


@pytest.fixture
def browser():
    """Opens browsers and closes them."""
    pytest.importorskip("selenium", reason="Chromium is driven by selenium: pip install selenium")
    opened = []
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profiles:

        def start(address: str) -> Browser:
            opened.append(Browser(address, f"{profiles}/{len(opened)}"))
            return opened[-1]

        yield start
        for each in opened:
            each.driver.quit()


@in_chromium
@pytest.mark.heavy
def test_a_visitor_searches(address, browser, tmp_path):
    page = browser(address)
    page.type("words", "a red heart")
    page.click("search")
    page.until(lambda: page.loaded("tiles") >= 8)
    assert page.captions("tiles")[:2] == ["0.49 hearts/red-heart.png", "0.39 hearts/heart-with-arrow.png"]
    assert page.note("found") == "12 of 31 pictures, nearest first; the number is the cosine."
    page.screenshot("search")

    page.type("words", "quantum chromodynamics\n")  # Enter searches, too
    page.said("found", "Nothing stands out")

    page.type("words", "")
    page.upload("search-picture", PICTURES / "rocket.png")
    page.click("search")
    page.until(lambda: page.captions("tiles")[0] == "1.00 rocket.png")
    page.type("minus", "a rocket")
    page.click("search")
    page.until(lambda: page.captions("tiles")[0] != "1.00 rocket.png")

    outside = {url for url in page.requests() if not url.startswith((address, address.replace("http", "ws")))}
    assert not outside


@in_chromium
@pytest.mark.heavy
def test_a_visitor_classifies(address, browser):
    page = browser(address)
    page.tab("Classify")
    page.upload("class-picture", PICTURES / "pizza.png")
    page.type("class-names", "pizza\ncar\ntree\ndog\nrocket")
    page.click("classify")
    page.said("classified", "Most likely: pizza (9")
    bars = page.until(lambda: page.all("#bars .bar"))
    widths = [each.size["width"] for each in bars]
    assert len(widths) == 5 and widths == sorted(widths, reverse=True) and widths[0] > 5 * widths[1]
    assert page.one("#bars").text.split()[1:3] == ["pizza", "91%"]
    page.screenshot("classify")


@in_chromium
@pytest.mark.heavy
def test_a_visitor_draws_maps(address, browser):
    page = browser(address)
    page.tab("Maps")
    page.upload("map-picture", PICTURES / "cat.png")
    page.type("map-texts", "the ear\nthe tail")
    page.click("draw")
    page.said("drawn", "9 × 9 patches")
    page.until(lambda: page.loaded("near") == 2 and page.loaded("looks") == 5)
    assert page.captions("looks") == ["layer 4, mean of the heads", *(f"layer 4, head {n}" for n in range(1, 5))]
    assert page.captions("near")[0].startswith("the ear, up to 0.")
    page.driver.set_window_size(1280, 1500)
    page.screenshot("maps")


@in_chromium
@pytest.mark.heavy
def test_a_model_of_depth_has_other_tabs(depth_address, browser):
    page = browser(depth_address)
    assert [each.text for each in page.all("button[role=tab]") if each.is_displayed()] == ["Maps", "Depth"]
    page.tab("Depth")
    page.upload("depth-picture", PICTURES / "cat.png")
    page.click("measure")
    page.said("measured", " m, the median ")
    page.until(lambda: page.loaded("depth") == 2)
    assert page.captions("depth") == ["what the model sees", "depth"]
    page.screenshot("depth")


@in_chromium
@pytest.mark.heavy
def test_bad_uploads_and_texts_get_a_line(address, browser, bad):
    page = browser(address)
    page.click("search")
    page.said("found", "Type some words or add a picture")
    page.type("words", "cat " * 40)
    page.click("search")
    page.said("found", "is too long")
    page.type("words", "a cat")
    for name, words in BAD.items():
        page.upload("search-picture", bad / name)
        page.click("search")
        page.said("found", words)
        if name == "short.png":
            page.screenshot("refused")
        page.until(lambda: not page.all("#tiles img"))
    page.tab("Maps")
    page.upload("map-picture", bad / "short.jpg")
    page.click("draw")
    page.said("drawn", BAD["short.jpg"])
    assert "Error" not in page.one("body").text and not page.all(".toast-body.error")
    page.tab("Search")
    page.upload("search-picture", PICTURES / "rocket.png")
    page.click("search")
    page.said("found", "12 of 31 pictures")  # the queue goes on


@in_chromium
@pytest.mark.heavy
@pytest.mark.parametrize(
    ("name", "size", "words"),
    [
        ("notes.txt", 100, "Only image/* allowed"),
        ("large.png", 41 * 2**20, "exceed the maximum allowed size of 40.0 Mb"),
    ],
)
def test_what_is_not_taken_is_said_at_once(address, browser, tmp_path, name, size, words):
    (tmp_path / name).write_bytes(b"x" * size)
    page = browser(address)
    page.one("#search-picture input[type=file]").send_keys(str(tmp_path / name))
    page.until(lambda: words in page.one(".toast-body").text)
    page.type("words", "a rocket\n")
    page.until(lambda: page.captions("tiles")[0] == "0.54 rocket.png")


@in_chromium
@pytest.mark.heavy
def test_two_visitors_get_their_own_answers(address, browser):
    pages = {"a red heart": browser(address), "a rocket": browser(address)}
    failures = []

    def visit(words: str) -> None:
        try:
            for _ in range(5):
                pages[words].type("words", words)
                pages[words].click("search")
                best = words.removeprefix("a ").replace(" ", "-")
                pages[words].until(lambda: f"{best}.png" in pages[words].captions("tiles")[0])  # noqa: B023
        except Exception as error:
            failures.append((words, error))

    visitors = [threading.Thread(target=visit, args=(words,)) for words in pages]
    for each in visitors:
        each.start()
    for each in visitors:
        each.join()
    assert not failures


@in_chromium
@pytest.mark.heavy
@pytest.mark.parametrize("ending", [signal.SIGINT, signal.SIGTERM])
def test_the_command_serves_the_page(store, browser, ending):
    """As a user starts it, in a process of its own; its copies are gone with it."""
    port = free_port()
    command = [sys.executable, "-m", "vit_embed.app", str(store), "--port", str(port)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    ) as app:
        try:
            assert app.stdout.readline() == f"the page is http://127.0.0.1:{port}/, Ctrl-C stops it\n"
            end = time.monotonic() + SECONDS
            while time.monotonic() < end:
                try:
                    if get(f"http://127.0.0.1:{port}/")[0] == 200:
                        break
                except urllib.error.URLError:
                    time.sleep(0.2)
            page = browser(f"http://127.0.0.1:{port}/")
            page.type("words", "a rocket\n")
            page.until(lambda: page.captions("tiles")[0] == "0.54 rocket.png")
            served = Path(page.one("#tiles img").get_attribute("src").partition("file=")[2])
            assert served.is_file()
        finally:
            app.send_signal(ending)
        assert app.wait(SECONDS) == 0
    assert not served.parents[1].exists()
