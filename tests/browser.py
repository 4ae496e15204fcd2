"""A page in headless Chromium, driven over a pipe by the DevTools protocol."""

import base64
import contextlib
import io
import json
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import numpy as np
from matplotlib import image

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
KEYS = {"ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40, "Home": 36, " ": 32, "n": 78, "p": 80}


class Page:
    """One page of a browser."""

    def __init__(self, read: int, write: int):
        self.read, self.write, self.rest, self.number, self.session = read, write, b"", 0, None
        self.errors = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method, **params):
        self.number += 1
        message = {"id": self.number, "method": method, "params": params}
        message |= {"sessionId": self.session} if self.session else {}
        os.write(self.write, json.dumps(message).encode() + b"\0")
        while True:
            answer = self.receive()
            if answer.get("id") == self.number:
                assert "error" not in answer, answer
                return answer["result"]

    def receive(self):
        while b"\0" not in self.rest:
            got = os.read(self.read, 2**20)
            assert got, "the browser has gone"
            self.rest += got
        first, _, self.rest = self.rest.partition(b"\0")
        message = json.loads(first)
        if message.get("method") in ("Runtime.exceptionThrown", "Log.entryAdded"):
            self.errors.append(message["params"])
        if message.get("method") == "Network.requestWillBeSent":
            url = message["params"]["request"]["url"]
            if not url.startswith(("file:", "data:", "about:")):
                self.errors.append(url)
        return message

    def open(self, path: Path, width=1440, height=1000, dark=False):
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.call("Page.navigate", url=path.resolve().as_uri())
        self.wait("document.readyState === 'complete'")

    def wait(self, expression, tries=200):
        pause = "new Promise(done => setTimeout(done, 25))"
        for _ in range(tries):
            if self("Boolean(" + expression + ")"):
                return
            self(pause)
        raise AssertionError(f"{expression} stays false")

    def __call__(self, expression):
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def pixels(self, selector):
        """What is drawn inside an element's box, as an array."""
        x, y, width, height = self(
            f"(b => [b.x + scrollX, b.y + scrollY, b.width, b.height])"
            f"(document.querySelector({selector!r}).getBoundingClientRect())"
        )
        clip = {"x": x, "y": y, "width": width, "height": height, "scale": 1}
        shot = self.call("Page.captureScreenshot", clip=clip, captureBeyondViewport=True)["data"]
        return np.asarray(image.imread(io.BytesIO(base64.b64decode(shot)), format="png"))

    def save(self, path):
        size = self.call("Page.getLayoutMetrics")["cssContentSize"]
        clip = {**size, "scale": 1}
        shot = self.call("Page.captureScreenshot", clip=clip, captureBeyondViewport=True)["data"]
        Path(path).write_bytes(base64.b64decode(shot))

    def mouse(self, kind, x, y):
        more = {} if kind == "mouseMoved" else {"button": "left", "clickCount": 1}
        more |= {"buttons": 1} if kind == "mouseMoved" else {}
        self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, **more)

    def key(self, key, shift=False):
        about = {"key": key, "windowsVirtualKeyCode": KEYS[key], "modifiers": 8 * shift}
        self.call("Input.dispatchKeyEvent", type="keyDown", **about, **({"text": key} if len(key) == 1 else {}))
        self.call("Input.dispatchKeyEvent", type="keyUp", **about)


@contextlib.contextmanager
def browser():
    """A page of a browser of its own."""
    (theirs, write), (read, back) = os.pipe(), os.pipe()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as home:

        def wire():
            a, b = os.dup(theirs), os.dup(back)
            os.dup2(a, 3)
            os.dup2(b, 4)

        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe", f"--user-data-dir={home}"]
        process = subprocess.Popen(
            [CHROMIUM, *flags, "--no-first-run", "--hide-scrollbars", "--disable-dev-shm-usage"],
            preexec_fn=wire,
            close_fds=False,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(theirs)
        os.close(back)
        try:
            yield Page(read, write)
        finally:
            process.kill()
            process.wait()
            os.close(read)
            os.close(write)
