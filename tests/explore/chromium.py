"""A headless Chromium, driven through a pipe by the DevTools protocol: enough of it to test a page.

`--remote-debugging-pipe` makes the browser read commands from file descriptor 3 and write answers and events
to 4, each a JSON text that ends in a NUL. No port is opened, and nothing but the standard library is needed.
"""

import base64
import contextlib
import fcntl
import json
import os
import select
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-default-apps",
    "--disable-extensions",
    "--disable-sync",
    "--hide-scrollbars",
    "--host-resolver-rules=MAP * ~NOTFOUND",
    "--no-default-browser-check",
    "--no-first-run",
    "--remote-debugging-pipe",
)
PATIENCE = 30.0

# Key -> the rest of what the protocol wants to know about it.
KEYS: dict[str, dict[str, Any]] = {
    "ArrowLeft": {"code": "ArrowLeft", "windowsVirtualKeyCode": 37},
    "ArrowRight": {"code": "ArrowRight", "windowsVirtualKeyCode": 39},
    "Home": {"code": "Home", "windowsVirtualKeyCode": 36},
    "End": {"code": "End", "windowsVirtualKeyCode": 35},
    "Tab": {"code": "Tab", "windowsVirtualKeyCode": 9},
    "Enter": {"code": "Enter", "windowsVirtualKeyCode": 13, "text": "\r"},
}


def find_chromium() -> str | None:
    """$KMODEL_CHROMIUM, or the first Chromium on PATH."""
    named = os.environ.get("KMODEL_CHROMIUM")
    if named:
        return shutil.which(named)
    return next((found for name in NAMES if (found := shutil.which(name))), None)


class Browser:
    """The process and its pipe."""

    def __init__(self, binary: str, profile: str) -> None:
        to_read, self._to = os.pipe()
        self._from, to_write = os.pipe()
        # The browser wants exactly 3 and 4; above 10 nothing that is copied there can be overwritten first.
        high = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 10) for fd in (to_read, to_write)]
        nowhere = [(os.POSIX_SPAWN_OPEN, fd, os.devnull, os.O_RDWR, 0) for fd in (0, 1, 2)]
        self._pid = os.posix_spawn(
            binary,
            [binary, *FLAGS, f"--user-data-dir={profile}", "about:blank"],
            {**os.environ, "HOME": profile},
            file_actions=[
                *nowhere,
                (os.POSIX_SPAWN_DUP2, high[0], 3),
                (os.POSIX_SPAWN_DUP2, high[1], 4),
            ],
        )
        for fd in (to_read, to_write, *high):
            os.close(fd)
        self._pending = b""
        self._sent = 0
        self.events: list[dict[str, Any]] = []

    def send(self, method: str, session: str | None = None, **params: Any) -> Any:
        """Give a command and return its result; AssertionError with the browser's words if it fails."""
        self._sent += 1
        message: dict[str, Any] = {"id": self._sent, "method": method, "params": params}
        if session is not None:
            message["sessionId"] = session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        deadline = time.monotonic() + PATIENCE
        while True:
            answer = self._receive(deadline, method)
            if answer.get("id") == self._sent:
                assert "error" not in answer, f"{method}: {answer['error']['message']}"
                return answer["result"]
            self.events.append(answer)

    def wait_for(self, method: str) -> dict[str, Any]:
        """The next event of this name."""
        deadline = time.monotonic() + PATIENCE
        while True:
            for i, event in enumerate(self.events):
                if event.get("method") == method:
                    return self.events.pop(i)
            self.events.append(self._receive(deadline, method))

    def _receive(self, deadline: float, what: str) -> dict[str, Any]:
        while b"\0" not in self._pending:
            left = deadline - time.monotonic()
            ready, _, _ = select.select([self._from], [], [], max(left, 0))
            assert ready, f"the browser did not answer {what} in {PATIENCE:.0f} s"
            data = os.read(self._from, 1 << 16)
            assert data, f"the browser ended at {what}"
            self._pending += data
        line, _, self._pending = self._pending.partition(b"\0")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        """End the browser and reap it."""
        with contextlib.suppress(OSError, AssertionError):
            self.send("Browser.close")
        os.close(self._to)
        os.close(self._from)
        deadline = time.monotonic() + 10
        while os.waitpid(self._pid, os.WNOHANG) == (0, 0):
            if time.monotonic() > deadline:
                os.kill(self._pid, signal.SIGKILL)
                os.waitpid(self._pid, 0)
                return
            time.sleep(0.01)


