"""Checkpoints in an object store: each process uploads what it holds; one object, written last, makes them whole.

A store has no renaming, so what lies there is a checkpoint when its ``checkpoint.json`` is there:

    checkpoints/40/3fa9c1d2-00000-000.safetensors    blocks of arrays that process 0 holds, up to FILE_BYTES a file
    checkpoints/40/3fa9c1d2-00001-000.safetensors    those of process 1
    checkpoints/40/checkpoint.json                   what was saved, and where each block of each array lies

Every block (a shard that several devices may hold) is written by one process. A reader takes the byte ranges that its
own devices need, on whatever mesh, and no others. ``3fa9c1d2`` is a word of one start of the run, so that what a killed
start has left is never mixed with what the next one writes.
"""

import json
import math
import secrets
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ches_jax.distributed.processes import Process
from ches_jax.errors import RunError, many
from ches_jax.hf.tensors import STORED, Tensor, open_files
from ches_jax.runs import store
from ches_jax.runs.files import read_object
from ches_jax.runs.shapes import require_shape
from ches_jax.train.best import Best

MARKER = "checkpoint.json"
"""The object that is written last and removed first."""
OF_ORBAX = "commit_success.txt"
"""What version 0.3 had instead."""
FILE_BYTES = 2**30
"""Of one file, unless a single block is larger: so much of the temporary folder a process needs."""
READERS = 8
"""Arrays that are read at a time."""
ABOUT = {
    "step": int,
    "position": object,
    "shapes": {str: str},
    "metrics": ({str: object},),
    "blocks": {str: [{"file": str, "offset": int, "start": [int], "shape": [int]}]},
}
"""The shape of the marker."""
Leaves = dict[str, Any]
Block = tuple[str, tuple[int, ...], np.ndarray]
"""A part of an array: the array's name, where the part starts in it, its numbers."""


class SavedInStore:
    """The checkpoints below an address; ``checkpoints.Checkpoints`` says what its methods are for."""

    def __init__(
        self,
        folder: Path,
        keep: int,
        best: Best | None,
        process: Process,
        in_words: Callable[[int | None, BaseException], RunError],
    ):
        """The first process removes what was begun and never became whole; ``in_words`` tells what was not written."""
        self.folder = folder
        self._keep = keep
        self._best = best
        self._process = process
        self._in_words = in_words
        self._begun: _Upload | None = None
        self._metrics: dict[int, dict[str, float] | None] = {}
        with process.sharing_errors():
            found = store.files_below(folder, RunError)
            if any(name.endswith(f"/{OF_ORBAX}") for name in found):
                raise RunError(f"{folder}: checkpoints of an older version; continue with it, or give a new --out")
            self._steps = _whole(found)
            if process.first:
                for step in _numbers(found) - set(self._steps):
                    store.remove(folder / str(step))
            if best is not None:
                self._metrics = {step: about_in(folder, step)[1].get("metrics") for step in self._steps}
        self._start = process.exchange(secrets.token_hex(4))[0]

    def steps(self) -> list[int]:
        """Of the whole checkpoints, and of the one that is being written."""
        return [*self._steps, *([self._begun.about["step"]] if self._begun is not None else [])]

    def whole(self) -> list[int]:
        """Of the whole ones, rising; the store is not asked, for it may not answer."""
        return sorted(self._steps)

    def latest(self) -> int | None:
        """The last whole one's."""
        return max(self._steps, default=None)

    def best(self) -> tuple[int, dict[str, float]] | None:
        """The best step and its metrics; of several best ones the last."""
        assert self._best is not None
        values = {step: self._best.value(metrics) for step, metrics in self._metrics.items() if metrics is not None}
        step = max(values, key=lambda s: (values[s], s), default=None)
        return None if step is None else (step, dict(self._metrics[step] or {}))

    def save(self, step: int, leaves: Leaves, about: dict[str, Any], metrics: Mapping[str, float] | None) -> None:
        """Copy what this process holds and start uploading it.

        Raises:
          ChesError: as ``wait``, of the one before.
        """
        self.wait()
        about = {**about, "metrics": None if metrics is None else dict(metrics)}
        prefix = f"{self._start}-{self._process.id:05d}"
        self._begun = _Upload(self.folder / str(step), prefix, about, held(leaves))

    def writing(self) -> bool:
        """Whether this process still uploads."""
        return self._begun is not None and self._begun.is_alive()

    def settle(self) -> None:
        """``wait``, which finds all parts written."""
        self.wait()

    def wait(self) -> None:
        """Until all processes have uploaded their parts, and the checkpoint is whole; all processes must call it.

        Raises:
          ChesError: the part of this process, or of another one, could not be written.
        """
        if (upload := self._begun) is None:
            return
        upload.join()
        self._begun = None
        step = upload.about["step"]
        with self._sharing(lambda error: self._in_words(step, error)):
            if upload.error is not None:
                raise upload.error
        about = {**upload.about, "blocks": _joined(self._process.exchange(upload.blocks))}
        with self._sharing(lambda error: self._in_words(step, error)):
            if self._process.first:
                store.write_text(upload.folder / MARKER, json.dumps(about))
        self._steps.append(step)
        if self._best is not None:
            self._metrics[step] = about["metrics"]
        self._remove_old()

    @contextmanager
    def _sharing(self, in_words: Callable[[Exception], RunError]) -> Iterator[None]:
        """What fails in this block in one process is raised in all, in words."""
        with self._process.sharing_errors():
            try:
                yield
            except Exception as error:  # each file system has errors of its own
                raise in_words(error) from None

    def _remove_old(self) -> None:
        """All but the last ones and the best one; what makes a checkpoint whole goes first."""
        kept = set(sorted(self._steps)[-self._keep :])
        if self._best is not None and (best := self.best()) is not None:
            kept.add(best[0])
        old = [step for step in self._steps if step not in kept]
        with self._sharing(lambda error: RunError(f"{self.folder}: old checkpoints cannot be removed ({error})")):
            for step in old if self._process.first else ():
                store.remove(self.folder / str(step) / MARKER)
                store.remove(self.folder / str(step))
        self._steps = sorted(kept)
        self._metrics = {step: metrics for step, metrics in self._metrics.items() if step in kept}

    def about(self, step: int) -> dict[str, Any]:
        """What ``save`` was given of a step.

        Raises:
          RunError: it cannot be read.
        """
        return about_in(self.folder, step)[1]

    def read(self, step: int, target: Leaves) -> Leaves:
        """The arrays of a step, as ``target`` says: shapes with shardings by name.

        Raises:
          ChesError: a file is damaged or gone, or an array is not there.
        """
        found = read_in(self.folder, step, target)
        if lacking := [name for name in target if not isinstance(found[name], jax.Array)]:
            raise RunError(many(f"{self.folder / str(step)}: the checkpoint lacks arrays that it names", lacking))
        return found

    def put_aside(self, step: int) -> str | None:
        """None: a store does not rename."""
        return None

    def close(self) -> None:
        """Nothing is held."""


