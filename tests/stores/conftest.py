"""Emulators of stores on loopback: S3 (moto) and Google Cloud Storage."""

import subprocess
import threading
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ches_jax import bundled
from tests.stores.commands import TRAIN, ches, free_port, without_devices

CREDENTIALS = {"AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "y", "AWS_DEFAULT_REGION": "us-east-1"}


class Busy:
    """A WSGI application that answers 503 while a test asks it to, and 403 to the uploads a test names."""

    def __init__(self, app: Callable):
        self.app, self.busy, self.refused = app, False, 0
        self.forbidden: Callable[[str], bool] = lambda path: False

    def __call__(self, environ, start_response):
        if environ["REQUEST_METHOD"] in ("PUT", "POST") and self.forbidden(environ["PATH_INFO"]):
            self.refused += 1
            environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
            start_response("403 Forbidden", [("Content-Type", "application/xml")])
            return [b"<Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>"]
        if self.busy:
            self.refused += 1
            start_response("503 Service Unavailable", [("Content-Type", "text/plain")])
            return [] if environ["REQUEST_METHOD"] == "HEAD" else [b"busy"]
        return self.app(environ, start_response)


@pytest.fixture(scope="module")
def s3(tmp_path_factory) -> Iterator[tuple[Busy, dict[str, str]]]:
    """moto on loopback with the bundled model and pairs in the bucket ``pod``; the environment that leads there."""
    moto = pytest.importorskip("moto.server", reason="needs moto[s3] with flask")
    import s3fs
    from werkzeug.serving import make_server

    app = Busy(moto.DomainDispatcherApplication(moto.create_backend_app))
    server = make_server("127.0.0.1", 0, app, threaded=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    environment = {**CREDENTIALS, "AWS_ENDPOINT_URL": f"http://127.0.0.1:{server.server_port}"}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        # what a server before this one has left in this process: its clients, and its buckets
        s3fs.S3FileSystem.clear_instance_cache()
        urllib.request.urlopen(f"{environment['AWS_ENDPOINT_URL']}/moto-api/reset", data=b"").close()
        fs = s3fs.S3FileSystem(use_listings_cache=False)
        fs.mkdir("pod")
        fs.put(f"{bundled.model_dir()}/", "pod/model/", recursive=True)
        fs.put_file(str(bundled.pairs_file()), "pod/pairs.jsonl")
        yield app, environment
    server.shutdown()


class Gate:
    """Which requests an emulator answers with 503."""

    def __init__(self):
        self.refused = 0
        self.closed: Callable[[str], bool] = lambda path: False

    def guarding(self, handler: type) -> type:
        """A handler of requests behind this gate."""
        gate = self

        class Guarded(handler):
            def parse_request(self):
                if not super().parse_request():
                    return False
                if not gate.closed(self.path):
                    return True
                gate.refused += 1
                self.rfile.read(int(self.headers.get("Content-Length") or 0))
                self.send_error(503)
                return False

        return Guarded


@pytest.fixture
def gate() -> Gate:
    """Of the emulator of Google Cloud Storage: it refuses what a test asks it to."""
    return Gate()


@pytest.fixture
def gs(gate, monkeypatch) -> Iterator[dict[str, str]]:
    """An emulator of Google Cloud Storage on loopback with the bucket ``pod``."""
    emulator = pytest.importorskip("gcp_storage_emulator.server", reason="needs gcp-storage-emulator")
    monkeypatch.setattr(emulator, "RequestHandler", gate.guarding(emulator.RequestHandler))
    _tell_generations(monkeypatch)
    port = free_port()
    server = emulator.create_server("127.0.0.1", port, in_memory=True, default_bucket="pod")
    server.start()
    address = f"http://127.0.0.1:{port}"
    environment = {
        "STORAGE_EMULATOR_HOST": address, "TENSORSTORE_GCS_HTTP_URL": address, "GOOGLE_AUTH_TOKEN_FOR_TESTING": "x",
        "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
    }  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        yield environment
    server.stop()


def _tell_generations(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the emulator send the generation with the bytes of an object, as Google's server does.

    Without it the checkpoint library takes the generation for 0 and refuses to write an object that it has read
    ("Malformed StorageGeneration"): now and then, since it reads its manifest again only if another writer was between.
    """
    from gcp_storage_emulator.handlers import objects

    real = objects.download

    def download(request, response, storage, *args, **kwargs):
        real(request, response, storage, *args, **kwargs)
        if response.status < 300:
            about = storage.get_file_obj(request.params["bucket_name"], request.params["object_id"])
            response["x-goog-generation"] = about["generation"]

    monkeypatch.setattr(objects, "download", download)


@pytest.fixture(scope="session")
def undisturbed(tiny_model, tmp_path_factory) -> Path:
    """``TRAIN`` in one process of four devices, on a path."""
    out = tmp_path_factory.mktemp("whole") / "run"
    devices = {**without_devices(), "JAX_NUM_CPU_DEVICES": "4"}
    ches(*TRAIN, "--model", str(tiny_model), "--out", str(out), environment=devices)
    return out


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """A disk of 64 MiB in memory; who runs the tests must be allowed to mount it."""
    disk = tmp_path / "disk"
    disk.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(disk)], capture_output=True, text=True
    )
    if made.returncode != 0:
        pytest.skip(f"needs the right to mount a disk in memory ({made.stderr.strip()})")
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)
