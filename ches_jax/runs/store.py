"""Places: paths on this machine, and objects in stores (``gs://``, ``s3://``, ``hf://``, ``https://``).

A place in a store has the methods of a ``pathlib.Path`` (``upath.UPath``), so that code which reads and writes one file
serves both. What a store cannot do is done here: a name is taken by uploading a whole object (there is no rename), a
folder is whole when its marker is there, a large file is read by byte ranges, and what a library wants to see as a file
is copied here once a process. A store that answers 429 or 5xx is asked again for one to two minutes.
"""

import atexit
import hashlib
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, TypeVar, cast

from ches_jax.errors import ChesError

READ = ("gs", "s3", "hf", "https", "http")
"""Schemes that are read."""
WRITTEN = ("gs", "s3")
"""Schemes that are written too."""
_IN_TESTS = "memory"
_NEEDS = {"s3": "s3fs", "gs": "gcsfs", "http": "aiohttp", "https": "aiohttp", "hf": "huggingface_hub"}
_SAME = {"gcs": "gs"}
_OPTIONS: dict[str, dict[str, Any]] = {
    "s3": {"config_kwargs": {"retries": {"max_attempts": 12, "mode": "standard"}}},
}
_ADDRESS = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*)://(?P<rest>.*)", re.DOTALL)
_LOST_SLASH = re.compile(rf"(?:{'|'.join((*READ, *_SAME))}):/[^/]")
RANGE = 64 * 2**20
"""Bytes of one request for a part of a file."""
PAUSES = (0.3, 0.6, 1.2, 2.5, 5.0, 10.0, 15.0, 20.0)
"""Seconds between requests to a store that does not answer."""
_AGAIN = (408, 425, 429, 500, 502, 503, 504)
T = TypeVar("T")


def is_address(spec: str) -> bool:
    """Whether a specification names a scheme, as ``s3://`` does.

    >>> is_address("s3://bucket/run"), is_address("runs/a:b")
    (True, False)
    """
    return _ADDRESS.match(spec) is not None


def place(spec: str | Path, error: type[ChesError] = ChesError) -> Path:
    """The place that a path or an address names; nothing is read.

    Raises:
      error: a scheme that is not read, or one whose package is not installed.

    >>> place("runs/score-001"), is_store(place("runs"))
    (PosixPath('runs/score-001'), False)
    """
    if not isinstance(spec, str):
        return spec
    if _LOST_SLASH.match(spec):
        raise error(f"{spec}: an address has two slashes behind its scheme ({spec.replace(':/', '://', 1)})")
    match = _ADDRESS.match(spec)
    if match is None:
        return Path(spec)
    scheme = _SAME.get(match["scheme"].lower(), match["scheme"].lower())
    if scheme == "file":
        return Path(match["rest"])
    if scheme not in (*READ, _IN_TESTS):
        raise error(f"{spec}: '{scheme}://' is not supported; expected a path, or {', '.join(f'{s}://' for s in READ)}")
    if not match["rest"].strip("/"):
        raise error(f"{spec}: names no place; expected such as {scheme}://bucket/folder")
    import fsspec
    from upath import UPath

    try:
        fsspec.get_filesystem_class(scheme)
    except ImportError:
        raise error(
            f"{spec}: '{scheme}://' needs {_NEEDS[scheme]}, which is not installed: pip install 'ches-jax[remote]'"
        ) from None
    address = f"{scheme}://{match['rest']}".rstrip("/")
    return cast(Path, UPath(address, use_listings_cache=False, **_OPTIONS.get(scheme, {})))


def output_place(spec: str | Path, error: type[ChesError] = ChesError) -> Path:
    """The place that ``--out`` names.

    Raises:
      error: as ``place``, or a scheme that is only read.
    """
    found = place(spec, error)
    if scheme_of(found) not in ("", *WRITTEN, _IN_TESTS):
        writable = " or ".join(f"{s}://" for s in WRITTEN)
        raise error(f"--out {spec}: '{scheme_of(found)}://' is only read; give a path, or {writable}")
    return found


def scheme_of(path: Path) -> str:
    """Of a place in a store; empty for a path on this machine."""
    return "" if isinstance(path, Path) else str(getattr(path, "protocol", ""))


