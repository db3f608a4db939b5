"""What data are given as, opened: a file, several, a folder, a data set of the hub, rows in memory, as raw rows.

Where they lie is the work of ``files``, how they are read that of ``formats``, what they mean that of ``sources``.
"""

import contextlib
import hashlib
import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ches_jax.data import files
from ches_jax.data.formats import ARCHIVE, BATCH_ROWS, READERS, Raw, json_splits, read_json, table_rows, twice
from ches_jax.data.nested import within_depth
from ches_jax.errors import DataError
from ches_jax.runs.arrow import take_pandas_in
from ches_jax.runs.files import read_object
from ches_jax.runs.store import is_address, is_store

_FORMATS = (
    f"{', '.join(READERS)} (with {', '.join(files.COMPRESSIONS)} behind it where compressed), a folder of these or of "
    "datasets' save_to_disk, an address such as https:// or hf://, or owner/name on the hub"
)
MADE, PAIRS = ("selection.json", "label.json", "gather.json"), "pairs.jsonl"
"""What `ches select`, `label` and `gather` leave beside the pairs that they made, and these pairs."""
Opened = tuple[str, Callable[[int], Iterator[Raw]], Callable[[], str]]
"""What it is, in words; its rows from any number on; what tells its content from others."""


def opened(spec: str, split: str | None) -> Opened:
    """The rows of what a name means: a path, several, an address, or a data set of the hub.

    Args:
      spec: the name.
      split: which of its splits; None: the only one, or ``train`` of a data set of the hub.

    Raises:
      DataError: there is nothing of that name, or nothing that can be read.
    """
    spec = files.behind_page(spec)
    if not is_address(spec) and not Path(spec).exists() and _is_hub_name(spec):
        return _open_hub(spec, split or "train")
    paths = files.located(spec)
    if len(paths) > 1:
        if split is not None:
            raise DataError(f"{spec}: --split {split}, but these are {len(paths)} files: leave --split out")
        return _open_several(paths)
    (path,) = paths
    if path.is_dir():
        return _open_folder(path, split)
    if not path.exists():
        raise DataError(f"{spec}: no such file or folder; expected {_FORMATS}")
    return _open_file(path, split)


def in_memory(rows: Any, name: str) -> tuple[str, Callable[[int], Iterator[Raw]]]:
    """Rows that lie in memory: what they are, in words, and a reader of them.

    Args:
      rows: a list (or other iterable) of dicts, a data frame, a ``datasets.Dataset`` (or a ``DatasetDict`` of one
        split), an Arrow table or batch.
      name: of the rows, in messages.

    Raises:
      DataError: something else.
    """
    if isinstance(rows, Mapping):
        rows = _only_split(name, rows)
    if hasattr(rows, "columns") and hasattr(rows, "iloc"):  # of pandas
        rows = _records_of_frame(name, rows)
    elif not (hasattr(rows, "to_batches") or hasattr(rows, "iloc")) and any(
        hasattr(rows, f"__arrow_c_{kind}__") for kind in ("stream", "array")
    ):
        rows = _arrow_table(name, rows)  # a batch, or a frame of polars
    if hasattr(rows, "to_batches"):
        return "Arrow table", lambda start: table_rows(rows.to_batches(), 0, start)
    if hasattr(rows, "cache_files") and hasattr(rows, "features"):
        return "datasets.Dataset", lambda start: _read_dataset(rows, start)
    if isinstance(rows, Iterable) and not isinstance(rows, str | bytes | Mapping):
        listed = [_of_python(row) if within_depth(row) else row for row in rows]
        return "list", lambda start: ((f"row {i}", row) for i, row in enumerate(listed[start:], start))
    raise DataError(
        f"{name}: a {type(rows).__name__}; expected a list of dicts, a data frame, a datasets.Dataset or an Arrow "
        "table (a file is scored with the verb score)"
    )


def _arrow_table(name: str, rows: Any) -> Any:
    import pyarrow as pa

    try:
        return pa.table(rows)
    except (pa.ArrowException, TypeError, ValueError) as error:
        raise DataError(
            f"{name}: a {type(rows).__name__} that is no table ({error}); expected rows with columns"
        ) from None


