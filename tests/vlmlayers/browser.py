"""A headless Chromium spoken to over its own protocol; no driver and no network."""

from __future__ import annotations

import itertools
import json
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CHROMIUM = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome", "chrome")
     if (found := shutil.which(name))), None)  # fmt: skip
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-extensions",
    "--disable-background-networking", "--disable-dev-shm-usage", "--remote-debugging-port=0",
    "--remote-allow-origins=*", "--force-device-scale-factor=1",
)  # fmt: skip


class Tab:
    """One page: commands go out, events are kept."""

    def __init__(self, socket: Any) -> None:
        self.socket = socket
        self.numbers = itertools.count(1)
        self.events: list[dict[str, Any]] = []

    def send(self, method: str, **parameters: Any) -> dict[str, Any]:
        number = next(self.numbers)
        self.socket.send(json.dumps({"id": number, "method": method, "params": parameters}))
        while True:
            message = self.receive()
            if message.get("id") == number:
                assert "error" not in message, message
                result: dict[str, Any] = message["result"]
                return result

    def receive(self) -> dict[str, Any]:
        """Return the next message; an event is kept as well."""
        message: dict[str, Any] = json.loads(self.socket.recv())
        if "id" not in message:
            self.events.append(message)
        return message

    def run(self, script: str) -> Any:
        """Return the value of an expression in the page."""
        answer = self.send(
            "Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def open(self, path: Path, width: int = 1280, height: int = 900) -> None:
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.send(f"{domain}.enable")
        self.send(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=width < 600,
        )
        before = len(self.events)
        self.send("Page.navigate", url=path.resolve().as_uri())
        # An expression that is asked for meanwhile fails as its page goes.
        while not any(e["method"] == "Page.loadEventFired" for e in self.events[before:]):
            self.receive()
        self.until("document.readyState === 'complete' && location.protocol === 'file:'")

    def until(self, condition: str, seconds: float = 30) -> None:
        end = time.monotonic() + seconds
        while not self.run(f"Boolean({condition})"):
            assert time.monotonic() < end, f"never came true: {condition}"
            time.sleep(0.05)

    def errors(self) -> list[str]:
        """Exceptions and error messages of the page so far."""
        self.run("0")
        found = [
            json.dumps(e["params"])
            for e in self.events
            if e.get("method") == "Runtime.exceptionThrown"
            or (e.get("method") == "Log.entryAdded" and e["params"]["entry"]["level"] == "error")
        ]
        return found

    def requests(self) -> list[str]:
        """Addresses that were asked for, without what is inside the page."""
        self.run("0")
        urls = [
            e["params"]["request"]["url"]
            for e in self.events
            if e.get("method") == "Network.requestWillBeSent"
        ]
        return [url for url in urls if not url.startswith(("data:", "blob:"))]


@contextmanager
def chromium(profile: Path) -> Iterator[Tab]:
    """Start a browser of our own and yield a tab; it is ended on the way out."""
    import websocket

    assert CHROMIUM is not None
    process = subprocess.Popen(
        [CHROMIUM, *FLAGS, f"--user-data-dir={profile}", "about:blank"],
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    )
    socket = None
    try:
        assert process.stderr is not None
        address = next(
            m.group(1)
            for line in process.stderr
            if (m := re.search(r"listening on ws://([^/]+)/", line))
        )
        import urllib.request

        with urllib.request.urlopen(f"http://{address}/json/list", timeout=20) as answer:
            page = next(t for t in json.load(answer) if t["type"] == "page")
        socket = websocket.create_connection(page["webSocketDebuggerUrl"], timeout=60)
        yield Tab(socket)
    finally:
        if socket is not None:
            socket.close()
        process.terminate()
        process.wait(timeout=20)
