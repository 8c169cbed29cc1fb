"""Stores for tests: one in memory that fails, hangs and lists late on demand, and a real S3 server on loopback."""

import contextlib
import urllib.request
from collections.abc import Iterator

import fsspec
from fsspec.implementations.memory import MemoryFileSystem


class Unreliable(MemoryFileSystem):
    """A store in memory, at addresses such as `unreliable://run`. Its class holds how it behaves."""

    protocol = "unreliable"
    store = {}  # noqa: RUF012 as in the base class, files are shared by all instances
    pseudo_dirs = [""]  # noqa: RUF012
    cachable = False

    fails_at = frozenset()
    """Numbers, from 1, of the writes that fail; `None` among them stands for all."""
    error = ConnectionError
    old_listing = None
    """Names that are listed, instead of those that are there."""
    gate = None
    """An event without which no write ends."""
    writes = 0
    written = []  # noqa: RUF012 names, in their order

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(path.replace("unreliable://", "memory://"))

    @classmethod
    def reset(cls):
        cls.store.clear()
        cls.pseudo_dirs[:] = [""]
        cls.fails_at, cls.error, cls.old_listing, cls.gate = frozenset(), ConnectionError, None, None
        cls.writes, cls.written = 0, []

    def put_file(self, lpath, rpath, *args, **kwargs):
        cls = type(self)
        cls.writes += 1
        if cls.gate is not None:
            assert cls.gate.wait(60)
        if cls.fails_at & {cls.writes, None}:
            raise cls.error("the connection broke")
        super().put_file(lpath, rpath, *args, **kwargs)
        if "/.accel_probe" not in rpath:
            cls.written.append(rpath.removesuffix(".incomplete"))

    def ls(self, path, detail=True, **kwargs):
        entries = super().ls(path, detail=True, **kwargs)
        if self.old_listing is not None:
            entries = [entry for entry in entries if entry["name"].rpartition("/")[2] in self.old_listing]
            entries += [
                {"name": f"{path}/{name}", "size": 0, "type": "directory"}
                for name in self.old_listing
                if name not in {entry["name"].rpartition("/")[2] for entry in entries}
            ]
        return entries if detail else [entry["name"] for entry in entries]

    @classmethod
    def flip_last_bit(cls, path):
        """Damage a file."""
        content = bytearray(cls.store[path].getvalue())
        content[-1] ^= 1
        cls.store[path].seek(0)
        cls.store[path].write(bytes(content))

    @classmethod
    def states(cls, root="run"):
        """Names of the complete states."""
        suffix = "/trainer_state.json"
        return sorted(
            path.removesuffix(suffix).rpartition("/")[2]
            for path in cls.store
            if path.startswith(f"/{root}/update") and path.endswith(suffix)
        )


fsspec.register_implementation("unreliable", Unreliable, clobber=True)


@contextlib.contextmanager
def s3_server(monkeypatch) -> Iterator[str]:
    """Run a server that speaks S3, with an empty bucket named `bucket`, and give its address."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    url = f"http://{host}:{port}"
    variables = {
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": url,
    }
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    try:
        import s3fs

        # What a server before has held is kept by the process.
        urllib.request.urlopen(urllib.request.Request(f"{url}/moto-api/reset", method="POST")).close()
        s3fs.S3FileSystem.clear_instance_cache()
        s3fs.S3FileSystem().mkdir("bucket")
        yield url
    finally:
        server.stop()