def _only_split(name: str, rows: Mapping[Any, Any]) -> Any:
    """The rows of a mapping of splits that has one.

    Raises:
      DataError: it has several, or is none: a single row, or columns.
    """
    splits = {key: part for key, part in rows.items() if hasattr(part, "features") and hasattr(part, "column_names")}
    if len(splits) == len(rows) == 1:
        return next(iter(splits.values()))
    if splits:
        raise DataError(
            f"{name}: a {type(rows).__name__} of several splits; give one of them: {', '.join(map(str, rows))}"
        )
    raise DataError(
        f"{name}: a {type(rows).__name__}; expected a list of dicts, a row each: a single row is [row], a dict of "
        "columns is pandas.DataFrame(columns) or datasets.Dataset.from_dict(columns)"
    )


def _records_of_frame(name: str, frame: Any) -> list[Any]:
    """The rows of a data frame; what is missing there is null.

    Raises:
      DataError: two of its columns have one name.
    """
    names = [str(column) for column in frame.columns]
    if len({*names}) < len(names):
        raise DataError(f"{name}: {twice(names)}")
    columns = [(frame.iloc[:, i].tolist(), frame.iloc[:, i].isna().tolist()) for i in range(len(names))]
    cells = [[None if missing else v for v, missing in zip(*column, strict=True)] for column in columns]
    return [dict(zip(names, row, strict=True)) for row in zip(*cells, strict=True)]


