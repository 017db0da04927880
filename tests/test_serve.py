"""The page and the endpoint over loopback: what they answer, what they refuse, and who does not get in."""

from __future__ import annotations

import http.client
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file
from test_generate import MIXED
from tiny_models import TINY, lively, one_thread  # noqa: F401 (a fixture that every test here uses)

from data_pipeline.tokenizer import load as load_tokenizer
from gpt2train.generation.decoding import sample
from gpt2train.release.export import _write_json
from gpt2train.release.hf import hf_config, to_hf_state

JSON = {"Content-Type": "application/json"}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, int]]:
    """A process that serves a tiny model as "mini" on a free port."""
    folder = tmp_path_factory.mktemp("serve") / "mini"
    folder.mkdir()
    _write_json(folder / "config.json", hf_config(TINY))
    save_file(to_hf_state(lively(TINY).state_dict(), TINY), folder / "model.safetensors")
    log = folder.parent / "log"
    arguments = [f"run={folder}", "port=0", "max_waiting=2", "max_new_tokens=5000", "max_request_bytes=20000"]
    with open(log, "w") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "gpt2train", "serve", *arguments, "allow_hosts=[gpt.example]"], stderr=file,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
    try:
        deadline = time.monotonic() + 120
        while "http://" not in log.read_text():
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        host, port = log.read_text().split("/")[2].split(":")
        yield host, int(port)
        assert process.poll() is None, log.read_text()
        assert "In a shocking" not in log.read_text()  # prompts are nobody's business
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
        assert "Traceback" not in log.read_text()
    finally:
        process.kill()
        process.wait()


def ask(
    server: tuple[str, int], body: Any, *, headers: dict[str, str] = JSON, method: str = "POST",
    path: str = "/v1/completions",
) -> tuple[int, Any, http.client.HTTPResponse]:  # fmt: skip
    connection = http.client.HTTPConnection(*server, timeout=60)
    try:
        connection.request(method, path, body if isinstance(body, bytes | None) else json.dumps(body), dict(headers))
        response = connection.getresponse()
        raw = response.read()
        is_json = response.getheader("Content-Type", "").startswith("application/json")
        return response.status, json.loads(raw) if is_json else raw.decode(), response
    finally:
        connection.close()


def events(text: str) -> list[Any]:
    lines = text.split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]


def greedy_text(prompt: str, tokens: int) -> str:
    tokenizer = load_tokenizer()
    ids = tokenizer.encode(prompt).tolist()
    got = sample(lively(TINY), ids, max_new_tokens=tokens, temperature=0.0, top_k=0, top_p=1.0, seed=0)
    return tokenizer.decode(list(got))


def test_a_completion_is_the_text_that_generate_writes(server: tuple[str, int]) -> None:
    request = {"model": "mini", "prompt": [MIXED, "One"], "max_tokens": 12, "temperature": 0, "n": 2}
    status, answer, response = ask(server, request)
    assert status == 200, answer
    assert response.getheader("Cache-Control") == "no-store"
    assert answer["object"] == "text_completion"
    assert answer["model"] == "mini"
    assert [c["text"] for c in answer["choices"]] == [
        greedy_text(prompt, 12) for prompt in (MIXED, MIXED, "One", "One")
    ]
    assert [(c["index"], c["finish_reason"]) for c in answer["choices"]] == [(i, "length") for i in range(4)]
    prompt_tokens = len(load_tokenizer().encode(MIXED)) + 1
    assert answer["usage"] == {
        "prompt_tokens": prompt_tokens, "completion_tokens": 48, "total_tokens": prompt_tokens + 48
    }  # fmt: skip


