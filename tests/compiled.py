"""One compilation cache for the whole suite, of every process it starts, kept between runs.

The tests start the same tiny models hundreds of times. What they compile is kept under ``.pytest_cache/xla``, in a
folder for each version of jax and each processor (code compiled for one may not run on another), and without the
optimisations that cost more than they save here.

Importing this module sets the environment of this process and of those it starts; it must come before jax.
"""

import hashlib
import os
import platform
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).parents[1]
DEVICES = 8
"""Virtual devices of a process: the meshes of the model tests have three axes of two."""
FLAGS = ["--xla_cpu_use_fusion_emitters=false", "--xla_cpu_parallel_codegen_split_count=1"]
"""The older code generator in one piece: it compiles a training step in a third of the time. Known to jaxlib 0.10 (a
flag that XLA does not know ends the process)."""


def processor() -> str:
    """As ``ches_jax.runs.compilation_cache`` has it, which cannot be imported before the checker of shapes is there."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = [platform.processor()]
    # x86 tells "flags", Arm "Features"; the numbers of a moment (MHz, bogomips) stay out
    kinds = {line for line in lines if line.partition(":")[0].strip() in {"flags", "Features", "model", "CPU part"}}
    return f"{platform.machine()} {sorted(kinds)}"


def xla_flags() -> str:
    """What XLA reads, for this process and its children: the caller's own flags come last, so that they win."""
    ours = [
        f"--xla_force_host_platform_device_count={DEVICES}",
        *(FLAGS if version("jaxlib").startswith("0.10.") else []),
    ]
    theirs = os.environ.get("XLA_FLAGS", "").split()
    return " ".join([*(flag for flag in ours if flag not in theirs), *theirs])


def cache_folder() -> Path:
    """Where this machine's compiled programs lie."""
    seen = f"{processor()} {version('jaxlib')} {xla_flags()}"
    return ROOT / ".pytest_cache" / "xla" / f"jax-{version('jax')}-{hashlib.sha256(seen.encode()).hexdigest()[:12]}"


def environment() -> dict[str, str]:
    """The variables jax reads, for this process and its children."""
    values = {
        "JAX_COMPILATION_CACHE_DIR": str(cache_folder()),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "JAX_PLATFORMS": "cpu",
        "HF_HUB_OFFLINE": "1",
    }
    return {name: os.environ.get(name, value) for name, value in values.items()}


os.environ.update(environment())
os.environ["XLA_FLAGS"] = xla_flags()
if "PYTEST_XDIST_WORKER" in os.environ:
    # as many workers as processors: more threads in each only take turns
    for name in ("NPROC", "OMP_NUM_THREADS", "RAYON_NUM_THREADS"):
        os.environ.setdefault(name, "1")
