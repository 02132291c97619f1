"""Chromium without a window, driven over a pipe by its own protocol (https://chromedevtools.github.io/devtools-protocol).

Nothing is installed for it but Debian's `chromium`. The pointer and the keys are the browser's, so that what a reader
could not see, reach or press is not pressed here either.
"""

from __future__ import annotations

import base64
import fcntl
import json
import os
import select
import shutil
import signal
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

PATIENCE = 60.0  # seconds for one answer; a busy machine starts a browser in ten
_FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage",
    "--hide-scrollbars", "--force-device-scale-factor=1", "--lang=en-US", "--remote-debugging-pipe",
]  # fmt: skip
_KEYS = {
    "Enter": 13, "Escape": 27, "Tab": 9, "ArrowDown": 40, "ArrowUp": 38, "ArrowLeft": 37, "ArrowRight": 39, "Home": 36,
    "End": 35, "PageDown": 34, "PageUp": 33, " ": 32,
}  # fmt: skip


def find_chromium() -> str | None:
    """The path of Chromium or Chrome; None where there is none."""
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    return next((path for path in map(shutil.which, names) if path), None)


class Chromium:
    """One browser process. ``with Chromium(path) as browser: page = browser.page(1280, 900)``."""

    def __init__(self, path: str) -> None:
        self._profile = tempfile.TemporaryDirectory(prefix="chromium-", ignore_cleanup_errors=True)
        # The browser reads its orders from descriptor 3 and answers on 4; ours lie above, so that none is overwritten.
        their_in, self._out = _pipe()
        self._in, their_out = _pipe()
        self._pid = os.posix_spawn(
            path,
            [path, *_FLAGS, f"--user-data-dir={self._profile.name}", "about:blank"],
            os.environ,
            file_actions=[
                (os.POSIX_SPAWN_DUP2, their_in, 3),
                (os.POSIX_SPAWN_DUP2, their_out, 4),
                (os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0),
                (os.POSIX_SPAWN_OPEN, 2, os.devnull, os.O_WRONLY, 0),
            ],
            setpgroup=0,
        )
        os.close(their_in)
        os.close(their_out)
        self._buffer = b""
        self._last = 0
        self.events: list[dict[str, Any]] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(OSError, TimeoutError, RuntimeError):
            self.send("Browser.close")
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline and os.waitpid(self._pid, os.WNOHANG)[0] == 0:
            time.sleep(0.02)
        with suppress(ProcessLookupError):
            os.killpg(self._pid, signal.SIGKILL)
        with suppress(ChildProcessError):
            os.waitpid(self._pid, 0)
        os.close(self._in)
        os.close(self._out)
        self._profile.cleanup()

    def send(self, method: str, session: str | None = None, **parameters: Any) -> dict[str, Any]:
        """The browser's answer; events that come before it are kept in `events`. Raises RuntimeError for a refusal."""
        self._last += 1
        message = {"id": self._last, "method": method, "params": parameters} | (
            {"sessionId": session} if session else {}
        )
        data = json.dumps(message).encode() + b"\0"
        while data:
            data = data[os.write(self._out, data) :]
        while True:
            answer = self._receive()
            if answer.get("id") == self._last:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']['message']}")
                return dict(answer["result"])
            self.events.append(answer)

    def wait_for(self, method: str, session: str) -> dict[str, Any]:
        """The next event of this kind that no earlier call has taken; it is taken."""
        at = 0
        while True:
            while at == len(self.events):
                self.events.append(self._receive())
            event = self.events[at]
            if event.get("method") == method and event.get("sessionId") == session:
                return self.events.pop(at)
            at += 1

    def _receive(self) -> dict[str, Any]:
        deadline = time.monotonic() + PATIENCE
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._in], [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                raise TimeoutError(f"Chromium said nothing for {PATIENCE:.0f} s.")
            read = os.read(self._in, 1 << 20)
            if not read:
                raise RuntimeError("Chromium ended.")
            self._buffer += read
        message, _, self._buffer = self._buffer.partition(b"\0")
        return dict(json.loads(message))

    def page(self, width: int, height: int) -> Page:
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        page = Page(self, session, target)
        for domain in ("Page", "Runtime", "Network", "Log"):
            page.send(f"{domain}.enable")
        page.send("Emulation.setFocusEmulationEnabled", enabled=True)
        page.resize(width, height)
        return page


class Page:
    """One tab: what a reader does, and what the browser noticed meanwhile."""

    def __init__(self, browser: Chromium, session: str, target: str) -> None:
        self._browser, self._session, self._target = browser, session, target

    def send(self, method: str, **parameters: Any) -> dict[str, Any]:
        return self._browser.send(method, self._session, **parameters)

    def close(self) -> None:
        self._browser.send("Target.closeTarget", targetId=self._target)

    def resize(self, width: int, height: int) -> None:
        self._size = (width, height)
        self.send("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)

    def colours(self, scheme: str) -> None:
        """What the system prefers: "light" or "dark"."""
        self.send("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])

    def open(self, path: Path) -> None:
        """The file, by its own name on the disk, until it is loaded and its scripts have run."""
        self.send("Page.navigate", url=path.resolve().as_uri())
        self._browser.wait_for("Page.loadEventFired", self._session)

    def reload(self) -> None:
        self.send("Page.reload")
        self._browser.wait_for("Page.loadEventFired", self._session)

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression; a promise is awaited."""
        answer = self.send(
            "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True, userGesture=True
        )
        if "exceptionDetails" in answer:
            raise RuntimeError(answer["exceptionDetails"].get("exception", {}).get("description", "script error"))
        return answer["result"].get("value")

    def settle(self) -> None:
        """Two frames: what was asked for is laid out and drawn."""
        self.evaluate("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(() => done(1))))")

    def text(self, selector: str) -> str:
        return str(self.evaluate(f"document.querySelector({json.dumps(selector)}).innerText"))

    def click(self, selector: str) -> None:
        """Presses the middle of the element's first line; an element that something covers is an error."""
        place = self.evaluate(
            f"""(() => {{
                const it = document.querySelector({json.dumps(selector)});
                if (!it) return null;
                it.scrollIntoView({{block: "center", inline: "nearest"}});
                const box = it.getClientRects()[0];
                if (!box) return null;
                const [x, y] = [box.left + box.width / 2, box.top + box.height / 2];
                const hit = document.elementFromPoint(x, y);
                return hit && (it.contains(hit) || hit.contains(it)) ? [x, y] : null;
            }})()"""
        )
        assert place is not None, f"{selector} cannot be pressed: it is missing, hidden or covered"
        for kind in ("mousePressed", "mouseReleased"):
            self.send("Input.dispatchMouseEvent", type=kind, x=place[0], y=place[1], button="left", clickCount=1)
        self.settle()

    def press(self, *keys: str, shift: bool = False) -> None:
        for key in keys:
            extra: dict[str, Any] = {"text": key} if len(key) == 1 else {"text": "\r"} if key == "Enter" else {}
            code = _KEYS.get(key, ord(key.upper()[0]))
            for kind in ("keyDown", "keyUp"):
                self.send(
                    "Input.dispatchKeyEvent", type=kind, key=key, windowsVirtualKeyCode=code, code=key,
                    modifiers=8 * shift, **(extra if kind == "keyDown" else {}),
                )  # fmt: skip
        self.settle()

    def type(self, text: str) -> None:
        self.send("Input.insertText", text=text)
        self.settle()

    def screenshot(self, *, whole: bool = False) -> bytes:
        """A PNG of what is in view, or of the whole page, for which the window is as high as the page meanwhile: what
        lies beyond a window is not painted for sure."""
        width, height = self._size
        if whole:
            self.resize(width, self.evaluate("document.documentElement.scrollHeight"))
        self.settle()
        picture = base64.b64decode(self.send("Page.captureScreenshot")["data"])
        self.resize(width, height)
        return picture

    def pdf(self) -> bytes:
        return base64.b64decode(self.send("Page.printToPDF", printBackground=True, preferCSSPageSize=True)["data"])

    def _events(self, *methods: str) -> list[dict[str, Any]]:
        self.settle()
        mine = [event for event in self._browser.events if event.get("sessionId") == self._session]
        return [event["params"] for event in mine if event.get("method") in methods]

    def errors(self) -> list[str]:
        """All that the console showed as an error or a warning, exceptions and refused loads included."""
        said = [e["exceptionDetails"]["text"] for e in self._events("Runtime.exceptionThrown")]
        said += [
            str(e["args"])
            for e in self._events("Runtime.consoleAPICalled")
            if e["type"] in ("error", "warning", "assert")
        ]
        return said + [e["entry"]["text"] for e in self._events("Log.entryAdded")]

    def requests(self) -> list[str]:
        """The addresses that the page asked for, its own included."""
        return [event["request"]["url"] for event in self._events("Network.requestWillBeSent")]


def _pipe() -> tuple[int, int]:
    """The reading and the writing end, both above 9."""
    low = os.pipe()
    read, write = (fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in low)
    for end in low:
        os.close(end)
    return read, write