def test_a_stream_gives_the_same_text_in_pieces(server: tuple[str, int]) -> None:
    request = {"prompt": "One", "max_tokens": 20, "seed": 4, "temperature": 0.9, "top_k": 20, "stop": "x"}
    _, whole, _ = ask(server, request)
    _, text, response = ask(server, {**request, "stream": True, "stream_options": {"include_usage": True}})
    assert response.getheader("Content-Type") == "text/event-stream; charset=utf-8"
    *pieces, usage = events(text)
    assert "".join(p["choices"][0]["text"] for p in pieces) == whole["choices"][0]["text"]
    assert [p["choices"][0]["finish_reason"] for p in pieces if p["choices"][0]["finish_reason"]] == [
        whole["choices"][0]["finish_reason"]
    ]
    assert usage["usage"] == whole["usage"]
    assert len(pieces) > 1


def test_echo_and_token_ids(server: tuple[str, int]) -> None:
    ids = load_tokenizer().encode("One two").tolist()
    _, answer, _ = ask(server, {"prompt": ids, "max_tokens": 5, "temperature": 0, "echo": True})
    assert answer["choices"][0]["text"] == "One two" + greedy_text("One two", 5)


def test_the_same_seed_gives_the_same_text(server: tuple[str, int]) -> None:
    texts = [ask(server, {"prompt": "One", "seed": seed})[1]["choices"][0]["text"] for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize(
    ("request_body", "status", "part", "field"),
    [
        ({"prompt": " word" * 100}, 400, "has 100 tokens, and the model's context is 64; give a shorter one", "prompt"),
        ({"prompt": 5}, 400, "must be a text, a list of texts, or token ids", "prompt"),
        ({"prompt": []}, 400, "must be a text", "prompt"),
        ({"prompt": [[70_000]]}, 400, "token ids must lie in 0 … 50256", "prompt"),
        (b'{"prompt": "\\ud800"}', 400, "half a surrogate pair", "prompt"),
        ({"max_tokens": 0}, 400, "max_tokens=0: must be a whole number in [1, 5000]", "max_tokens"),
        ({"max_tokens": True}, 400, "max_tokens=True", "max_tokens"),
        ({"temperature": -1}, 400, "temperature=-1: must be a number in [0, 100]", "temperature"),
        (b'{"temperature": NaN}', 400, "temperature=nan", "temperature"),
        ({"n": 17}, 400, "n=17: must be a whole number in [1, 16]", "n"),
        ({"n": 9, "prompt": ["a", "b"]}, 400, "at most 16 samples a request", "n"),
        ({"stop": ["", "x"]}, 400, "none empty", "stop"),
        ({"logprobs": 5}, 400, "logprobs=5: is not offered here; leave it out", "logprobs"),
        ({"maxtokens": 5}, 400, "there is no such field; known are ", "maxtokens"),
        ({"stream": "yes"}, 400, "must be true or false", "stream"),
        ([1], 400, "must be a JSON object", None),
        (b"{nonsense", 400, "is no JSON", None),
        (b"[" * 19_000, 400, "is no JSON", None),
        (b'{"prompt": "' + b"x" * 30_000 + b'"}', 413, "more than 20000 bytes", None),
    ],
)
def test_what_cannot_be_done_is_said(
    server: tuple[str, int], request_body: Any, status: int, part: str, field: str | None
) -> None:
    got, answer, _ = ask(server, request_body)
    assert got == status
    assert part in answer["error"]["message"]
    assert answer["error"]["type"] == "invalid_request_error"
    assert answer["error"]["param"] == field


def test_another_site_cannot_ask(server: tuple[str, int]) -> None:
    body = {"prompt": "One", "max_tokens": 1}
    for host in ("evil.example", "127.0.0.1.evil.example", "localhost.evil.example:80", ""):
        status, answer, _ = ask(server, body, headers={**JSON, "Host": host})
        assert status in (400, 403), host
    for host in ("localhost:1", "127.0.0.1", "[::1]:80", "10.1.2.3:8000", "gpt.example", "GPT.example.:80"):
        assert ask(server, body, headers={**JSON, "Host": host})[0] == 200, host
    # What a form or a script of another site may send without asking first.
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x"):
        status, answer, _ = ask(server, body, headers={"Content-Type": kind})
        assert status == 415
        assert "must be application/json" in answer["error"]["message"]
    status, _, response = ask(server, None, method="OPTIONS")
    assert status == 405
    assert response.getheader("Allow") == "POST"
    assert response.getheader("Access-Control-Allow-Origin") is None


def test_the_page_needs_nothing_from_elsewhere(server: tuple[str, int]) -> None:
    for path, kind in (("/", "text/html"), ("/page.js", "text/javascript"), ("/page.css", "text/css")):
        status, text, response = ask(server, None, method="GET", path=path)
        assert status == 200
        assert response.getheader("Content-Type") == f"{kind}; charset=utf-8"
        assert "default-src 'none'" in response.getheader("Content-Security-Policy", "")
        assert "://" not in text
    assert ask(server, None, method="GET", path="/../config.json")[0] == 404
    assert ask(server, None, method="GET", path="/v1/models")[1]["data"][0]["id"] == "mini"


def test_a_queue_that_is_full_says_so_and_a_listener_who_leaves_stops_the_work(server: tuple[str, int]) -> None:
    def waiting() -> int:
        return int(ask(server, None, method="GET", path="/health")[1]["waiting"])

    long = json.dumps({"prompt": "One", "max_tokens": 5000, "n": 16, "temperature": 0, "stream": True})
    connections = []
    try:
        for _ in range(3):  # one is computed, two wait
            connection = http.client.HTTPConnection(*server, timeout=60)
            connections.append(connection)
            connection.request("POST", "/v1/completions", long, JSON)
        deadline = time.monotonic() + 60
        while waiting() < 3:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        status, answer, _ = ask(server, {"prompt": "One"})
        assert status == 429
        assert "3 requests are before yours" in answer["error"]["message"]
    finally:
        for connection in connections:
            connection.close()
    deadline = time.monotonic() + 60
    while waiting():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert ask(server, {"prompt": "One", "max_tokens": 2})[0] == 200


def test_requests_at_once_each_get_their_own_answer(server: tuple[str, int]) -> None:
    prompts = ["One", "Two", "Three"]
    answers: dict[str, str] = {}

    def one(prompt: str) -> None:
        _, answer, _ = ask(server, {"prompt": prompt, "max_tokens": 8, "temperature": 0})
        answers[prompt] = answer["choices"][0]["text"]

    threads = [threading.Thread(target=one, args=(p,)) for p in prompts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert answers == {p: greedy_text(p, 8) for p in prompts}


def test_an_address_in_use_is_told(server: tuple[str, int], tmp_path: Path) -> None:
    _write_json(tmp_path / "config.json", hf_config(TINY))
    save_file(to_hf_state(lively(TINY).state_dict(), TINY), tmp_path / "model.safetensors")
    done = subprocess.run(
        [sys.executable, "-m", "gpt2train", "serve", f"run={tmp_path}", f"port={server[1]}"],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert f"port={server[1]}: cannot listen there" in done.stderr
    assert "Traceback" not in done.stderr


# ── in a browser ────────────────────────────────────────────────────────────────────────────────────────────────────

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
CHROMEDRIVER = shutil.which("chromedriver")


class Browser:
    """Chromium through chromedriver's own HTTP interface (W3C WebDriver)."""

    def __init__(self, port: int, profile: Path) -> None:
        self._port = port
        arguments = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
                     "--disable-background-networking", "--disable-component-update", "--disable-sync",
                     f"--user-data-dir={profile}"]  # fmt: skip
        options = {"args": arguments, "binary": CHROMIUM}
        capabilities = {"alwaysMatch": {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}}
        self._session = "/session/" + self._call("POST", "/session", {"capabilities": capabilities})["sessionId"]

    def _call(self, method: str, path: str, body: Any = None) -> Any:
        with closing(http.client.HTTPConnection("127.0.0.1", self._port, timeout=120)) as connection:
            connection.request(method, path, json.dumps(body or {}) if method == "POST" else None)
            value = json.loads(connection.getresponse().read())["value"]
        assert not (isinstance(value, dict) and "error" in value), value
        return value

    def open(self, url: str) -> None:
        self._call("POST", self._session + "/url", {"url": url})

    def run(self, script: str) -> Any:
        return self._call("POST", self._session + "/execute/sync", {"script": script, "args": []})

    def wait(self, script: str, timeout_s: float = 60) -> Any:
        deadline = time.monotonic() + timeout_s
        while not (value := self.run(script)):
            assert time.monotonic() < deadline, script
            time.sleep(0.02)
        return value

    def console(self) -> list[str]:
        return [entry["message"] for entry in self._call("POST", self._session + "/se/log", {"type": "browser"})]

    def close(self) -> None:
        self._call("DELETE", self._session)


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Browser]:
    if not CHROMIUM or not CHROMEDRIVER:
        pytest.skip("chromium and chromedriver are not installed")
    log = tmp_path / "driver"
    with open(log, "w") as file:
        driver = subprocess.Popen([CHROMEDRIVER, "--port=0"], stdout=file, stderr=file, start_new_session=True)
    try:
        deadline = time.monotonic() + 60
        while "on port " not in log.read_text() or "successfully" not in log.read_text():
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.05)
        port = int(log.read_text().split("successfully on port ")[1].split(".")[0])
        it = Browser(port, tmp_path / "profile")
        yield it
        it.close()
    finally:
        os.killpg(driver.pid, signal.SIGKILL)
        driver.wait()


