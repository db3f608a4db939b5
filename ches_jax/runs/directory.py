"""A run directory explains itself: what was asked (``config.json``), what it ran on (``run.json``).

A directory is made new, or resumed when asked and when it holds the same run; it is never written over.
"""

import dataclasses
import json
import platform
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import ches_jax
from ches_jax.errors import RunError, many
from ches_jax.runs.chunks import FOLDER as PARTS
from ches_jax.runs.chunks import work_of_all
from ches_jax.runs.files import read_object, replacing
from ches_jax.runs.lock import RunLock
from ches_jax.runs.shapes import require_shape
from ches_jax.runs.store import is_there, make_folder, remove

CONFIG = "config.json"
RUN = "run.json"
_TEXT = ("model", "pairs", "prompts", "responses", "eval_pairs", "split", "schema", "candidates")
_OPTIONS = {**{f"{name}?": str for name in _TEXT}, "limit?": int, "columns?": {str: str}}
RECORD = {**_OPTIONS, "config?": _OPTIONS, "opened?": {str: {str: str}}, "versions?": {str: str}, "status?": str}
"""The shape of what is read of ``config.json`` and ``run.json`` (version 0.1 wrote the options outside ``config``)."""
RESULTS = {
    RUN: "a run",
    CONFIG: "a run",
    "selection.json": "a selection",
    "label.json": "labelled pairs",
    "gather.json": "gathered rows",
    "diagnosis.json": "a diagnosis",
    "claims.json": "checked claims",
}
"""Files by which a directory is known as what a verb wrote."""
SPECS = ("model", "pairs", "prompts", "probes", "responses")
"""Options that may name what ships with the package."""
PACKAGES = ("jax", "jaxlib", "flax", "numpy", "transformers", "tokenizers", "datasets", "pyarrow")


def versions() -> dict[str, str]:
    """Versions of Python and the packages that decide numbers."""
    # of the code that runs, whatever is installed beside it, or is being installed just now
    return {"python": platform.python_version(), "ches-jax": ches_jax.__version__, **_installed()}


@cache
def _installed() -> Mapping[str, str]:
    """Of the packages, as this process found them first."""
    found = {}
    for name in PACKAGES:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def device_name() -> str:
    """The accelerator (or CPU) in words: kind and number."""
    import jax

    devices = jax.local_devices()
    return f"{len(devices)} x {devices[0].device_kind} ({devices[0].platform})"


def write_json(path: Path, value: Any) -> None:
    """JSON written whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of a run directory, with the names of today where version 0.1 wrote others."""
    value = require_shape(path, read_object(path, RunError, "a run directory"), RECORD, RunError)
    return _with_names_of_today(value)


def _with_names_of_today(value: dict[str, Any]) -> dict[str, Any]:
    """Version 0.1 called what ships with the package ``embedded``; it is ``bundled`` now."""
    inner = {"config": _with_names_of_today(value["config"])} if isinstance(value.get("config"), dict) else {}
    return value | {k: "bundled" for k in SPECS if value.get(k) == "embedded"} | inner


def new_name(parent: Path, verb: str) -> Path:
    """The first free ``parent/verb-NNN``."""
    n = 1
    while (path := parent / f"{verb}-{n:03d}").exists():
        n += 1
    return path


def open_run(
    out: Path, verb: str, identity: dict[str, Any], resume: bool, *, other_versions: bool = False
) -> dict[str, Any]:
    """Make ``out`` a run directory, or check that it holds this very run; returns what its ``config.json`` holds.

    Args:
      out: the directory.
      verb: the command the run belongs to.
      identity: everything that decides the results (options and fingerprints); written to ``config.json`` with the
        versions of the packages.
      resume: continue a run that is there; without it a directory with content is refused.
      other_versions: continue although package versions differ from those at the start.

    Raises:
      RunError: the directory holds something else, or a run with other options, inputs or versions (each difference
        named).
    """
    identity = {"verb": verb, **json.loads(json.dumps(identity)), "versions": versions()}
    if out.exists() and not out.is_dir():
        raise RunError(f"{out}: is a file; --out names a directory")
    # a process beside this one may be writing its temporary file
    if out.is_dir() and any(not p.name.startswith(".") for p in out.iterdir()):
        if not (out / CONFIG).exists():
            raise RunError(f"{out}: is not empty and holds no run of ours; give a new directory with --out")
        there = read_json(out / CONFIG)
        if different := differences(_of_content(there), _of_content(identity)):
            raise RunError(many(f"{out} holds another run; give a new directory with --out", different))
        if not resume:
            raise RunError(f"{out}: holds this run already; add --resume to continue it, or give a new --out")
        _require_versions(out, there, identity, other_versions)
        return there
    make_folder(out)
    write_json(out / CONFIG, identity)
    return identity


