"""Files that are there whole or not at all, here and in stores, and readers whose errors name the fault.

Everything that is read as JSON or Parquet from a directory of a model or a run comes through here: regular files only,
of bounded size, and any damage is one message.
"""

import contextlib
import errno
import hashlib
import io
import json
import os
import re
import secrets
import shutil
import socket
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, cast

from ches_jax.errors import ChesError
from ches_jax.runs import store

if TYPE_CHECKING:
    import pyarrow as pa

JSON_BYTES = 64 * 2**20
"""Largest JSON file that is read whole; configs and indexes of the largest models are a few megabytes."""
_TEMPORARY = re.compile(r"\.(?P<name>.+?)\.(?:(?P<host>[0-9a-f]{8})-)?(?P<pid>\d+)(?:-[0-9a-f]{8})?\.tmp")


def host() -> str:
    """Where a process id has its meaning: the machine, and the namespace of process ids (a container) on it."""
    with contextlib.suppress(OSError):
        return hashlib.sha256(f"{socket.gethostname()} {os.readlink('/proc/self/ns/pid')}".encode()).hexdigest()[:8]
    return hashlib.sha256(socket.gethostname().encode()).hexdigest()[:8]


def _temporary(path: Path) -> Path:
    """A hidden name beside ``path`` that no other process on any host uses."""
    return path.with_name(f".{path.name}.{host()}-{os.getpid()}-{secrets.token_hex(4)}.tmp")


def _abandoned(path: Path) -> bool:
    """Whether whoever made this temporary file has ended; a process of another host counts as alive."""
    match = _TEMPORARY.fullmatch(path.name)
    return match is not None and dead_here(match["host"] or host(), match["pid"])


def dead_here(machine: object, process: object) -> bool:
    """Whether a process of this machine (``host``) has ended; one of another machine counts as alive."""
    if machine != host():
        return False
    try:
        os.kill(int(str(process)), 0)
    except (ProcessLookupError, OverflowError):
        return True
    except (PermissionError, ValueError):
        return False
    return False