def test_text_streams_into_the_page_and_a_bad_prompt_gets_a_message(server: tuple[str, int], browser: Browser) -> None:
    browser.open(f"http://{server[0]}:{server[1]}/")
    browser.wait("return document.getElementById('model').textContent === 'mini'")
    fill = "for (const [id, value] of Object.entries(%s)) document.getElementById(id).value = value;"
    # Text appears while more is still to come.
    browser.run(fill % json.dumps({"prompt": "One", "temperature": 0, "top_k": 0, "max_tokens": 3000}))
    browser.run("document.getElementById('go').click()")
    lengths = [browser.wait("return document.getElementById('written').textContent.length")]
    lengths.append(
        browser.wait(f"const n = document.getElementById('written').textContent.length; return n > {lengths[0]} && n")
    )
    assert browser.run("return document.getElementById('go').disabled")
    browser.run("document.getElementById('halt').click()")
    browser.wait("return !document.getElementById('go').disabled")
    shown = browser.run("return document.getElementById('written').textContent")
    assert len(shown) >= lengths[1]
    expected = greedy_text("One", 60)
    assert shown[: len(expected)] == expected[: len(shown)]
    # A prompt that is too long.
    browser.run(fill % json.dumps({"prompt": " word" * 100}))
    browser.run("document.getElementById('go').click()")
    says = browser.wait("const p = document.getElementById('problem'); return !p.hidden && p.textContent")
    assert says == "prompt: has 100 tokens, and the model's context is 64; give a shorter one"
    assert browser.run("return document.getElementById('written').textContent") == ""
    # And a good one again: the message goes. Text is text, whatever it holds.
    browser.run(fill % json.dumps({"prompt": "<b>One", "max_tokens": 4}))
    browser.run("document.getElementById('go').click()")
    browser.wait("return document.getElementById('problem').hidden && !document.getElementById('go').disabled")
    assert browser.run("return document.getElementById('text').textContent") == "<b>One" + greedy_text("<b>One", 4)
    assert browser.run("return document.getElementById('text').querySelector('b')") is None
    complaints = [line for line in browser.console() if "400" not in line and "favicon" not in line]
    assert complaints == []