def require_no_other(out: Path, own: str, this: str) -> None:
    """For the verbs that write over what they wrote before: nothing of another verb lies in ``out``.

    Files of both would lie side by side, and one page would replace the other.

    Args:
      out: the directory, which may be there.
      own: the file of ``RESULTS`` that the verb writes itself.
      this: what the verb writes, in words.

    Raises:
      RunError: says what is there.
    """
    if out.exists() and not out.is_dir():
        raise RunError(f"{out}: is a file; --out names a directory")
    there = next((name for name in RESULTS if name != own and is_there(out / name)), None)
    if there is not None:
        raise RunError(f"--out {out} holds {RESULTS[there]}, whose page {this} would replace; give a new directory")


def _of_content(identity: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in identity.items() if name != "versions"}


def _require_versions(out: Path, there: Mapping[str, Any], now: Mapping[str, Any], other_versions: bool) -> None:
    """Before any work: a run continues with the versions it began with, unless other ones are accepted."""
    began = there.get("versions")
    if other_versions or not isinstance(began, dict) or (out / RUN).exists():  # up to 0.2 they were not kept
        return
    if different := differences(began, now["versions"]):
        raise RunError(
            many(f"{out}: was begun with other versions", different)
            + "\nwhat to do: install those, or add --other-versions to continue with these (rounding may differ)"
        )


def write_summary(out: Path, facts: Mapping[str, Any]) -> None:
    """``run.json``: what ``config.json`` holds, the versions, and ``facts``. A run that has it is finished."""
    began = read_json(out / CONFIG)
    now = versions()
    at_start = {} if began.get("versions") in (None, now) else {"versions_at_start": began["versions"]}
    write_json(out / RUN, {**began, "versions": now, **at_start, **facts})


def differences(there: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What two identities (JSON values) differ in, in words: each option, each file.

    Where both tell every file that was opened, the fingerprints that follow from these are passed over.

    >>> differences({"config": {"eos": "include", "limit": 4}}, {"config": {"eos": "exclude", "limit": 4}})
    ["eos: 'include' there, 'exclude' now"]
    >>> differences({"opened": {"model": {"a.json": "1f"}}}, {"opened": {"model": {"a.json": "2e"}}})
    ['--model, a.json: sha256 1f there, sha256 2e now']
    """
    both = "opened" in there and "opened" in now
    one, other = ({k: v for k, v in some.items() if _compared(k, both)} for some in (there, now))
    lines = _lines(one.pop("config", {}), other.pop("config", {}))
    files_there, files_now = one.pop("opened", {}), other.pop("opened", {})
    for option in sorted({*files_there, *files_now}):
        files = [some.get(option, {}) for some in (files_there, files_now)]
        for name in sorted({*files[0], *files[1]}):
            before, after = (f"sha256 {some[name][:12]}" if name in some else "no such file" for some in files)
            if before != after:
                lines.append(f"--{option.replace('_', '-')}, {name}: {before} there, {after} now")
    return [*lines, *_lines(one, other)]


def _compared(name: str, files_are_told: bool) -> bool:
    return not name.endswith("_fingerprint") if files_are_told else name != "opened"


def _lines(there: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    keys = [key for key in sorted({*there, *now}) if there.get(key) != now.get(key)]
    return [f"{key}: {there.get(key)!r} there, {now.get(key)!r} now" for key in keys]


def as_dict(config: Any) -> dict[str, Any]:
    """A config dataclass as plain JSON values, without the fields that do not decide the run (``not_identity``)."""
    decides = {f.name for f in dataclasses.fields(config) if f.metadata.get("identity", True)}
    values = {k: v for k, v in dataclasses.asdict(config).items() if k in decides}
    return {k: str(v) if isinstance(v, Path) else v for k, v in values.items()}


def merged(out: Path, finish: Callable[[Path, Mapping[str, Any]], None]) -> Path:
    """One run of what several processes made in turn, under its lock; a run with a summary stays as it is.

    Args:
      out: the run directory.
      finish: joins the chunks and writes the summary with these facts.

    Raises:
      RunError: no run, or a run at work; what ``finish`` finds missing, damaged or of another run.
    """
    read_json(out / CONFIG)
    if not (out / RUN).exists() or (out / PARTS).exists():
        with RunLock(out) as lock:
            lock.take()
            if not (out / RUN).exists():
                work = work_of_all(out)
                finish(out, {"merged": True, **({"work": work} if work else {})})
            remove(out / PARTS)
    return out