def remove_leftovers(folder: Path, name: str | None = None) -> None:
    """Remove what killed processes left half written in ``folder``: of the target ``name``, or of all."""
    if store.is_store(folder):  # where nothing is renamed, nothing is half written
        return
    for path in folder.glob(".*.tmp"):
        match = _TEMPORARY.fullmatch(path.name)
        if match is not None and name in (None, match["name"]) and _abandoned(path):
            store.remove(path)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """A block that writes ``path``: an error of the system that names no file (a disk that is full) names this one."""
    try:
        yield
    except OSError as error:
        if error.filename is not None or (error.errno is None and type(error) is not OSError):
            raise
        raise OSError(error.errno or errno.EIO, error.strerror or str(error), str(path)) from error
    except Exception as error:  # safetensors writes files in Rust, and raises a type of its own
        number = int(found[1]) if (found := re.search(r"\(os error (\d+)\)", str(error))) else None
        if number not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise OSError(number, os.strerror(number), str(path)) from error


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary name, renamed to ``path`` when the block ends well and removed when not.

    A reader therefore sees the whole file or none, also after the machine stops in between. For a place in a store the
    temporary name lies on this machine, and the file is uploaded as one object.
    """
    if store.is_store(path):
        with tempfile.TemporaryDirectory(prefix="ches-upload-") as folder:
            with naming(Path(folder) / path.name):
                yield Path(folder) / path.name
            store.put(Path(folder) / path.name, path)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary(path)
    try:
        with naming(path):
            yield temporary
            with open(temporary, "rb") as written:
                os.fsync(written.fileno())
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def new_directory(out: Path, error: type[ChesError], marker: str | None = None) -> Iterator[Path]:
    """A directory to fill; it gets its name when the block ends well, and is removed otherwise.

    In a store the files are uploaded when the block ends well, and ``marker`` last: a folder without it is not whole.

    Raises:
      error: ``out`` is there already and is not an empty directory.
    """
    refused = f"{out}: exists and is not an empty directory; choose another --out"
    if store.is_store(out):
        if out.exists():
            raise error(refused)
        with tempfile.TemporaryDirectory(prefix="ches-upload-") as folder:
            with naming(Path(folder)):
                yield Path(folder)
            store.put_folder(Path(folder), out, marker)
        return
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise error(refused)
    remove_leftovers(out.parent, out.name)
    temporary = _temporary(out)
    temporary.mkdir(parents=True)
    try:
        with naming(out):
            yield temporary
        try:
            os.replace(temporary, out)  # replaces an empty directory too
        except OSError as e:
            if e.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):  # another process was faster
                raise error(refused) from None
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def staged(out: Path, marker: str) -> Iterator[Path]:
    """``out`` itself; for a place in a store a folder here, uploaded when the block ends well, ``marker`` last."""
    if not store.is_store(out):
        yield out
        return
    with tempfile.TemporaryDirectory(prefix="ches-upload-") as folder:
        yield Path(folder)
        store.put_folder(Path(folder), out, marker)


def sha256(path: Path) -> str:
    """Of the bytes of a file.

    Raises:
      ChesError: it is no regular file.
    """
    with open_regular(path, ChesError, "a file of a run") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]


def read_json(path: Path, error: type[ChesError], expected: str) -> Any:
    """The JSON value in ``path``.

    Raises:
      error: it is missing (then ``expected`` says what its directory should be), is no regular file, is larger than
        ``JSON_BYTES``, is nested too deeply, or is not JSON.
    """
    try:
        return json.loads(_bounded(path, error).decode("utf-8"))
    except FileNotFoundError:
        there = found_below(path.parent, path.name)
        raise error(f"{path.parent}: no {path.name}; expected {expected}{there}") from None
    except OSError as e:
        raise error(f"{path}: cannot be read ({e.strerror or e})") from None
    except RecursionError:
        raise error(f"{path}: not valid JSON (nested too deeply)") from None
    except ValueError as e:  # bytes that are no UTF-8, words that are no JSON, numbers of thousands of digits
        raise error(f"{path}: not valid JSON ({str(e).partition(';')[0]})") from None


def found_below(folder: Path, name: str) -> str:
    """The directories in ``folder`` that have the file, as the end of a message that ``folder`` has none.

    >>> found_below(Path("no-such-folder"), "config.json")
    ''
    """
    try:
        found = sorted(str(file.parent) for file in folder.glob(f"*/{name}"))
    except OSError:
        return ""
    return f"; did you mean {' or '.join(found[:3])}?" if found else ""


def read_text(path: Path, error: type[ChesError], expected: str, encoding: str = "utf-8") -> str:
    """The text of a small file, whoever made it.

    Raises:
      error: it is missing or cannot be read, is no regular file, is larger than ``JSON_BYTES``, or is not in
        ``encoding``; ``expected`` says what it should be.
    """
    try:
        return _bounded(path, error, expected).decode(encoding)
    except OSError as e:
        raise error(f"{path}: cannot be read ({e.strerror or e}); expected {expected}") from None
    except UnicodeDecodeError as e:
        raise error(f"{path}: is no text in {encoding.upper()} (byte {e.start}); expected {expected}") from None


def _bounded(path: Path, error: type[ChesError], expected: str = "JSON") -> bytes:
    """The bytes of a regular file of at most ``JSON_BYTES``."""
    if store.is_store(path):
        size, data = store.size_of(path), b""
        if size <= JSON_BYTES:
            data = store.read_range(path, 0, size, error)
    else:
        with open_regular(path, error, expected) as file:
            size = os.fstat(file.fileno()).st_size
            data = file.read(JSON_BYTES + 1) if size <= JSON_BYTES else b""
    if size > JSON_BYTES:
        raise error(f"{path}: {size} bytes; expected at most {JSON_BYTES} of {expected}")
    return data


def open_regular(path: Path, error: type[ChesError], expected: str) -> BinaryIO:
    """A file opened for reading: a stranger's pipe or device in its place would wait, or never end.

    Raises:
      OSError: it cannot be opened.
      error: it is no regular file.
    """
    if store.is_store(path):  # which has nothing but files
        # what a store's client gives does not read a line of bounded length
        return io.BufferedReader(cast(Any, store.persistently(path, lambda: path.open("rb"))))
    file = open(path, "rb", opener=_without_waiting)  # noqa: SIM115
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise error(f"{path}: not a regular file; expected {expected}")
    return file


def _without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))  # a pipe would wait for a writer


def read_object(path: Path, error: type[ChesError], expected: str) -> dict[str, Any]:
    """The JSON object in ``path``.

    Raises:
      error: as ``read_json``, or it is no object.
    """
    value = read_json(path, error, expected)
    if not isinstance(value, dict):
        raise error(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def read_parquet(
    path: Path,
    error: type[ChesError],
    expected: str,
    columns: "pa.Schema | None" = None,
    optional: "pa.Schema | None" = None,
    **options: Any,
) -> "pa.Table":
    """A Parquet table, read whole and validated before anything is made of it.

    Args:
      path: the file.
      error: what is raised.
      expected: what the file should be, for messages.
      columns: those that it must have; they come with these types, and without nulls where they are not nullable.
      optional: those that come with these types where it has them.
      options: of ``pyarrow.parquet.read_table``.

    Raises:
      error: there is no such file, it is damaged, it is no Parquet, or a column is missing or of another type.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    if not store.is_there(path):
        raise error(f"{path}: no such file; expected {expected}")
    try:
        table = pq.read_table(parquet_source(path), **options)
        table.validate(full=True)
    except (pa.ArrowException, OSError, ValueError, KeyError, SystemError) as e:
        raise error(
            f"{path}: cannot be read as Parquet ({str(e).partition(chr(10))[0]}); expected {expected}"
        ) from None
    return _typed(path, table, columns, optional, error, expected)


def _typed(
    path: Path,
    table: "pa.Table",
    columns: "pa.Schema | None",
    optional: "pa.Schema | None",
    error: type[ChesError],
    expected: str,
) -> "pa.Table":
    """The table with the named columns, in their types."""
    import pyarrow as pa

    names = table.column_names
    if twice := {name for name in names if names.count(name) > 1}:
        raise error(f"{path}: two columns {', '.join(sorted(twice))}; expected {expected}")
    if missing := [name for name in (columns.names if columns is not None else ()) if name not in names]:
        raise error(f"{path}: no column {', '.join(missing)}; expected {expected}")
    for field in (*(columns or ()), *(optional or ())):
        if field.name not in names:
            continue
        at, column = table.schema.get_field_index(field.name), table[field.name]
        try:
            column = column.cast(field.type)
        except (pa.ArrowException, ValueError):
            raise error(f"{path}: column {field.name} is {column.type}; expected {field.type}") from None
        if column.null_count and not field.nullable:
            raise error(f"{path}: column {field.name} lacks {column.null_count} of {len(table)} values")
        table = table.set_column(at, field, column)
    return table


def parquet_source(path: Path) -> Any:
    """What pyarrow reads a table from: the path here, the bytes of an object of a store."""
    if not store.is_store(path):
        return path
    import pyarrow as pa

    return pa.BufferReader(store.read_range(path, 0, store.size_of(path)))