def _of_python(value: Any) -> Any:
    """A value with arrays (of numpy, jax or torch) and tuples in it as lists, and numbers of numpy as Python's."""
    if isinstance(value, Mapping):
        return {key: _of_python(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_of_python(part) for part in value]
    if isinstance(value, np.generic) or (hasattr(value, "tolist") and hasattr(value, "shape")):
        return _of_python(value.tolist())
    return value.to_pylist() if hasattr(value, "to_pylist") else value


def _is_hub_name(spec: str) -> bool:
    return re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", spec) is not None and files.kind_of(Path(spec))[0] not in READERS


def _open_file(path: Path, split: str | None = None) -> Opened:
    form, packed = files.kind_of(path)
    if {form, packed} & {*files.ARCHIVES}:
        raise DataError(f"{path}: {ARCHIVE}")
    if form not in READERS:
        raise DataError(f"{path}: unknown format '{form or packed}'; expected {_FORMATS}")
    if not path.is_file() and not is_store(path):
        raise DataError(f"{path}: a pipe or a device; data are read more than once: write them to a file first")
    if path.stat().st_size == 0:
        raise DataError(f"{path}: the file is empty; expected at least one row")
    kind, read = READERS[form]
    if split is not None:
        if form != ".json" or split not in json_splits(path):
            raise DataError(f"{path}: --split {split}, but a single file has no splits: leave --split out")
        read = partial(read_json, split=split)
    return (f"{kind}, {packed}" if packed else kind), partial(read, path), lambda: files.digest([path])


def _open_several(paths: list[Path], one: Callable[[Path], Opened] = _open_file) -> Opened:
    """Files one after another; where a row stands is said with the file."""
    opened = [one(path) for path in paths]

    def read(start: int) -> Iterator[Raw]:
        rows = (
            (f"{path.name}, {where}", raw)
            for path, (_, read_one, _) in zip(paths, opened, strict=True)
            for where, raw in read_one(0)
        )
        return itertools.islice(rows, start, None)

    kinds = ", ".join(dict.fromkeys(kind for kind, _, _ in opened))
    return f"{len(paths)} files, {kinds}", read, lambda: files.digest(paths)


def _open_folder(path: Path, split: str | None) -> Opened:
    if (path / "dataset_dict.json").exists():
        splits = _split_names(path / "dataset_dict.json")
        if split is None and len(splits) == 1:
            (split,) = splits
        if split not in splits:
            fault = f"no split '{split}'" if split else "several splits"
            raise DataError(f"{path}: {fault}; choose one with --split: {', '.join(splits)}")
        path = path / str(split)
    elif not (path / "state.json").exists():
        if split in (None, "train") and (path / PAIRS).is_file() and any((path / name).is_file() for name in MADE):
            return _open_file(path / PAIRS)  # as the card of a selection says it; what lies beside is about them
        return _open_parts(path, split)
    elif split is not None:
        raise DataError(f"{path}: --split {split}, but the folder holds one split: leave --split out")
    datasets = _datasets()
    try:
        dataset = datasets.Dataset.load_from_disk(str(path))
        dataset.data.table.validate(full=True)
    except Exception as error:
        raise DataError(f"{path}: datasets cannot load the folder ({error})") from error
    stored = sorted(Path(f["filename"]) for f in dataset.cache_files)
    return "save_to_disk folder", lambda start: _read_dataset(dataset, start), lambda: files.digest(stored)


def _datasets() -> Any:
    """The library, which needs pandas and has pyarrow know it too."""
    import datasets

    take_pandas_in()
    return datasets


def _open_parts(path: Path, split: str | None) -> Opened:
    """A folder of files, as the hub lays them out: the parts of one split."""
    splits = files.splits_of(path, (".parquet", ".arrow", ".jsonl", ".csv", ".json"))
    if not splits:
        raise DataError(
            f"{path}: a folder without dataset_dict.json or state.json, and without data; expected one written by "
            "datasets' save_to_disk or a folder of Parquet files, or name a file in it"
        )
    fitting = [name for name in splits if split in (None, name, name.rpartition("/")[2])]
    if len(fitting) != 1:
        fault = "several splits" if split is None else f"no split '{split}'" if not fitting else f"several '{split}'"
        raise DataError(f"{path}: {fault}; choose one with --split: {', '.join(n or '(no name)' for n in splits)}")
    parts = splits[fitting[0]]
    part = partial(_open_part, path)
    return _open_several(parts, part) if len(parts) > 1 else part(parts[0])


def _open_part(folder: Path, path: Path) -> Opened:
    """A file of a folder, whose rows have the columns that the folders around it tell too."""
    kind, read, identity = _open_file(path)
    partition = files.partition_values(path.relative_to(folder))

    def rows(start: int) -> Iterator[Raw]:
        return ((where, {**partition, **raw} if isinstance(raw, Mapping) else raw) for where, raw in read(start))

    return kind, rows if partition else read, identity


def _split_names(path: Path) -> list[str]:
    try:
        names = read_object(path, DataError, "the splits of a datasets folder")["splits"]
    except KeyError as error:
        raise DataError(f"{path}: is damaged ({error!r}); expected the splits of a datasets folder") from None
    if not isinstance(names, list) or not all(isinstance(n, str) for n in names):
        raise DataError(f"{path}: 'splits' is no list of names; expected the splits of a datasets folder")
    return names


def _hub_answers(name: str) -> bool:
    """Whether the hub can be reached at all; what it answers is left to ``load_dataset``."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    try:
        HfApi().dataset_info(name, timeout=10)
    except (HfHubHTTPError, OfflineModeIsEnabled):
        return True
    except Exception:
        return False
    return True


@contextlib.contextmanager
def _from_the_cache() -> Iterator[None]:
    """The clients of the hub read their caches only: without a network they would try for a minute first."""
    from datasets import config
    from huggingface_hub import constants

    clients: tuple[Any, ...] = (constants, config)
    before = [client.HF_HUB_OFFLINE for client in clients]
    for client in clients:
        client.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        for client, value in zip(clients, before, strict=True):
            client.HF_HUB_OFFLINE = value


def _open_hub(name: str, split: str) -> Opened:
    datasets = _datasets()
    try:
        with contextlib.nullcontext() if _hub_answers(name) else _from_the_cache():
            dataset = datasets.load_dataset(name, split=split)
    except Exception as error:
        raise DataError(
            f"{name}: no such file, and split '{split}' of a hub dataset of that name could not be loaded "
            f"({type(error).__name__}: {str(error).partition(chr(10))[0]}); check the name, the split and the network, "
            "or give the path of a local file or folder"
        ) from error
    identity = f"{name}\n{split}\n{getattr(dataset, '_fingerprint', '')}"
    return (
        "hub dataset",
        lambda start: _read_dataset(dataset, start),
        lambda: hashlib.sha256(identity.encode()).hexdigest(),
    )


def _read_dataset(dataset: Any, start: int) -> Iterator[Raw]:
    form = dataset.format
    if form["type"] not in (None, "custom"):  # arrays, or tensors, in place of lists and numbers
        dataset = dataset.with_format(None, columns=form["columns"])
    for first in range(start, len(dataset), BATCH_ROWS):
        batch = dataset[first : first + BATCH_ROWS]  # a mapping of lists, decoded by its features
        for index, values in enumerate(zip(*batch.values(), strict=True), first):
            yield f"row {index}", dict(zip(batch, values, strict=True))