def is_store(path: Path) -> bool:
    """Whether a place lies in a store."""
    return scheme_of(path) != ""


def make_folder(path: Path) -> None:
    """A directory on this machine; a store has none to make (and a wrong name must not make a bucket)."""
    if not is_store(path):
        path.mkdir(parents=True, exist_ok=True)


def is_there(path: Path) -> bool:
    """Whether there is such a file."""
    if not is_store(path):
        return path.is_file()
    try:
        return _info(path).get("type") != "directory"
    except FileNotFoundError:
        return False


def size_of(path: Path) -> int:
    """Bytes of a file."""
    if not is_store(path):
        return path.stat().st_size
    size = _info(path).get("size")
    if size is None:
        raise ChesError(f"{path}: the server does not tell the size of the file, so it cannot be read in parts")
    return int(size)


def content_mark(path: Path) -> str:
    """What changes when the content does: the store's own checksum or version, else SHA-256 of the bytes.

    The hub's SHA-256 is that of the bytes, so that a file there and its copy here have one mark.
    """
    if not is_store(path):
        return _sha256_of(path)
    info = _info(path)
    lfs = info.get("lfs")
    if sha := (lfs.get("sha256") if isinstance(lfs, dict) else getattr(lfs, "sha256", None)):
        return str(sha)
    for name in ("md5Hash", "ETag", "etag", "blob_id"):
        if info.get(name):
            return hashlib.sha256(f"{name} {info[name]} {info.get('size')}".encode()).hexdigest()
    return persistently(path, lambda: _sha256_of(path))


def version_mark(path: Path) -> tuple[Any, ...]:
    """What tells whether a file was written since: size and time here, size and the store's version there."""
    try:
        if not is_store(path):
            stat = path.stat()
            return stat.st_size, stat.st_mtime_ns
        info = _info(path)
        names = ("md5Hash", "ETag", "etag", "blob_id", "LastModified", "created")
        return info.get("size"), *(str(info.get(n)) for n in names)
    except OSError:
        return (-1, -1)


def read_into(path: Path, out: memoryview, offset: int, error: type[ChesError] = ChesError) -> None:
    """Fill ``out`` with the bytes of a file from ``offset`` on; from a store no other bytes are requested.

    Raises:
      error: the file ends before, or the server does not answer byte ranges.
    """
    if not is_store(path):
        _read_here(path, out, offset, error)
        return
    for at in range(0, len(out), RANGE):
        wanted = min(RANGE, len(out) - at)
        data = read_range(path, offset + at, wanted, error)
        out[at : at + wanted] = data


def read_range(path: Path, offset: int, count: int, error: type[ChesError] = ChesError) -> bytes:
    """``count`` bytes of a file in a store.

    Raises:
      error: as ``read_into``.
    """
    data = persistently(path, lambda: _fs(path).cat_file(_key(path), start=offset, end=offset + count))
    if len(data) > count:
        raise error(f"{path}: the server does not answer byte ranges; copy the files here, or to a store that does")
    if len(data) < count:
        raise error(f"{path}: ends early; copy or download it again")
    return data


def _read_here(path: Path, out: memoryview, offset: int, error: type[ChesError]) -> None:
    with path.open("rb", buffering=0) as f:
        at = 0
        while at < len(out):  # one call reads two gigabytes at most
            got = os.preadv(f.fileno(), [out[at:]], offset + at)
            if got == 0:
                raise error(f"{path}: ends early; copy or download it again")
            at += got


def put(source: Path, target: Path) -> None:
    """Upload a file; a reader sees the whole object or the one before it."""
    with _in_words(f"{target}: cannot be written", missing=True):
        persistently(target, lambda: _fs(target).put_file(str(source), _key(target)))


def put_folder(source: Path, target: Path, last: str | None) -> None:
    """Upload the files of a folder, and ``last`` when all others are there: who finds it finds all."""
    files = sorted(p for p in source.rglob("*") if p.is_file())
    for path in sorted(files, key=lambda p: p.relative_to(source).as_posix() == last):
        put(path, target / path.relative_to(source).as_posix())


