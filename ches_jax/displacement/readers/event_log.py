"""Logs of TensorBoard: event files (records of protocol buffers, framed as TFRecord)."""

import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ches_jax.displacement.readers.log import Log, log_of, read_whole
from ches_jax.displacement.readers.metric_names import metric
from ches_jax.errors import ChesError

HEADER = struct.Struct("<QI")
"""Length of a record and the checksum of the length; a record is followed by its own checksum."""


def is_event_file(head: bytes) -> bool:
    """Whether a file begins with a record of TensorBoard: the version of the format.

    >>> is_event_file(b"PAR1....")
    False
    """
    return len(head) > HEADER.size and b"brain.Event:" in head[: HEADER.size + 40]


def read_event_log(paths: Sequence[Path], held_out: str | None = None) -> Log:
    """The scalars of the event files of one run, in the order of their writing.

    Raises:
      ChesError: the library that knows the format is not there; a step with two values (two runs).
    """
    try:
        from google.protobuf.message import DecodeError
        from tensorboardX.proto import event_pb2
    except ImportError:
        raise ChesError(
            f"{paths[0]}: reading event files of TensorBoard needs tensorboardX: pip install 'ches-jax[tensorboard]'"
        ) from None
    values: dict[tuple[int, str], list[float]] = {}
    where: dict[str, Path] = {}
    notes: list[str] = []
    for path in sorted(paths):
        data = read_whole(path)
        for record in _records(data, path, notes):
            try:
                event = event_pb2.Event.FromString(record)  # pyright: ignore[reportAttributeAccessIssue]
            except DecodeError:
                raise ChesError(f"{path}: a record of it is damaged; it was an event file of TensorBoard") from None
            for value in event.summary.value:
                number = _scalar(value)
                if number is None:
                    continue
                key = (int(event.step), value.tag)
                there = where.setdefault(value.tag, path)
                kept = values.setdefault(key, [number])
                if metric(value.tag) is not None and there != path and kept[-1] != number:
                    raise ChesError(
                        f"{there} and {path} both have {value.tag} at step {key[0]}, with other values: two runs in "
                        "one directory; give the file of one"
                    )
                if kept[-1] != number:
                    kept.append(number)
    entries: dict[tuple[int, int], dict[str, float]] = {}
    for (step, tag), kept in values.items():
        for time, number in enumerate(kept):
            entries.setdefault((step, time), {"step": step})[tag] = number
    source = f"{paths[0] if len(paths) == 1 else paths[0].parent} (TensorBoard)"
    return log_of(source, [entries[s] for s in sorted(entries)], held_out=held_out, notes=tuple(notes))


def _records(data: bytes, path: Path, notes: list[str]) -> Iterator[bytes]:
    at = 0
    while at < len(data):
        end = at + HEADER.size
        length = HEADER.unpack_from(data, at)[0] if end <= len(data) else len(data)
        if end + length + 4 > len(data):
            notes.append(f"{path.name} is cut off; its last record was left out")
            return
        if not length:
            raise ChesError(f"{path}: an empty record at byte {at}; it was an event file of TensorBoard")
        yield data[end : end + length]
        at = end + length + 4


def _scalar(value: Any) -> float | None:
    if value.HasField("simple_value"):
        return float(value.simple_value)
    if value.HasField("tensor"):
        tensor = value.tensor
        if len(tensor.float_val) == 1:
            return float(tensor.float_val[0])
        if tensor.dtype == 1 and len(tensor.tensor_content) == 4:  # DT_FLOAT
            return float(struct.unpack("<f", tensor.tensor_content)[0])
    return None