class _Upload(threading.Thread):
    """One process's part of a checkpoint on its way into the store."""

    def __init__(self, folder: Path, prefix: str, about: dict[str, Any], held: list[Block]):
        """Starts at once; ``prefix`` begins the names of its files.

        ``blocks`` says afterwards where each block lies, ``error`` why it does not.
        """
        super().__init__(name="checkpoint", daemon=True)
        self.folder, self.about = folder, about
        self.blocks: dict[str, list[dict[str, Any]]] = {}
        self.error: Exception | None = None
        self._prefix, self._held = prefix, held
        self.start()

    def run(self) -> None:
        try:
            for number, blocks in enumerate(files_of(self._held)):
                self._put(f"{self._prefix}-{number:03d}.safetensors", blocks)
        except Exception as error:  # whatever it is, the run learns of it when it waits
            self.error = error
        self._held = []

    def _put(self, file: str, blocks: list[Block]) -> None:
        """One file; it lies on this machine until it is uploaded."""
        from safetensors.numpy import save_file

        with tempfile.TemporaryDirectory(prefix="ches-checkpoint-") as folder:
            path = Path(folder, file)
            save_file({f"{name}@{','.join(map(str, start))}": numbers for name, start, numbers in blocks}, path)
            there = open_files(path.parent, [path], kinds=STORED)
            store.put(path, self.folder / file)
        for name, start, numbers in blocks:
            entry = there[f"{name}@{','.join(map(str, start))}"]
            place = {"file": file, "offset": entry.offset, "start": list(start), "shape": list(numbers.shape)}
            self.blocks.setdefault(name, []).append(place)


def held(leaves: Leaves) -> list[Block]:
    """Copies of the shards that this process writes: of each that several devices hold, one device's."""
    shards = [(name, start, devices) for name, leaf in leaves.items() for start, devices in _holders(leaf).items()]
    writers = spread([(_size(leaves[name]), [d.process_index for d in devices]) for name, _, devices in shards])
    here = jax.process_index()
    mine = {
        (name, start): next(device for device in devices if device.process_index == here)
        for (name, start, devices), writer in zip(shards, writers, strict=True)
        if writer == here
    }
    found = [
        (name, start, shard)
        for name, leaf in leaves.items()
        for shard in leaf.addressable_shards
        if mine.get((name, start := _start(shard.index))) == shard.device
    ]
    for _, _, shard in found:
        shard.data.copy_to_host_async()
    return [(name, start, _copied(shard)) for name, start, shard in found]


def _size(leaf: Any) -> int:
    """Bytes of one shard."""
    return math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize


def _holders(leaf: Any) -> dict[tuple[int, ...], list[Any]]:
    """Of each shard of an array, by where it starts, the devices of all processes that hold it."""
    holders: dict[tuple[int, ...], list[Any]] = {}
    for device, index in leaf.sharding.devices_indices_map(leaf.shape).items():
        holders.setdefault(_start(index), []).append(device)
    return holders


