# A headless Chromium that is told what to do through its pipe (Chrome DevTools Protocol).
from __future__ import annotations

import base64
import json
import shutil
import subprocess
from pathlib import Path

PROGRAM = shutil.which("chromium") or shutil.which("chromium-browser") or "chromium"
# DevTools' pipe is the file descriptors 3 and 4, messages end with a zero byte.
COMMAND = 'exec "$0" "$@" 3<&0 4>&1 0</dev/null 1>&2'


class Browser:
    """One page at a time; `problems` is all that its console and network had to complain of."""

    def __init__(self, profile: Path) -> None:
        options = ["--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe"]
        options += [f"--user-data-dir={profile}", "--disable-dev-shm-usage", "--no-first-run"]
        self._process = subprocess.Popen(
            ["/bin/sh", "-c", COMMAND, PROGRAM, *options, "about:blank"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        self._count, self._session = 0, None
        self.problems: list[str] = []
        self.requests: list[str] = []
        target = self.ask("Target.createTarget", url="about:blank")["targetId"]
        attached = self.ask("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Log", "Runtime", "Network"):
            self.ask(f"{domain}.enable")

    def ask(self, method: str, **parameters) -> dict:
        self._count += 1
        message = {"id": self._count, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        self._process.stdin.write(json.dumps(message).encode() + b"\0")
        self._process.stdin.flush()
        while True:
            answer = self._next()
            if answer.get("id") == self._count:
                assert "error" not in answer, answer
                return answer["result"]

    def open(self, page: Path, width: int, dark: bool = False) -> None:
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.ask("Emulation.setEmulatedMedia", features=[scheme])
        self.ask("Emulation.setDeviceMetricsOverride", width=width, height=844,
                 deviceScaleFactor=1, mobile=width < 600)  # fmt: skip
        self.ask("Page.navigate", url=page.resolve().as_uri())
        while self._next().get("method") != "Page.loadEventFired":
            pass

    def value(self, expression: str):
        return self.ask("Runtime.evaluate", expression=expression)["result"].get("value")

    def screenshot(self) -> bytes:
        """The whole page as PNG."""
        answer = self.ask("Page.captureScreenshot", captureBeyondViewport=True)
        return base64.b64decode(answer["data"])

    def close(self) -> None:
        self._session = None
        self.ask("Browser.close")
        self._process.wait(20)

    def _next(self) -> dict:
        data = bytearray()
        while (byte := self._process.stdout.read(1)) != b"\0":
            assert byte, "the browser has ended"
            data += byte
        message = json.loads(data)
        told = message.get("params", {})
        match message.get("method"):
            case "Log.entryAdded" | "Runtime.exceptionThrown" | "Runtime.consoleAPICalled":
                self.problems.append(json.dumps(told))
            case "Network.requestWillBeSent":
                self.requests.append(told["request"]["url"])
        return message
