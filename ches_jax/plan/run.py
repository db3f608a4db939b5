"""``ches plan``: the programs of a verb compiled for devices that are not there, and what they would need."""

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from ches_jax.bundled import located, model_dir
from ches_jax.distributed.mesh import mesh_of, parse_mesh, spelled
from ches_jax.errors import ChesError
from ches_jax.face import make_callable
from ches_jax.hf.directory import CONFIG, read_json, resolve
from ches_jax.models.attention.choose import planned_attention
from ches_jax.models.checkpoint.stored_names import effective_config
from ches_jax.models.config import DecoderConfig
from ches_jax.models.decoder import parameter_count
from ches_jax.models.families.registry import decoder_config
from ches_jax.models.platform import planned_for
from ches_jax.options import require_dtype, require_positive
from ches_jax.plan import arithmetic, programs
from ches_jax.plan.arithmetic import Layout
from ches_jax.plan.compiled_text import collectives, totals
from ches_jax.plan.config import PlanConfig
from ches_jax.plan.topologies import BETWEEN_SLICES, Topology, devices_of, parse_topology
from ches_jax.runs.directory import versions, write_json
from ches_jax.runs.progress import say
from ches_jax.runs.store import output_place
from ches_jax.train.objective import get_objective
from ches_jax.train.optimizer import optimizer_hyper

make_callable(__name__)

HEADROOM = 0.92
"""Share of a device's memory that a program may take: the rest is the runtime's."""
TRIED = 4
"""Meshes that ``auto`` compiles before it gives up."""


def plan(config: PlanConfig, *, quiet: bool = False) -> dict[str, Any]:
    """What a run would need, and how long it would take at best; a JSON value.

    >>> found = plan(PlanConfig(what="score", topology="h100:8"), quiet=True)
    >>> found["fits"], found["mesh"], found["counted"]
    (True, 'data=8', 'by arithmetic')

    Raises:
      ChesError: a model, topology, mesh, loss or optimiser that is none; the TPU compiler is not installed.
    """
    require_dtype("dtype", config.dtype)
    names = ("rows", "row_tokens", "pairs", "pair_tokens", "epochs", "lora_rank", "prompt_tokens", "new_tokens")
    require_positive({n.replace("_", "-"): getattr(config, n) for n in names})
    if config.what == "train":
        optimizer_hyper(config.optimizer, {})
        get_objective(config.loss, {})
    topology = parse_topology(config.topology, config.slices)
    decoder = _decoder(config.model)
    compiles = topology.chip.platform == "tpu" and not config.arithmetic
    if compiles and len(devices := devices_of(topology)) != topology.size:
        raise ChesError(f"--topology {topology.name}: the compiler counts {len(devices)} devices in it")
    tried: list[dict[str, Any]] = []
    for number, layout in enumerate(_layouts(config, decoder, topology), 1):
        say(f"{_in_words(layout)} on {topology.size} x {topology.name.partition(':')[0]}", quiet=quiet)
        of_one = topology.of_host() if layout.meshes > 1 else topology
        found = (
            _compiled(decoder, config, topology, layout, devices_of(of_one))
            if compiles and _may_fit(decoder, config, topology, layout)
            else _counted(decoder, config, topology, layout)
        )
        tried.append(found)
        if found["fits"] or number == TRIED:
            break
    best = next((one for one in tried if one["fits"]), tried[-1])
    record = {
        "what": config.what,
        "model": config.model,
        "family": decoder.family,
        "parameters": parameter_count(decoder),
        "topology": topology.name,
        "slices": topology.slices,
        "devices": topology.size,
        "options": _options(config),
        **best,
        "tried": [{n: one.get(n) for n in ("mesh", "fits", "bytes")} for one in tried],
        **_times(decoder, config, topology, best),
        "versions": versions() | _compiler(),
    }
    if config.out is not None:
        write_json(output_place(config.out), record)
    return record


def _decoder(model: str) -> DecoderConfig:
    """The architecture from a directory, a hub name, or a ``config.json`` alone."""
    path = Path(located(model, model_dir))
    if path.is_file():
        return decoder_config(read_json(path), str(path))
    if path.is_dir() and not any(path.glob("*.safetensors")):
        return decoder_config(read_json(path / CONFIG), str(path))
    directory = resolve(model)
    return decoder_config(effective_config(directory), str(directory))


def _options(config: PlanConfig) -> dict[str, Any]:
    shown = ("dtype", "rows", "row_tokens", "pairs", "pair_tokens", "epochs", "logps", "loss", "optimizer", "lora_rank",
             "remat", "prompt_tokens", "new_tokens")  # fmt: skip
    return {name: getattr(config, name) for name in shown}


