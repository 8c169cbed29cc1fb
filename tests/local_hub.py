"""A hub of models on this machine, to download pretrained weights from without the internet."""

import contextlib
import http.server
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

NOWHERE = "http://127.0.0.1:9"
"""The port of the discard service, where nothing listens."""


class _Hub(http.server.BaseHTTPRequestHandler):
    """As much of a hub as its client needs to download the weights of one repository."""

    repository = ""
    weights = b""

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def log_message(self, *_: Any) -> None:
        pass

    def _answer(self, with_body: bool) -> None:
        is_weights = self.path == f"/{self.repository}/resolve/main/model.safetensors"
        body = self.weights if is_weights else b""
        self.send_response(200 if is_weights or self.path == "/" else 404)
        self.send_header("X-Repo-Commit", "0" * 40)
        self.send_header("ETag", '"some-weights"')
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if with_body:
            self.wfile.write(body)


@contextlib.contextmanager
def serving(repository: str, weights: bytes) -> Iterator[str]:
    """Serve `weights` as model.safetensors of `repository`, and give the address."""
    hub = type("ThisHub", (_Hub,), {"repository": repository, "weights": weights})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()


def environment_of_hub(address: str, home: Path) -> dict[str, str]:
    """The environment of a process whose hub is at `address` and whose cache is `home`; read when the client is imported."""
    own = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
    own["HF_HUB_OFFLINE"] = "0"  # Tests of transformers set it for this process.
    return {
        **own,
        "HF_ENDPOINT": address,
        "HF_HOME": str(home),
        "TORCH_HOME": str(home),
        "HF_HUB_DISABLE_XET": "1",
    }
