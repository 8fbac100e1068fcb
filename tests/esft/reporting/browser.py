"""A headless Chromium, told what to do through pipes (the DevTools protocol): what the tests of pages look through."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
_FLAGS = "--headless --no-sandbox --disable-gpu --disable-dev-shm-usage --no-first-run --remote-debugging-pipe".split()


class Browser:
    """One tab.

    Attributes:
        said: what the page has said on the console, errors of loading and of its policy included.
        asked: addresses that it has asked for.
    """

    def __init__(self, write: int, read: int):
        self.write, self.read, self.left, self.count = write, read, b"", 0
        self.said: list[str] = []
        self.asked: list[str] = []
        self.session: str | None = None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **arguments: Any) -> dict[str, Any]:
        """The answer to a command; what the browser tells before it is kept."""
        self.count += 1
        message = {"id": self.count, "method": method, "params": arguments}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.write, json.dumps(message).encode() + b"\0")
        while (answer := self._next()).get("id") != self.count:
            self._note(answer)
        assert "error" not in answer, answer
        return answer["result"]

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self.left:
            more = os.read(self.read, 1 << 20)
            assert more, "the browser has ended"
            self.left += more
        message, _, self.left = self.left.partition(b"\0")
        return json.loads(message)

    def _note(self, event: dict[str, Any]) -> bool:
        """Keep what an event tells. Returns whether it is that the page is loaded."""
        method, values = event.get("method"), event.get("params", {})
        if method == "Log.entryAdded":
            self.said.append(values["entry"]["text"])
        elif method in ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Page.javascriptDialogOpening"):
            self.said.append(json.dumps(values))
        elif method == "Network.requestWillBeSent":
            self.asked.append(values["request"]["url"])
        return method == "Page.loadEventFired"

    def open(self, page: Path, width: int = 1280, dark: bool = False) -> None:
        """Load a file in a window of this width, and wait until it is shown."""
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=800, deviceScaleFactor=1, mobile=width < 600
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.call("Page.navigate", url=page.resolve().as_uri())
        while not self._note(self._next()):
            pass

    def value(self, script: str) -> Any:
        """What an expression in the page gives; this is not bound by the page's policy."""
        return self.call("Runtime.evaluate", expression=script, returnByValue=True)["result"].get("value")

    def picture(self, path: Path) -> None:
        """The whole page as PNG."""
        size = self.call("Page.getLayoutMetrics")["cssContentSize"]
        clip = {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}
        shot = self.call("Page.captureScreenshot", clip=clip, captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(shot["data"]))


@contextmanager
def browser(folder: Path) -> Iterator[Browser]:
    """A browser that keeps its own files in a folder, and ends with the block."""
    there, write = os.pipe()
    read, here = os.pipe()
    program = ["bash", "-c", f'exec "$0" "$@" 3<&{there} 4>&{here}', str(CHROMIUM), *_FLAGS]
    process = subprocess.Popen(
        [*program, f"--user-data-dir={folder}"], pass_fds=(there, here), stderr=subprocess.DEVNULL
    )
    os.close(there)
    os.close(here)
    try:
        yield Browser(write, read)
    finally:
        os.close(write)
        os.close(read)
        process.kill()
        process.wait()
