"A page in headless Chromium, driven over the DevTools protocol's pipe: no package is needed."

import base64
import itertools
import json
import os
import select
import shutil
import subprocess
import time


def find():
    return next(
        (
            p
            for n in ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
            if (p := shutil.which(n))
        ),
        None,
    )


class Browser:
    "One browser with one page"

    def __init__(self, folder):
        # the browser reads from its descriptor 3 and writes to 4; the shell moves ours there, whatever
        # numbers they have
        there, self.out = os.pipe()
        self.back, here = os.pipe()
        words = [
            find(),
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-dev-shm-usage",
            "--remote-debugging-pipe",
            f"--user-data-dir={folder}",
            "about:blank",
        ]
        self.process = subprocess.Popen(
            ["bash", "-c", f'exec "$@" 3<&{there} 4>&{here}', "browser", *words],
            pass_fds=(there, here),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(there), os.close(here)
        self.ids, self.rest, self.events, self.session = itertools.count(1), b"", [], None
        page = self.ask("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.ask("Target.attachToTarget", targetId=page, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.ask(f"{domain}.enable")

    def ask(self, method, timeout=120, **params):
        "A command's result"
        n = next(self.ids)
        os.write(
            self.out,
            json.dumps(
                dict(
                    id=n,
                    method=method,
                    params=params,
                    **({"sessionId": self.session} if self.session else {}),
                )
            ).encode()
            + b"\0",
        )
        while True:
            m = self._next(timeout)
            if m.get("id") != n:
                self.events.append(m)
            elif "error" in m:
                raise RuntimeError(f"{method}: {m['error']['message']}")
            else:
                return m["result"]

    def _next(self, timeout):
        until = time.monotonic() + timeout
        while b"\0" not in self.rest:
            if not select.select([self.back], [], [], max(0, until - time.monotonic()))[0]:
                raise TimeoutError("the browser doesn't answer")
            if not (data := os.read(self.back, 1 << 20)):
                raise RuntimeError("the browser has ended")
            self.rest += data
        one, _, self.rest = self.rest.partition(b"\0")
        return json.loads(one)

    def run(self, code):
        "The value of a JavaScript expression"
        r = self.ask("Runtime.evaluate", expression=code, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in r:
            raise RuntimeError(r["exceptionDetails"].get("exception", {}).get("description", str(r)))
        return r["result"].get("value")

    def look(self, width, height=900, dark=False):
        "The size of the window, and which colours its owner likes"
        self.ask(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=width < 600,
        )
        self.ask(
            "Emulation.setEmulatedMedia",
            features=[dict(name="prefers-color-scheme", value="dark" if dark else "light")],
        )

    def open(self, path, wait="true"):
        "Load a file, until an expression holds"
        self.events.clear()
        self.ask("Page.navigate", url=path.resolve().as_uri())
        for _ in range(600):
            try:
                if self.run(f"document.readyState === 'complete' && ({wait})"):
                    return
            except RuntimeError:
                pass  # the page is being replaced
            time.sleep(0.1)
        raise TimeoutError(f"{path} isn't ready: {self.complaints()}")

    def complaints(self):
        "What the page threw, logged as an error, or tried to fetch"
        out = [
            e["params"]
            for e in self.events
            if e.get("method") in ("Runtime.exceptionThrown", "Log.entryAdded")
            or e.get("method") == "Runtime.consoleAPICalled"
            and e["params"]["type"] == "error"
        ]
        return out + [
            u
            for e in self.events
            if e.get("method") == "Network.requestWillBeSent"
            and not (u := e["params"]["request"]["url"]).startswith(("file:", "data:", "about:"))
        ]

    def shoot(self, path, whole=False):
        path.write_bytes(
            base64.b64decode(self.ask("Page.captureScreenshot", captureBeyondViewport=whole)["data"])
        )

    def close(self):
        try:
            self.ask("Browser.close", timeout=10)
        except (RuntimeError, TimeoutError, OSError):
            self.process.kill()
        self.process.wait(30), os.close(self.out), os.close(self.back)
