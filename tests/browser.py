"""A headless Chromium on its debugging pipe: as much of the DevTools protocol as the tests of pages need.

No package and no port: commands go in and events come out as JSON over two pipes (--remote-debugging-pipe).
"""

import base64
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
KEYS = {
    " ": ("Space", 32),
    "Enter": ("Enter", 13),
    "Escape": ("Escape", 27),
    "End": ("End", 35),
    "Home": ("Home", 36),
    "ArrowLeft": ("ArrowLeft", 37),
    "ArrowUp": ("ArrowUp", 38),
    "ArrowRight": ("ArrowRight", 39),
    "ArrowDown": ("ArrowDown", 40),
    "Tab": ("Tab", 9),
    "t": ("KeyT", 84),
}


def find_browser() -> str | None:
    return next((path for path in map(shutil.which, NAMES) if path), None)


class Browser:
    """One page in one browser. requests: addresses it asked for; errors: what its console and its policies said."""

    def __init__(self, path: str, seconds: float = 120):
        self.seconds, self.number, self.requests, self.errors = seconds, 0, [], []
        self.profile, self.rest = tempfile.mkdtemp(), b""
        theirs_in, self.to = os.pipe()
        self.back, theirs_out = os.pipe()
        flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--remote-debugging-pipe"]
        flags += ["--no-first-run", "--disable-background-networking", "--disable-dev-shm-usage"]
        high = [fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in (theirs_in, theirs_out)]  # 3 and 4 may be taken

        def wire() -> None:
            os.dup2(high[0], 3)
            os.dup2(high[1], 4)

        argv = [path, *flags, f"--user-data-dir={self.profile}", "about:blank"]
        quiet = dict(stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        self.process = subprocess.Popen(argv, preexec_fn=wire, close_fds=False, **quiet)
        for end in (theirs_in, theirs_out, *high):
            os.close(end)
        self.session = None
        target = self.ask("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.ask(f"{domain}.enable")

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.to)
        os.close(self.back)
        shutil.rmtree(self.profile, ignore_errors=True)

    def ask(self, method: str, **params) -> dict:
        """Send a command and wait for its answer; events that come meanwhile are kept."""
        self.number += 1
        command = {"id": self.number, "method": method, "params": params}
        command |= {"sessionId": self.session} if self.session else {}
        os.write(self.to, json.dumps(command).encode() + b"\0")
        end = time.monotonic() + self.seconds
        while True:
            answer = self._next(end)
            if answer.get("id") == self.number:
                assert "error" not in answer, f"{method}: {answer['error']}"
                return answer["result"]
            self._keep(answer)

    def _next(self, end: float) -> dict:
        while b"\0" not in self.rest:
            ready, _, _ = select.select([self.back], [], [], max(end - time.monotonic(), 0))
            assert ready, f"the browser said nothing for {self.seconds} seconds"
            new = os.read(self.back, 1 << 20)
            assert new, f"the browser has ended with status {self.process.poll()}"
            self.rest += new
        one, _, self.rest = self.rest.partition(b"\0")
        return json.loads(one)

    def _keep(self, event: dict) -> None:
        params = event.get("params", {})
        if event.get("method") == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"])
        elif event.get("method") == "Runtime.exceptionThrown":
            self.errors.append(params["exceptionDetails"]["text"] + str(params["exceptionDetails"].get("exception")))
        elif event.get("method") == "Log.entryAdded":
            self.errors.append(params["entry"]["text"])

    def open(self, path: Path, width: int = 1200, height: int = 800, dark: bool = False) -> None:
        """Load a file and wait until its scripts have run. width under 700: as on a phone."""
        self.requests, self.errors = [], []
        phone = width < 700
        self.ask("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=phone)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.ask("Emulation.setEmulatedMedia", features=[scheme])
        self.ask("Page.navigate", url=path.resolve().as_uri())
        end = time.monotonic() + self.seconds
        while self.run("document.readyState + location.protocol") != "completefile:":
            assert time.monotonic() < end, f"{path} has not loaded"
            time.sleep(0.02)

    def run(self, script: str):
        """The value of a JavaScript expression; a promise is waited for."""
        found = self.ask("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, f"{script}: {found['exceptionDetails']}"
        return found["result"].get("value")

    def press(self, key: str) -> None:
        code, number = KEYS[key]
        text = {" ": " ", "t": "t", "Enter": "\r"}.get(key)
        about = dict(key=key, code=code, windowsVirtualKeyCode=number)
        self.ask(
            "Input.dispatchKeyEvent",
            type="keyDown" if text else "rawKeyDown",
            **about,
            **({"text": text} if text else {}),
        )
        self.ask("Input.dispatchKeyEvent", type="keyUp", **about)

    def mouse(self, selector: str, kind: str = "move") -> None:
        """Move to the middle of the first element that fits, or press there: kind move | click."""
        box = self.run(
            f"(() => {{ const e = document.querySelector({json.dumps(selector)});"
            "e.scrollIntoView({block: 'center'}); const b = e.getBoundingClientRect();"
            "return [b.left + b.width / 2, b.top + b.height / 2]; })()"
        )
        place = dict(x=box[0], y=box[1])
        self.ask("Input.dispatchMouseEvent", type="mouseMoved", **place)
        if kind == "click":
            for part in ("mousePressed", "mouseReleased"):
                self.ask("Input.dispatchMouseEvent", type=part, button="left", clickCount=1, **place)

    def picture(self) -> bytes:
        """A PNG of what the window shows."""
        return base64.b64decode(self.ask("Page.captureScreenshot", format="png")["data"])