def read_text(path: Path) -> str:
    """A small object.

    Raises:
      FileNotFoundError: there is none.
    """
    return persistently(path, lambda: _fs(path).cat_file(_key(path))).decode("utf-8", "replace")


def write_text(path: Path, text: str) -> None:
    """A small object, whole, over the one before it."""
    persistently(path, lambda: _fs(path).pipe_file(_key(path), text.encode()))


def create(path: Path, text: str) -> bool:
    """Write a small object if there is none of this name; whether it was written.

    Where the store has no such operation the object is read back by who calls.
    """
    fs, key = _fs(path), _key(path)
    try:
        persistently(path, lambda: fs.pipe_file(key, text.encode(), mode="create"))
    except FileExistsError:
        return False
    except OSError as error:  # S3 tells it as a failed precondition
        if "PreconditionFailed" in repr(error) or "ConditionalRequestConflict" in repr(error):
            return False
        raise
    except (NotImplementedError, TypeError):
        if is_there(path):
            return False
        persistently(path, lambda: fs.pipe_file(key, text.encode()))
    return True


def remove(path: Path) -> None:
    """Remove a file, or a folder with all that is in it; nothing where there is none."""
    if is_store(path):
        try:
            persistently(path, lambda: _fs(path).rm(_key(path), recursive=True))
        except FileNotFoundError:
            return
    elif path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