def _layouts(config: PlanConfig, decoder: DecoderConfig, topology: Topology) -> list[Layout]:
    """The given mesh, or those that the counts leave, best first."""
    if config.mesh != "auto":
        sizes = parse_mesh(config.mesh)
        layout = arithmetic.layout(config, sizes, topology)
        if layout is None:
            asked = math.prod(sizes.values())
            raise ChesError(
                f"--mesh {config.mesh}: has {asked} devices, {topology.name} has {topology.size}, a host of it "
                f"{topology.size // topology.hosts}; score and generate take one of these numbers, other verbs all"
            )
        return [layout]
    every = arithmetic.layouts(decoder, config, topology)
    room = topology.chip.memory * HEADROOM
    fitting = [f for f in every if arithmetic.bytes_of(decoder, config, f.sizes).total <= room]
    # where none fits by arithmetic, the one that holds least says how much is missing
    return fitting or [min(every, key=lambda f: arithmetic.bytes_of(decoder, config, f.sizes).total)]


def _may_fit(decoder: DecoderConfig, config: PlanConfig, topology: Topology, layout: Layout) -> bool:
    """Whether weights and optimiser alone leave room, which is known without compiling."""
    found = arithmetic.bytes_of(decoder, config, layout.sizes)
    return found.weights + found.optimiser < topology.chip.memory


def _in_words(layout: Layout) -> str:
    return spelled(layout.sizes) + (f" in each of {layout.meshes} processes" if layout.meshes > 1 else "")


def _place(layout: Layout, topology: Topology) -> dict[str, Any]:
    """The mesh as the verb is given it, and what its processes share."""
    share = "chunks" if layout.meshes > 1 else "batches" if topology.hosts > 1 else "nothing"
    return {"mesh": spelled(layout.sizes), "processes": topology.hosts, "processes_share": share}


def _counted(decoder: DecoderConfig, config: PlanConfig, topology: Topology, layout: Layout) -> dict[str, Any]:
    found = arithmetic.bytes_of(decoder, config, layout.sizes)
    return {
        "counted": "by arithmetic",
        **_place(layout, topology),
        "fits": bool(found.total <= topology.chip.memory * HEADROOM),
        "bytes": {**found._asdict(), "total": found.total, "of": int(topology.chip.memory)},
        "collectives": None,
    }


def _compiled(
    decoder: DecoderConfig, config: PlanConfig, topology: Topology, layout: Layout, devices: list[Any]
) -> dict[str, Any]:
    mesh = mesh_of(np.asarray(devices), layout.sizes)
    began, moved, memory, parts = time.perf_counter(), [], [], {}
    try:
        with planned_for(topology.chip.platform):
            for program in _programs(decoder, config, mesh):
                parts = program.parts
                compiled = program.lower().compile()
                memory.append(_memory(compiled, program.parts))
                moved.append((program.times, totals(collectives(compiled.as_text()))))
    except jax.errors.JaxRuntimeError as error:
        return _refused(topology, layout, parts, error)
    most = max(memory, key=lambda m: m["total"])
    by_kind = {
        kind: {
            **{n: int(sum(times * one[kind][n] for times, one in moved if kind in one)) for n in ("runs", "bytes")},
            "largest": max(one[kind]["largest"] for _, one in moved if kind in one),
        }
        for kind in sorted({kind for _, one in moved for kind in one})
    }
    return {
        "counted": "by the compiler",
        **_place(layout, topology),
        "fits": bool(most["total"] <= topology.chip.memory * HEADROOM),
        "bytes": {**most, "of": int(topology.chip.memory)},
        "collectives": by_kind,
        "seconds_of_compiling": round(time.perf_counter() - began, 1),
    }


def _refused(topology: Topology, layout: Layout, parts: Any, error: Exception) -> dict[str, Any]:
    """The compiler says that a program does not fit."""
    text = str(error)
    if "RESOURCE_EXHAUSTED" not in text and "Ran out of memory" not in text:
        raise ChesError(f"--mesh {spelled(layout.sizes)}: does not compile for {topology.name}: {text[:400]}") from None
    return {
        "counted": "by the compiler",
        **_place(layout, topology),
        "fits": False,
        "bytes": {**dict(parts), "total": None, "of": int(topology.chip.memory)},
        "collectives": None,
        "reason": text.partition("\n")[0][:300],
    }


def _programs(decoder: DecoderConfig, config: PlanConfig, mesh: Mesh) -> list[programs.Program]:
    kinds: dict[str, Callable[[], list[programs.Program]]] = {
        "score": lambda: programs.score(
            decoder, config, mesh, planned_attention(decoder, config.dtype, mesh.devices.flat[0]).attend
        ),
        "generate": lambda: programs.generate(decoder, config, mesh),
        "train": lambda: programs.train(decoder, config, mesh),
        # a gradient with a direction in place of the optimiser's moments
        "forecast": lambda: programs.train(decoder, config, mesh),
    }
    return kinds[config.what]()


