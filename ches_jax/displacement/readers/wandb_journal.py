"""The journal in which Weights & Biases keeps a run on the machine: ``run-ID.wandb``.

It begins with ``:W&B``, a magic number and a version, 7 bytes. Then come blocks of 32 KiB (the first holds those bytes
too) of framed pieces, as LevelDB writes its log:

    checksum 4 bytes | length 2 | kind 1: whole, first, middle, last | length bytes      a block ends in zeros

The checksum is the CRC-32 of kind and bytes.

Pieces make records, messages of protocol buffers, of which few fields matter here; the rest is passed over:

    Record         history 2, config 4, run 17
    HistoryRecord  item 1 (repeated), step 2 (its number 1)
    ConfigRecord   update 1 (repeated)
    RunRecord      config 4
    item, update   key 1, nested_key 2 (repeated), value_json 16

The library of Weights & Biases is not needed for it, and nothing of the file is run.
"""

import glob
import json
import re
import struct
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from ches_jax.displacement.readers.log import Log, log_of, read_whole
from ches_jax.errors import ChesError

MAGIC = b":W&B"
BEGINNING = 7
BLOCK = 1 << 15
PIECE = struct.Struct("<IHB")
WHOLE, FIRST, MIDDLE, LAST = 1, 2, 3, 4
VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5


def read_wandb_journal(parts: Sequence[Path], held_out: str | None = None) -> Log:
    """The metrics of a run, and its config as far as the journal has it.

    Args:
      parts: the journal; of a run that was resumed the journals of all its parts, in the order of their times.
      held_out: the name of the evaluation set, where there are several.

    Raises:
      ChesError: damaged; entries of two runs.
    """
    entries: list[dict[str, Any]] = []
    config: dict[str, Any] = {}
    notes: dict[str, None] = {}
    for path in parts:
        _add(path, entries, config, notes)
    if len(parts) == 1 and (before := _part_before(parts[0])) is not None:
        notes[f"its run began in {before}: give the folder of both to read all of it"] = None
    what = "Weights & Biases" + (f", {len(parts)} parts of one run" if len(parts) > 1 else "")
    return log_of(f"{parts[-1]} ({what})", entries, held_out=held_out, settings=config, notes=tuple(notes))


def _add(path: Path, entries: list[dict[str, Any]], config: dict[str, Any], notes: dict[str, None]) -> None:
    """Puts what a journal holds behind what others do."""
    try:
        for record in _records(read_whole(path), notes):
            for field, value in _messages(record):
                if field == 2:
                    entries.append(_items(value, 1) | dict(_step(value)))
                elif field == 4:
                    config |= _items(value, 1)
                elif field == 17:
                    for inner in (v for n, v in _messages(value) if n == 4):
                        config |= _items(inner, 1)
    except (ValueError, IndexError, struct.error, RecursionError) as error:
        raise ChesError(
            f"{path}: a damaged journal of Weights & Biases ({error}); the run's history can be exported instead: "
            "wandb sync uploads it, and wandb.Api().run('ENTITY/PROJECT/ID').history(pandas=False, samples=100000) "
            "written as JSON, or the export of a chart as CSV, is read here"
        ) from None


def parts_of_runs(journals: Iterable[Path]) -> list[list[Path]]:
    """Journals of each run in the order of their times: a run that is resumed begins another one, of the same name.

    >>> folders = ("offline-run-20260102_100000-ab", "run-20260101_100000-ab")
    >>> [[path.parent.name for path in parts] for parts in parts_of_runs(Path(f, "run-ab.wandb") for f in folders)]
    [['run-20260101_100000-ab', 'offline-run-20260102_100000-ab']]
    """
    runs: dict[str, list[Path]] = {}
    for path in journals:
        runs.setdefault(path.name, []).append(path)
    return [sorted(parts, key=_begun) for parts in runs.values()]


def _part_before(journal: Path) -> Path | None:
    """What lies beside the folder of a journal that is given by itself: the last part of its run before it."""
    own = journal.resolve()
    beside = own.parent.parent.glob(f"*run-*/{glob.escape(own.name)}")
    return max((other for other in beside if _begun(other) < _begun(own)), key=_begun, default=None)


def _begun(journal: Path) -> str:
    """When a part of a run began, as the name of its folder says it; empty where it does not."""
    found = re.search(r"run-(\d{8}_\d{6})-", journal.parent.name)
    return found[1] if found else ""


def _records(data: bytes, notes: dict[str, None]) -> Iterator[bytes]:
    """Whole records; one that is cut off, as of a run that still goes on, is left out."""
    at = BEGINNING
    begun: list[bytes] = []
    while at < len(data):
        left = BLOCK - at % BLOCK
        if left < PIECE.size:
            at += left
            continue
        if at + PIECE.size > len(data):
            break
        checksum, length, kind = PIECE.unpack_from(data, at)
        piece = data[at + PIECE.size : at + PIECE.size + length]
        if len(piece) < length:
            break
        if length > left - PIECE.size or zlib.crc32(piece, zlib.crc32(bytes([kind]))) != checksum:
            raise ValueError(f"what stands at byte {at} has another checksum")
        at += PIECE.size + length
        begun = [piece] if kind in (WHOLE, FIRST) else [*begun, piece]
        if kind in (WHOLE, LAST):
            yield b"".join(begun)
            begun = []
    else:
        if not begun:
            return
    notes["its last record is cut off and was left out"] = None


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """Number and value of each field of a message: whole numbers, and the bytes of anything longer."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        kind = key & 7
        if kind == VARINT:
            value, at = _varint(data, at)
            yield key >> 3, value
            continue
        if kind not in (FIXED64, BYTES, FIXED32):
            raise ValueError(f"a field of no kind ({kind})")
        size, at = _varint(data, at) if kind == BYTES else ({FIXED64: 8, FIXED32: 4}[kind], at)
        if at + size > len(data):
            raise ValueError("a field is longer than its message")
        yield key >> 3, data[at : at + size]
        at += size


def _messages(data: bytes) -> Iterator[tuple[int, bytes]]:
    """The fields of a message that are messages or texts themselves."""
    return ((field, value) for field, value in _fields(data) if isinstance(value, bytes))


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """A number in groups of seven bits, the lowest first, and the place behind it.

    >>> _varint(bytes([0xAC, 0x02]), 0)
    (300, 2)
    """
    value = shift = 0
    while shift < 64:
        value |= (data[at] & 0x7F) << shift
        at += 1
        if data[at - 1] < 0x80:
            return value, at
        shift += 7
    raise ValueError("a number of more than 64 bits")


def _items(message: bytes, repeated: int) -> dict[str, Any]:
    """Names and values of the items of a message."""
    out: dict[str, Any] = {}
    for field, item in _messages(message):
        if field == repeated:
            names: dict[int, list[str]] = {1: [], 2: []}
            text = "null"
            for number, value in _messages(item):
                if number in names:
                    names[number].append(value.decode())
                elif number == 16:
                    text = value.decode()
            out["/".join(filter(None, names[1])) or "/".join(names[2])] = json.loads(text)
    return out


def _step(history: bytes) -> Iterator[tuple[str, int]]:
    for field, value in _messages(history):
        if field == 2:
            yield from (("_step", n) for number, n in _fields(value) if number == 1 and isinstance(n, int))
