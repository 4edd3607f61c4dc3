"""Chromium, driven over WebDriver by the standard library, and a TensorBoard for it to open."""

from __future__ import annotations

import base64
import json
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
_FLAGS = """--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking
--disable-component-update --disable-sync --disable-dev-shm-usage --window-size=1400,1000"""


class Browser:
    """One window of Chromium."""

    def __init__(self, port: int, profile: Path) -> None:
        options = {
            "binary": CHROMIUM,
            "args": [*_FLAGS.split(), f"--user-data-dir={profile}"],
        }
        wanted = {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
        self._root = f"http://127.0.0.1:{port}/session"
        made = _post(self._root, {"capabilities": {"alwaysMatch": wanted}})
        self._root += f"/{made['sessionId']}"

    def open(self, address: str) -> None:
        _post(f"{self._root}/url", {"url": address})

    def run(self, script: str) -> Any:
        """What a script returns; `deep(selector)` finds elements inside shadow roots too."""
        return _post(f"{self._root}/execute/sync", {"script": _DEEP + script, "args": []})

    def wait(self, script: str, *, seconds: float = 60) -> Any:
        """What a script returns once that is true."""
        until = time.monotonic() + seconds
        while not (found := self.run(script)):
            assert time.monotonic() < until, f"never true: {script}"
            time.sleep(0.2)
        return found

    def errors(self) -> list[str]:
        """What the console has said since it was asked last, of errors."""
        said = _post(f"{self._root}/se/log", {"type": "browser"})
        return [line["message"] for line in said if line["level"] == "SEVERE"]

    def screenshot(self, path: Path) -> None:
        with urllib.request.urlopen(f"{self._root}/screenshot", timeout=60) as answer:
            path.write_bytes(base64.b64decode(json.load(answer)["value"]))

    def close(self) -> None:
        request = urllib.request.Request(self._root, method="DELETE")
        urllib.request.urlopen(request, timeout=60).close()


_DEEP = """
const deep = (selector, root = document) => [
  ...root.querySelectorAll(selector),
  ...[...root.querySelectorAll('*')].flatMap(
    e => e.shadowRoot ? deep(selector, e.shadowRoot) : [])];
"""


@contextmanager
def browser(scratch: Path) -> Iterator[Browser]:
    """A new Chromium, which ends with the block."""
    port = _free_port()
    assert DRIVER is not None
    with _program([DRIVER, f"--port={port}"], f"http://127.0.0.1:{port}/status"):
        window = Browser(port, scratch / "profile")
        try:
            yield window
        finally:
            window.close()


@contextmanager
def tensorboard(folder: Path) -> Iterator[str]:
    """TensorBoard over a folder; its address."""
    port = _free_port()
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(folder)]
    address = f"http://127.0.0.1:{port}/"
    with _program([*command, "--port", str(port)], address):
        yield address


@contextmanager
def _program(command: list[str], address: str) -> Iterator[None]:
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        until = time.monotonic() + 90
        while True:
            try:
                urllib.request.urlopen(address, timeout=5).close()
                break
            except OSError:
                assert process.poll() is None, f"{command[0]} ended"
                assert time.monotonic() < until, f"{command[0]} does not answer"
                time.sleep(0.2)
        yield
    finally:
        process.terminate()
        process.wait(timeout=30)


def _post(address: str, content: dict[str, Any]) -> Any:
    body = json.dumps(content).encode()
    request = urllib.request.Request(address, body, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=120) as answer:
            return json.load(answer)["value"]
    except urllib.error.HTTPError as error:
        raise AssertionError(error.read().decode()[:500]) from None


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])