def _memory(compiled: Any, parts: Any) -> dict[str, int]:
    """Bytes of a device by what they are; the compiler counts arguments, results and temporaries."""
    found = compiled.memory_analysis()
    # an argument that the program does not read is on the device all the same; one that it reads may be padded
    arguments = max(sum(parts.values()), int(found.argument_size_in_bytes))
    results = max(0, int(found.output_size_in_bytes - found.alias_size_in_bytes))
    temporaries = int(found.temp_size_in_bytes)
    return {**parts, "temporaries": temporaries, "results": results, "total": arguments + temporaries + results}


def _times(decoder: DecoderConfig, config: PlanConfig, topology: Topology, found: dict[str, Any]) -> dict[str, Any]:
    """The roofline: no run is faster than its arithmetic, its memory and its network allow."""
    chip, sizes = topology.chip, parse_mesh(found["mesh"])
    rows = config.rows * sizes["data"] * sizes["fsdp"] * sizes["expert"]
    rows *= topology.hosts if found["processes_share"] == "chunks" else 1
    pairs = rows if config.what == "generate" else rows * config.row_tokens * arithmetic.FILLED / config.pair_tokens
    pair = arithmetic.flops_of_pair(decoder, config)
    again = 4 / 3 if config.what == "train" and config.remat else 1.0
    work = found["bytes"].get("total") or arithmetic.bytes_of(decoder, config, sizes).total
    held = found["bytes"].get("weights", 0) + found["bytes"].get("optimiser", 0)
    reads = held * (config.new_tokens + 1) if config.what == "generate" else work
    slow = topology.slices > 1 and found["processes_share"] == "batches"
    network = sum(one["bytes"] for one in (found["collectives"] or {}).values())
    passes = config.epochs if config.what == "train" else 8 if config.what == "forecast" else 1
    seconds = {
        "arithmetic": pairs * pair / passes * again / (topology.size * chip.flops),
        "memory": reads / chip.bandwidth,
        "network": network / (min(chip.links, BETWEEN_SLICES * topology.size) if slow else chip.links),
    }
    step = max(seconds.values()) * passes
    hours = config.pairs / pairs * step / 3600
    return {
        "flops_a_pair": pair,
        "estimate": {
            "says": "a roofline: the most that peak rates allow; real runs reach a part of it",
            "pairs_a_step": round(pairs, 2),
            "seconds_a_step": {name: float(f"{value:.4g}") for name, value in seconds.items()},
            "bound_by": max(seconds, key=lambda name: seconds[name]),
            "pairs_a_second": float(f"{pairs / step:.4g}"),
            "hours": float(f"{hours:.4g}"),
            "chip_hours": float(f"{hours * topology.size:.4g}"),
        },
    }


def _compiler() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return {"libtpu": version("libtpu")}
    except PackageNotFoundError:
        return {}


def table(found: dict[str, Any]) -> str:
    """The plan for a person."""
    gib = 2**30
    lines = [
        f"{found['what']} of {found['model']} ({found['parameters'] / 1e9:.3g} B parameters) on "
        f"{found['devices']} devices, {found['topology']}" + (f" x {found['slices']}" if found["slices"] > 1 else ""),
        f"mesh            {found['mesh']}{'' if found['fits'] else '  DOES NOT FIT'}  ({found['counted']})",
        f"processes       {found['processes']}, which share {found['processes_share']}",
        "",
        "bytes a device",
    ]
    lines += [
        f"  {name:<14}{'unknown' if value is None else f'{value / gib:9.3f} GiB'}"
        for name, value in found["bytes"].items()
    ]
    if found["collectives"] is not None:
        lines += ["", "collectives of a step, on a device"]
        lines += [
            f"  {kind:<20}{one['runs']:>7} times {one['bytes'] / 1e6:12.1f} MB"
            for kind, one in found["collectives"].items()
        ] or ["  none"]
    e = found["estimate"]
    lines += [
        "",
        f"FLOPs a pair    {found['flops_a_pair']:.3g}",
        f"estimate        {e['pairs_a_second']:.4g} pairs/s, bound by {e['bound_by']}; "
        f"{found['options']['pairs']} pairs: {e['hours']:.3g} h, {e['chip_hours']:.3g} chip-hours",
        f"                {e['says']}",
    ]
    if found.get("reason"):
        lines.append(found["reason"])
    return "\n".join(lines)