class Page:
    """A tab."""

    def __init__(self, browser: Browser) -> None:
        self.browser = browser
        target = browser.send("Target.createTarget", url="about:blank")["targetId"]
        self._session: str = browser.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable")

    def send(self, method: str, **params: Any) -> Any:
        """Give the tab a command."""
        return self.browser.send(method, self._session, **params)

    def open(self, path: Path, fragment: str = "") -> None:
        """Load a file and wait until it is there."""
        self.send("Page.navigate", url="about:blank")
        self.browser.wait_for("Page.loadEventFired")
        self.browser.events.clear()
        self.send("Page.navigate", url=path.resolve().as_uri() + fragment)
        self.browser.wait_for("Page.loadEventFired")

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression."""
        result = self.send("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in result, f"{expression}: {result['exceptionDetails']}"
        return result["result"].get("value")

    def until(self, expression: str) -> None:
        """Wait until a JavaScript expression is true."""
        deadline = time.monotonic() + PATIENCE
        while not self.evaluate(expression):
            assert time.monotonic() < deadline, f"never: {expression}"
            time.sleep(0.01)

    def text(self, selector: str) -> str:
        """The visible text of the first match."""
        return str(self.evaluate(f"document.querySelector({json.dumps(selector)}).innerText"))

    def press(self, key: str, *, modifiers: int = 0) -> None:
        """Press and release a key."""
        more = KEYS.get(key) or {"text": key, "windowsVirtualKeyCode": ord(key.upper())}
        down = "keyDown" if "text" in more and not modifiers else "rawKeyDown"
        self.send("Input.dispatchKeyEvent", type=down, key=key, modifiers=modifiers, **more)
        released = {k: v for k, v in more.items() if k != "text"}
        self.send("Input.dispatchKeyEvent", type="keyUp", key=key, modifiers=modifiers, **released)

    def click(self, selector: str) -> None:
        """Click the middle of the first match, where a person would."""
        where = self.evaluate(
            f"(() => {{ const e = document.querySelector({json.dumps(selector)}); "
            "e.scrollIntoView({block: 'center', inline: 'center', behavior: 'instant'}); "
            "const r = e.getBoundingClientRect(); return [r.x + r.width / 2, r.y + r.height / 2]; })()"
        )
        for kind in ("mousePressed", "mouseReleased"):
            self.send(
                "Input.dispatchMouseEvent", type=kind, x=where[0], y=where[1], button="left", clickCount=1
            )

    def emulate(
        self, width: int, height: int, *, mobile: bool = False, dark: bool = False, media: str = ""
    ) -> None:
        """Set the size of the window and the preferences of its reader."""
        self.send(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=mobile,
        )
        scheme = "dark" if dark else "light"
        self.send(
            "Emulation.setEmulatedMedia",
            media=media,
            features=[{"name": "prefers-color-scheme", "value": scheme}],
        )

    def screenshot(self, path: Path, *, whole: bool = False) -> None:
        """Write what the tab shows as PNG."""
        data = self.send("Page.captureScreenshot", format="png", captureBeyondViewport=whole)["data"]
        path.write_bytes(base64.b64decode(data))

    def complaints(self) -> list[str]:
        """What the page said was wrong: exceptions, console errors, violations of its security policy."""
        self.evaluate("1")
        found = []
        for event in self.browser.events:
            params = event.get("params", {})
            if event.get("method") == "Runtime.exceptionThrown":
                found.append(params["exceptionDetails"]["text"])
            elif event.get("method") == "Log.entryAdded":
                found.append(params["entry"]["text"])
        return found

    def requests(self) -> list[str]:
        """Every address asked for since open()."""
        self.evaluate("1")
        return [
            event["params"]["request"]["url"]
            for event in self.browser.events
            if event.get("method") == "Network.requestWillBeSent"
        ]


@contextlib.contextmanager
def chromium() -> Iterator[Page]:
    """A fresh browser with one tab."""
    binary = find_chromium()
    assert binary is not None
    with tempfile.TemporaryDirectory(prefix="kmodel-chromium-", ignore_cleanup_errors=True) as profile:
        browser = Browser(binary, profile)
        try:
            yield Page(browser)
        finally:
            browser.close()
