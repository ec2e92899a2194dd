"""A headless Chromium, controlled over its debugging pipe.

Commands and events are JSON over two pipes: no package, no port.
"""

import fcntl
import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
FLAGS = (
    "--headless=new --no-sandbox --disable-gpu --hide-scrollbars --remote-debugging-pipe "
    "--no-first-run --disable-background-networking --disable-dev-shm-usage"
).split()
KEYS = {" ": 32, "t": 84, "Enter": 13, "Tab": 9, "Escape": 27, "End": 35, "Home": 36}
KEYS |= {"ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40}
CODES = {" ": "Space", "t": "KeyT"}  # of the other keys it is their name
TYPED = {" ": " ", "t": "t", "Enter": "\r"}  # the text that a key types


def find_browser() -> str | None:
    return next((path for path in map(shutil.which, NAMES) if path), None)


class Browser:
    """One page in one browser. requests: addresses it asked for. errors: on its console."""

    def __init__(self, path: str, timeout: float = 120):
        self.timeout = timeout
        self.number = 0
        self.requests = []
        self.errors = []
        self.profile = tempfile.mkdtemp()
        self.rest = b""
        self.session = None
        read_end, self.to = os.pipe()
        self.back, write_end = os.pipe()
        # Chromium uses descriptors 3 and 4, which may be taken: copy ours out of the way.
        high = [fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in (read_end, write_end)]

        def connect() -> None:
            os.dup2(high[0], 3)
            os.dup2(high[1], 4)

        argv = [path, *FLAGS, f"--user-data-dir={self.profile}", "about:blank"]
        quiet = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.DEVNULL)
        self.process = subprocess.Popen(argv, preexec_fn=connect, close_fds=False, **quiet)
        for end in (read_end, write_end, *high):
            os.close(end)
        target = self.ask("Target.createTarget", url="about:blank")["targetId"]
        answer = self.ask("Target.attachToTarget", targetId=target, flatten=True)
        self.session = answer["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.ask(f"{domain}.enable")

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.to)
        os.close(self.back)
        shutil.rmtree(self.profile, ignore_errors=True)

    def ask(self, method: str, **params) -> dict:
        """Send a command, wait for its answer, keep the events that arrive before it."""
        self.number += 1
        command = {"id": self.number, "method": method, "params": params}
        if self.session:
            command["sessionId"] = self.session
        os.write(self.to, json.dumps(command).encode() + b"\0")
        end = time.monotonic() + self.timeout
        while True:
            answer = self._next(end)
            if answer.get("id") == self.number:
                assert "error" not in answer, f"{method}: {answer['error']}"
                return answer["result"]
            self._keep(answer)

    def _next(self, end: float) -> dict:
        while b"\0" not in self.rest:
            ready, _, _ = select.select([self.back], [], [], max(end - time.monotonic(), 0))
            assert ready, f"no answer from the browser within {self.timeout} seconds"
            new = os.read(self.back, 1 << 20)
            assert new, f"the browser ended with status {self.process.poll()}"
            self.rest += new
        one, _, self.rest = self.rest.partition(b"\0")
        return json.loads(one)

    def _keep(self, event: dict) -> None:
        params = event.get("params", {})
        method = event.get("method")
        if method == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"])
        elif method == "Runtime.exceptionThrown":
            self.errors.append(str(params["exceptionDetails"]))
        elif method == "Log.entryAdded":
            self.errors.append(params["entry"]["text"])

    def open(self, path: Path, width: int = 1200, height: int = 800, dark: bool = False) -> None:
        """Load a file and wait until its scripts have run. A width below 700 means a phone."""
        self.requests, self.errors = [], []
        size = dict(width=width, height=height, deviceScaleFactor=1, mobile=width < 700)
        self.ask("Emulation.setDeviceMetricsOverride", **size)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.ask("Emulation.setEmulatedMedia", features=[scheme])
        self.ask("Page.navigate", url=path.resolve().as_uri())
        end = time.monotonic() + self.timeout
        while self.run("document.readyState + location.protocol") != "completefile:":
            assert time.monotonic() < end, f"{path} was not loaded"
            time.sleep(0.02)

    def run(self, script: str):
        """Return the value of a JavaScript expression; wait for a promise."""
        options = dict(returnByValue=True, awaitPromise=True)
        answer = self.ask("Runtime.evaluate", expression=script, **options)
        assert "exceptionDetails" not in answer, f"{script}: {answer['exceptionDetails']}"
        return answer["result"].get("value")

    def press(self, key: str) -> None:
        about = dict(key=key, code=CODES.get(key, key), windowsVirtualKeyCode=KEYS[key])
        down = dict(type="rawKeyDown")
        if key in TYPED:
            down = dict(type="keyDown", text=TYPED[key])
        self.ask("Input.dispatchKeyEvent", **about, **down)
        self.ask("Input.dispatchKeyEvent", **about, type="keyUp")

    def mouse(self, selector: str, kind: str = "move") -> None:
        """Move to the middle of the first element that matches, or click there (kind="click")."""
        x, y = self.run(
            f"(() => {{ const e = document.querySelector({json.dumps(selector)});"
            "e.scrollIntoView({block: 'center'}); const b = e.getBoundingClientRect();"
            "return [b.left + b.width / 2, b.top + b.height / 2]; })()"
        )
        self.ask("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
        if kind == "click":
            self.click(x, y)

    def click(self, x: float, y: float) -> None:
        for kind in ("mousePressed", "mouseReleased"):
            place = dict(x=x, y=y, button="left", clickCount=1)
            self.ask("Input.dispatchMouseEvent", type=kind, **place)
