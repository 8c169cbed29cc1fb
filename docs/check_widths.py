"""Measure every page of the built site in headless Chromium: `python docs/check_widths.py site`.

Code must show whole at 1,280 pixels, no page may be wider than its window at 1,280 or 390, and no heading and no name in a table
may break in mid-word. Without Chromium the check says so and passes.
"""

import functools
import http.server
import json
import queue
import shutil
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

BROWSERS = (
    "chromium",
    "chromium-browser",
    "google-chrome",
    "google-chrome-stable",
)
WIDTHS = (1280, 390)
HARNESS = "/measure-widths"
SECONDS = 180
# Frames of the wished widths show one page after the other; what does not fit is sent back to the server.
MEASURE = """<!doctype html><body><script>
const pages = %s, widths = %s, found = [];
async function measure(page, width) {
  const frame = document.createElement("iframe");
  frame.style.width = width + "px"; frame.style.height = "900px";
  const loaded = new Promise(resolve => frame.onload = resolve);
  frame.src = page; document.body.append(frame); await loaded;
  const inside = frame.contentDocument;
  if (inside.documentElement.scrollWidth > width)
    found.push([page, width, "page", inside.documentElement.scrollWidth]);
  if (width >= 1280) for (const code of inside.querySelectorAll(".md-content pre > code"))
    if (code.scrollWidth > code.clientWidth) found.push([page, width, "code", code.innerText.slice(0, 80)]);
  if (width >= 1280) for (const table of inside.querySelectorAll(".md-content table, .md-typeset__table, .md-typeset__scrollwrap"))
    if (table.scrollWidth > table.clientWidth + 1) found.push([page, width, "table", table.innerText.slice(0, 80)]);
  // A name of letters and dots alone that takes two lines was broken in mid-word, unless a <wbr> after a dot allows it.
  const lines = name => new Set([...name.getClientRects()].map(box => Math.round(box.top))).size;
  if (width >= 1280) for (const name of inside.querySelectorAll(".md-content td code"))
    if (/^[\\w.]+$/.test(name.innerText) && lines(name) > 1 + name.querySelectorAll("wbr").length) found.push([page, width, "name", name.innerText]);
  for (const heading of inside.querySelectorAll(".md-content :is(h1, h2, h3, h4, h5, h6)")) {
    const texts = inside.createTreeWalker(heading, NodeFilter.SHOW_TEXT);
    for (let text = texts.nextNode(); text; text = texts.nextNode()) for (const word of text.data.matchAll(/[\\w.]+/g)) {
      const range = inside.createRange();
      range.setStart(text, word.index); range.setEnd(text, word.index + word[0].length);
      if (lines(range) > 1) found.push([page, width, "heading", heading.innerText.split("\\n")[0]]);
    }
  }
  frame.remove();
}
(async () => {
  try { for (const page of pages) for (const width of widths) await measure(page, width); }
  catch (error) { found.push(["", 0, "error", String(error)]); }
  await fetch("/found", {method: "POST", body: JSON.stringify(found)});
})();
</script></body>"""
ADVICE = {
    "page": "is wider than its window ({}): let the widest table, picture or word in it scroll or break",
    "code": "has code that scrolls sideways, shorten its lines to 80 columns: {}",
    "table": "has a table that scrolls sideways, shorten its names or cells: {}",
    "name": "has a name in a table that breaks in mid-word, give the column room: {}",
    "heading": "has a heading that breaks in mid-word, shorten it or mark in docs/site_hooks.py where its names may break: {}",
    "error": "could not be measured: {}",
}


class Server(http.server.ThreadingHTTPServer):
    """Serves the site and the harness, and keeps what the harness found."""

    def __init__(self, site: Path, harness: str) -> None:
        super().__init__(
            ("127.0.0.1", 0), functools.partial(Handler, directory=str(site))
        )
        self.harness = harness.encode("utf-8")
        self.found: queue.Queue[list] = queue.Queue()


class Handler(http.server.SimpleHTTPRequestHandler):
    """Answers the harness and its pages without a line for each."""

    server: Server

    def do_GET(self) -> None:
        if self.path != HARNESS:
            return super().do_GET()
        self.send_response(200)
        self.send_header("Content-Type", "text/html")
        self.end_headers()
        self.wfile.write(self.server.harness)

    def do_POST(self) -> None:
        length = int(self.headers["Content-Length"])
        self.send_response(204)
        self.end_headers()
        self.server.found.put(json.loads(self.rfile.read(length)))

    def log_message(self, *_args: object) -> None:
        pass


def measure(site: Path, browser: str) -> list[str]:
    """One sentence for each thing that does not fit."""
    pages = [
        path.relative_to(site).as_posix()
        for path in sorted(site.rglob("*.html"))
    ]
    pages = [page for page in pages if page != "404.html"]
    server = Server(site, MEASURE % (json.dumps(pages), json.dumps(WIDTHS)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        options = [
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--no-first-run",
            f"--user-data-dir={profile}",
            "--window-size=1400,1000",
            f"http://127.0.0.1:{server.server_port}{HARNESS}",
        ]
        running = subprocess.Popen(
            [browser, *options],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            found = server.found.get(timeout=SECONDS)
        except queue.Empty:
            found = [
                ["the site", 0, "error", f"no answer in {SECONDS} seconds"]
            ]
        finally:
            running.terminate()
            running.wait()
            server.shutdown()
            server.server_close()
    return [
        f"{page} at {width} pixels {ADVICE[kind].format(what)}"
        for page, width, kind, what in found
    ]


def main(site: Path) -> int:
    """Print what does not fit, and return how many that are."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        print(
            "The widths of the pages were not measured: there is no Chromium here."
        )
        return 0
    problems = measure(site, browser)
    print(
        "\n".join(problems)
        or "All pages fit at " + " and ".join(map(str, WIDTHS)) + " pixels."
    )
    return len(problems)


if __name__ == "__main__":
    sys.exit(1 if main(Path(sys.argv[1])) else 0)
