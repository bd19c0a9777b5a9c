"""A real headless Chromium, driven over WebDriver (W3C) by the standard library alone."""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

DRIVER = shutil.which("chromedriver")
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


class Browser:
    """One window; ``url`` is of a session of chromedriver."""

    def __init__(self, url: str) -> None:
        self._url = url

    def open(self, page: Path, fragment: str = "") -> None:
        """Opens a file from disk."""
        self._post("url", {"url": page.absolute().as_uri() + fragment})

    def run(self, script: str, *arguments: Any) -> Any:
        """What a function with this body returns in the page."""
        return self._post("execute/sync", {"script": script, "args": arguments})

    def devtools(self, command: str, **parameters: Any) -> Any:
        """A command of the DevTools protocol."""
        return self._post("goog/cdp/execute", {"cmd": command, "params": parameters})

    def look(self, *, width: int = 1200, height: int = 900, scheme: str = "light") -> None:
        """Gives the window a size and a color scheme."""
        media = [{"name": "prefers-color-scheme", "value": scheme}]
        self.devtools("Emulation.setEmulatedMedia", features=media)
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.devtools("Emulation.setDeviceMetricsOverride", **size)

    def press(self, key: str) -> None:
        """Presses a key, by its DevTools name, where the focus is."""
        codes = {"ArrowLeft": 37, "ArrowRight": 39, "Home": 36, "End": 35, "Enter": 13, "Tab": 9}
        given = {"key": key, "code": key, "windowsVirtualKeyCode": codes[key]}
        text = {"text": "\r"} if key == "Enter" else {}
        self.devtools("Input.dispatchKeyEvent", type="keyDown", **given, **text)
        self.devtools("Input.dispatchKeyEvent", type="keyUp", **given)

    def screenshot(self, file: Path) -> None:
        """What the window shows, as PNG."""
        file.write_bytes(base64.b64decode(self._call("GET", "screenshot")))

    def pdf(self) -> bytes:
        """The page as it would be printed."""
        return base64.b64decode(self.devtools("Page.printToPDF", printBackground=False)["data"])

    def errors(self) -> list[str]:
        """What the console complained of since it was last asked."""
        return [entry["message"] for entry in self._post("se/log", {"type": "browser"})]

    def requests(self) -> list[str]:
        """Where anything was asked for over the network since this was last asked."""
        entries = self._post("se/log", {"type": "performance"})
        events = [json.loads(entry["message"])["message"] for entry in entries]
        sent = [one for one in events if one["method"] == "Network.requestWillBeSent"]
        return [one["params"]["request"]["url"] for one in sent]

    def _post(self, command: str, body: Any) -> Any:
        return self._call("POST", command, body)

    def _call(self, method: str, command: str, body: Any = None) -> Any:
        return call(method, f"{self._url}/{command}", body)


def call(method: str, url: str, body: Any = None) -> Any:
    """The value that WebDriver answers with."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"}, method=method)
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)["value"]


@contextmanager
def started() -> Iterator[Browser]:
    """A browser with a profile of its own, gone afterwards."""
    assert DRIVER
    assert CHROMIUM
    with subprocess.Popen([DRIVER, "--port=0"], stdout=subprocess.PIPE, text=True) as driver:
        try:
            assert driver.stdout
            ready = next(line for line in driver.stdout if "successfully on port" in line)
            port = ready.rstrip(".\n").split()[-1]
            # As root, and in containers, its own sandbox does not start.
            flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
            options = {
                "goog:chromeOptions": {"binary": CHROMIUM, "args": flags},
                "goog:loggingPrefs": {"browser": "ALL", "performance": "ALL"},
            }
            base = f"http://127.0.0.1:{port}/session"
            session = call("POST", base, {"capabilities": {"alwaysMatch": options}})
            url = f"{base}/{session['sessionId']}"
            try:
                yield Browser(url)
            finally:
                call("DELETE", url)
        finally:
            driver.terminate()