@cache
def copies() -> Path:
    """The folder of this process's copies; removed at its end."""
    folder = Path(tempfile.mkdtemp(prefix="ches-copies-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def copy_of(path: Path) -> Path:
    """Where the copy of a place lies: the words of its address, so that messages tell what it is a copy of."""
    scheme, _, rest = str(path).partition("://")
    return copies() / scheme / rest.partition("?")[0].strip("/")


_FETCHED: dict[str, Path] = {}
_LEFT_OUT = ("checkpoints/", "model/", "parts/")
"""Folders of a run that no reader of its tables and logs wants: they are large."""


def here(spec: str, error: type[ChesError] = ChesError) -> str:
    """A path, or the path of a copy of what an address names (``fetched_run``).

    >>> here("runs/score-001")
    'runs/score-001'
    """
    return str(fetched_run(place(spec, error), error)) if is_address(spec) else spec


def fetched_run(path: Path, error: type[ChesError] = ChesError) -> Path:
    """As ``fetched``, of a run directory without its checkpoints, exported weights and parts."""
    return fetched(path, error, _LEFT_OUT)


def fetched(path: Path, error: type[ChesError] = ChesError, left_out: tuple[str, ...] = ()) -> Path:
    """A file or folder as a path on this machine: itself, or a copy that is made once a process.

    Raises:
      error: there is none, or it cannot be read.
    """
    if not is_store(path):
        return path
    if str(path) not in _FETCHED:
        target = copy_of(path)
        try:
            with _in_words(f"{path}: cannot be read", error):
                if scheme_of(path) not in ("http", "https") and persistently(path, lambda: _fs(path).isdir(_key(path))):
                    download(path, target, left_out)
                else:
                    _copy_file(path, target)
        except FileNotFoundError:
            raise error(f"{path}: no such file or folder") from None
        _FETCHED[str(path)] = target
    return _FETCHED[str(path)]


def fetched_files(folder: Path, names: Iterable[str], error: type[ChesError] = ChesError) -> list[str]:
    """Copy those of ``names`` that ``folder`` has, beside each other under ``copy_of``; which they are.

    Raises:
      error: the store cannot be read.
    """
    found = []
    for name in names:
        try:
            with _in_words(f"{folder / name}: cannot be read", error):
                _copy_file(folder / name, copy_of(folder) / name)
        except FileNotFoundError:
            continue
        found.append(name)
    return found


def names_in(folder: Path, error: type[ChesError] = ChesError) -> list[str]:
    """Names of the files in a folder of a store, sorted.

    Raises:
      error: the store cannot be read.
    """
    try:
        with _in_words(f"{folder}: cannot be listed", error):
            entries = persistently(folder, lambda: _fs(folder).ls(_key(folder), detail=True, refresh=True))
    except FileNotFoundError:
        return []
    return sorted(e["name"].rpartition("/")[2] for e in entries if e["type"] == "file")


def matching(pattern: Path, error: type[ChesError] = ChesError) -> list[Path]:
    """The files of a store that a pattern fits, sorted.

    Raises:
      error: the store cannot be read.
    """
    with _in_words(f"{pattern}: cannot be listed", error, missing=True):
        keys = persistently(pattern, lambda: _fs(pattern).glob(_key(pattern)))
    return [place(f"{scheme_of(pattern)}://{str(key).lstrip('/')}", error) for key in sorted(keys)]


@contextmanager
def _in_words(what: str, error: type[ChesError] = ChesError, missing: bool = False) -> Iterator[None]:
    """A block that asks a store: what its file system raises becomes ``error``, with ``missing`` also a missing file.

    Raises:
      ChesError: of the block, as it is.
      FileNotFoundError: there is no such file, where ``missing`` is False.
      error: ``what``, and why.
    """
    try:
        yield
    except ChesError:
        raise
    except Exception as reason:  # each file system has errors of its own
        if isinstance(reason, FileNotFoundError) and not missing:
            raise
        raise error(f"{what} ({_words(reason)})") from None


def persistently(path: Path, ask: Callable[[], T]) -> T:
    """The answer of a store about ``path``; it is asked again when it is overloaded or cannot be reached for a while.

    Raises:
      ChesError: it does not answer for one to two minutes.
    """
    # the client of S3 asks a dozen times by itself, for more than a minute
    pauses = PAUSES[:1] if scheme_of(path) == "s3" else PAUSES
    for pause in (*pauses, None):
        try:
            return ask()
        except Exception as error:  # each file system has errors of its own
            if not _passing(error):
                raise
            if pause is None:
                raise ChesError(f"{path}: the store does not answer ({_words(error)})") from error
            time.sleep(pause)
    raise AssertionError  # the last turn returns or raises


def _passing(error: BaseException) -> bool:
    """Whether an error is of the kind that passes: overload, a broken connection, a time-out."""
    if isinstance(error, FileNotFoundError | FileExistsError | PermissionError | IsADirectoryError):
        return False
    status = getattr(error, "status", None) or getattr(error, "code", None)
    if isinstance(status, int):
        return status in _AGAIN
    if isinstance(error, ConnectionError | TimeoutError):
        return True
    words = f"{type(error).__name__} {error}"
    return any(word in words for word in ("ClientConnect", "ServerDisconnected", "ServerTimeout", "SlowDown", "Service"
               " Unavailable", "EndpointConnectionError", "InternalError", "ClientPayloadError"))  # fmt: skip


def _words(error: Exception) -> str:
    text = str(error).partition("\n")[0]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _fs(path: Path) -> Any:
    return path.fs  # type: ignore[attr-defined]


def _key(path: Path) -> str:
    return path.path  # type: ignore[attr-defined]


def _info(path: Path) -> dict[str, Any]:
    options = {"refresh": True} if scheme_of(path) in ("s3", "hf") else {}
    return persistently(path, lambda: _fs(path).info(_key(path), **options))


def _copy_file(path: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.part")
    try:
        persistently(path, lambda: _fs(path).get_file(_key(path), str(temporary)))
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def files_below(folder: Path, error: type[ChesError] = ChesError) -> list[str]:
    """The files in a folder of a store and in all folders in it, as names below it; none where there is no folder.

    Raises:
      error: the store cannot be read.
    """
    try:
        with _in_words(f"{folder}: cannot be listed", error):
            return _names_below(folder)
    except FileNotFoundError:
        return []


def _names_below(folder: Path) -> list[str]:
    root = _key(folder).rstrip("/") + "/"
    keys = persistently(folder, lambda: _fs(folder).find(root, refresh=True))
    return [str(key)[str(key).find(root.lstrip("/")) + len(root.lstrip("/")) :] for key in keys]


def download(path: Path, target: Path, left_out: tuple[str, ...] = ()) -> None:
    """Copy the files of a folder in a store; those whose name in it begins with one of ``left_out`` stay there."""
    names = _names_below(path)
    target.mkdir(parents=True, exist_ok=True)
    for inside in names:
        if not inside.startswith(left_out):
            _copy_file(path / inside, target / inside)


def _sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(cast(Any, file), "sha256").hexdigest()