def spread(shards: Sequence[tuple[int, Sequence[int]]]) -> list[int]:
    """Which process writes each shard, of its size and the processes that hold it: the one with the least to write.

    >>> spread([(4, [0, 1]), (4, [0, 1]), (1, [1]), (2, [0, 1])])
    [0, 1, 1, 0]
    """
    load: Counter[int] = Counter()
    writers = []
    for size, processes in shards:
        writer = min(processes, key=lambda process: (load[process], process))
        load[writer] += size
        writers.append(writer)
    return writers


def _copied(shard: Any) -> np.ndarray:
    numbers = np.asarray(shard.data, order="C")
    # on a CPU they are the device's own, which the next update overwrites
    return numbers.copy() if shard.device.platform == "cpu" else numbers


def files_of(blocks: list[Block]) -> Iterator[list[Block]]:
    """The blocks in their order, as many to a file as ``FILE_BYTES`` takes, one at least.

    >>> blocks = [("a", (0,), np.zeros(2**27)), ("b", (0,), np.ones(1)), ("c", (0,), np.ones(1))]
    >>> [[name for name, _, _ in file] for file in files_of(blocks)]
    [['a'], ['b', 'c']]
    """
    file: list[Block] = []
    size = 0
    for block in blocks:
        if file and size + block[2].nbytes > FILE_BYTES:
            yield file
            file, size = [], 0
        file.append(block)
        size += block[2].nbytes
    if file:
        yield file


def _start(index: tuple[slice, ...]) -> tuple[int, ...]:
    return tuple(s.start or 0 for s in index)


def _joined(parts: list[dict[str, list[dict[str, Any]]]]) -> dict[str, list[dict[str, Any]]]:
    """The blocks of all processes by name of array."""
    return {name: [b for part in parts for b in part.get(name, [])] for name in sorted({n for p in parts for n in p})}


def _numbers(names: list[str]) -> set[int]:
    """Steps whose folders hold anything, of the names of files below the folder of all."""
    heads = (name.partition("/")[0] for name in names if "/" in name)
    return {int(head) for head in heads if head.isascii() and head.isdigit()}


def _whole(names: list[str]) -> list[int]:
    return sorted(step for step in _numbers(names) if f"{step}/{MARKER}" in names)


def steps_in(folder: Path) -> list[int]:
    """Steps of the whole checkpoints below an address, rising."""
    return _whole(store.files_below(folder, RunError))


def about_in(folder: Path, step: int) -> tuple[Path, dict[str, Any]]:
    """The marker of a step, and where it is.

    Raises:
      RunError: it cannot be read.
    """
    path = folder / str(step) / MARKER
    return path, require_shape(path, read_object(path, RunError, "a checkpoint of a run"), ABOUT, RunError)


def read_in(folder: Path, step: int, target: Leaves) -> Leaves:
    """Some of the arrays of a step, on the devices that ``target`` says; of one that is not there, what was passed in.

    Raises:
      ChesError: a file is damaged or gone.
    """
    path, about = about_in(folder, step)

    def one(name: str, wanted: Any) -> Any:
        if name not in about["blocks"]:
            return wanted
        blocks = [
            (
                tuple(b["start"]),
                Tensor(name, tuple(b["shape"]), str(wanted.dtype), path.parent / b["file"], b["offset"]),
            )
            for b in about["blocks"][name]
        ]
        read: dict[tuple[tuple[int, int], ...], np.ndarray] = {}  # devices that hold the same part share it

        def part(index: tuple[slice, ...] | None) -> np.ndarray:
            bounds = tuple(s.indices(n)[:2] for s, n in zip(index or (), wanted.shape, strict=True))
            if bounds not in read:
                read[bounds] = _part(path, blocks, bounds, np.dtype(wanted.dtype))
            return read[bounds]

        return jax.make_array_from_callback(wanted.shape, wanted.sharding, part, dtype=wanted.dtype)

    with ThreadPoolExecutor(READERS) as pool:
        return dict(zip(target, pool.map(one, target, target.values()), strict=True))


def _part(
    path: Path, blocks: list[tuple[tuple[int, ...], Tensor]], bounds: tuple[tuple[int, int], ...], dtype: np.dtype
) -> np.ndarray:
    """The numbers between ``bounds`` (start and stop on each axis) of an array that is stored in blocks.

    Raises:
      RunError: the blocks do not fill them.
    """
    out = np.empty([stop - start for start, stop in bounds], dtype)
    filled = 0
    for begins, tensor in blocks:
        # of each axis, from where to where both have it
        common = [
            (max(start, at), min(stop, at + size))
            for (start, stop), at, size in zip(bounds, begins, tensor.shape, strict=True)
        ]
        if any(start >= stop for start, stop in common):
            continue
        there = tuple(slice(a - at, b - at) for (a, b), at in zip(common, begins, strict=True))
        here = tuple(slice(a - start, b - start) for (a, b), (start, _) in zip(common, bounds, strict=True))
        found = tensor.read(there)
        out[here] = found
        filled += found.size
    if filled != out.size:
        raise RunError(f"{path}: the blocks of {blocks[0][1].name if blocks else 'an array'} do not fill it")
    return out
