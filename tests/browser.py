"""A headless Chromium, controlled over its debugging pipe: no package, no port."""

import fcntl
import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
FLAGS = (
    "--headless=new --no-sandbox --disable-gpu --hide-scrollbars --remote-debugging-pipe "
    "--no-first-run --disable-background-networking --disable-dev-shm-usage"
).split()
TIMEOUT = 120  # seconds


class Browser:
    """One page in one browser. requests: addresses it asked for. errors: on its console."""

    def __init__(self):
        path = next((path for path in map(shutil.which, NAMES) if path), None)
        if path is None:
            pytest.skip("neither chromium nor chrome is installed")
        self.number = 0
        self.requests = []
        self.errors = []
        self.profile = tempfile.mkdtemp()
        self.rest = b""
        self.session = {}
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
        self.session = {"sessionId": answer["sessionId"]}
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
        command = {"id": self.number, "method": method, "params": params} | self.session
        os.write(self.to, json.dumps(command).encode() + b"\0")
        while True:
            answer = self._next()
            params = answer.get("params", {})
            if answer.get("id") == self.number:
                assert "error" not in answer, f"{method}: {answer['error']}"
                return answer["result"]
            if answer.get("method") == "Network.requestWillBeSent":
                self.requests.append(params["request"]["url"])
            elif answer.get("method") in ("Runtime.exceptionThrown", "Log.entryAdded"):
                self.errors.append(str(params))

    def _next(self) -> dict:
        while b"\0" not in self.rest:
            ready, _, _ = select.select([self.back], [], [], TIMEOUT)
            assert ready, f"no answer from the browser within {TIMEOUT} seconds"
            new = os.read(self.back, 1 << 20)
            assert new, f"the browser ended with status {self.process.poll()}"
            self.rest += new
        one, _, self.rest = self.rest.partition(b"\0")
        return json.loads(one)

    def open(self, path: Path) -> None:
        """Load a file and wait until its scripts have run."""
        self.requests = []
        self.errors = []
        self.ask("Page.navigate", url=path.resolve().as_uri())
        end = time.monotonic() + TIMEOUT
        while self.run("document.readyState + location.href") != f"complete{path.as_uri()}":
            assert time.monotonic() < end, f"{path} was not loaded"
            time.sleep(0.02)

    def run(self, script: str):
        """Return the value of a JavaScript expression; wait for a promise."""
        options = dict(returnByValue=True, awaitPromise=True)
        answer = self.ask("Runtime.evaluate", expression=script, **options)
        assert "exceptionDetails" not in answer, f"{script}: {answer['exceptionDetails']}"
        return answer["result"].get("value")
