"""Where compiled programs are kept between commands, and whether what lies there may be run.

A compiled program is machine code: whoever can write to the folder can run code as the user. So the default folder is
private (mode 0700, owned by the user), and a folder that is not is refused if the user named it, and left alone
otherwise. Its name holds what programs are compiled for, so that another machine on the same home directory, or another
version, has a folder of its own.
"""

import contextlib
import hashlib
import os
import platform
import stat
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from ches_jax.errors import ChesError

AUTO, OFF = "auto", "off"
VARIABLE = "CHES_COMPILATION_CACHE"
"""Says the same as ``--compilation-cache``, which comes first."""
JAX_VARIABLE = "JAX_COMPILATION_CACHE_DIR"
"""jax's own: where it is set, ``auto`` changes nothing."""
MOST_BYTES = 2**30
"""What a folder of the default place may hold: the oldest programs go first."""
_SYSTEM = (0, 65534)
"""Users that may own what a folder lies in: root, and nobody, which root looks like from inside a container."""
_SETTINGS = {
    "jax_persistent_cache_min_compile_time_secs": 0.0,  # many small programs are what a short command waits for
    "jax_persistent_cache_min_entry_size_bytes": -1,
}


def use(choice: str = AUTO) -> Path | None:
    """Have jax keep compiled programs; the folder, or None where they are not kept.

    To be called before jax is imported, or at any time before the first compilation.

    Args:
      choice: ``auto`` (as ``CHES_COMPILATION_CACHE`` or ``JAX_COMPILATION_CACHE_DIR`` say, else ``default_folder()``),
        ``off``, or a folder, which is made where it is not there.

    Raises:
      ChesError: a folder was named that others own or can write to, or that cannot be made.
    """
    if choice == AUTO:
        choice = os.environ.get(VARIABLE) or AUTO
    if choice == AUTO and os.environ.get(JAX_VARIABLE):
        return Path(os.environ[JAX_VARIABLE])
    if choice == OFF:
        _set({"jax_compilation_cache_dir": None})
        return None
    folder = default_folder() if choice == AUTO else Path(choice).expanduser().absolute()
    reason = prepared(folder)
    if reason is not None:
        if choice != AUTO:
            raise ChesError(f"--compilation-cache {choice}: {reason}")
        print(f"ches: compiled programs are not kept: {folder}: {reason}", file=sys.stderr)
        return None
    if choice == AUTO:
        shorten(folder, MOST_BYTES)
    _set({"jax_compilation_cache_dir": str(folder), **_SETTINGS})
    return folder


def default_folder() -> Path:
    """``ches-jax/compiled`` in the user's cache, with the versions and the kind of processor in its name."""
    home = os.environ.get("XDG_CACHE_HOME", "")
    base = Path(home) if Path(home).is_absolute() else Path("~/.cache").expanduser()
    kind = hashlib.sha256(processor().encode()).hexdigest()[:12]
    return base / "ches-jax" / "compiled" / f"jax-{_version('jax')}-jaxlib-{_version('jaxlib')}-{kind}"


def processor() -> str:
    """What the compiler sees of the processor: its architecture and instruction sets."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = [platform.processor()]
    # x86 tells "flags", Arm "Features"; the numbers of a moment (MHz, bogomips) stay out
    kinds = {line for line in lines if line.partition(":")[0].strip() in {"flags", "Features", "model", "CPU part"}}
    return f"{platform.machine()} {sorted(kinds)}"


def prepared(folder: Path) -> str | None:
    """Make a private folder where there is none; why it is not to be trusted, or None.

    Trusted is a folder that the user owns and nobody else can write to or replace.
    """
    if not hasattr(os, "geteuid"):
        return "this system does not say who owns a folder"
    try:
        for missing in reversed([p for p in (folder, *folder.parents) if not p.exists()]):
            missing.mkdir(mode=0o700, exist_ok=True)
        for place in (folder, *folder.resolve().parents):
            if reason := _why_open(place.lstat(), mine=place == folder):
                return reason if place == folder else f"{place}: {reason}"
    except OSError as error:
        return error.strerror or str(error)
    return None


def _why_open(about: os.stat_result, mine: bool) -> str | None:
    if not stat.S_ISDIR(about.st_mode):
        return "not a folder (nor may it be a link)"
    if about.st_uid not in ({os.geteuid()} if mine else {os.geteuid(), *_SYSTEM}):
        return f"owned by user {about.st_uid}; programs are run from a folder of your own only"
    others = about.st_mode & 0o022
    if others and (mine or not about.st_mode & stat.S_ISVTX):
        return f"others can write to it (mode {stat.S_IMODE(about.st_mode):04o}); chmod go-w makes it yours"
    return None


def shorten(folder: Path, most: int) -> None:
    """Delete the oldest files until ``most`` bytes are left; another process may do the same."""
    files = []
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            with contextlib.suppress(OSError):
                about = entry.stat(follow_symlinks=False)
                if stat.S_ISREG(about.st_mode):
                    files.append((about.st_mtime, about.st_size, entry.path))
    total = sum(size for _, size, _ in files)
    for _, size, path in sorted(files):
        if total <= most:
            return
        with contextlib.suppress(OSError):
            os.unlink(path)
        total -= size


def _set(settings: dict[str, object]) -> None:
    """Settings of jax, which may not be imported yet: then by its environment."""
    if "jax" in sys.modules:
        import jax

        for name, value in settings.items():
            jax.config.update(name, value)
        return
    for name, value in settings.items():
        if value is None:
            os.environ.pop(name.upper(), None)
        else:
            os.environ[name.upper()] = str(value)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"
