"""What cost most of a profiled call, from the trace that ``jax.profiler`` wrote."""

import gzip
import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any


def top_costs(directory: Path, most: int = 12) -> list[dict[str, Any]]:
    """The operations with the largest share of all time in operations, largest first.

    Args:
      directory: what ``jax.profiler.trace`` was given.
      most: how many.

    Returns:
      ``name`` (without the number that tells operations of one kind apart), ``share`` and ``seconds``, summed over
      the threads or streams that ran them.

    Raises:
      FileNotFoundError: no trace in the directory.
    """
    files = sorted(directory.rglob("*.trace.json.gz"))
    if not files:
        raise FileNotFoundError(f"{directory}: no *.trace.json.gz below it; expected one that jax.profiler.trace wrote")
    with gzip.open(files[-1], "rt", encoding="utf-8") as file:
        events = json.load(file)["traceEvents"]
    spent = own_time(e for e in events if e.get("ph") == "X" and "hlo_op" in e.get("args", {}))
    total = sum(spent.values())
    return [
        {"name": name, "share": round(time / total, 4), "seconds": round(time / 1e6, 6)}
        for name, time in spent.most_common(most)
    ]


def own_time(events: Iterable[Mapping[str, Any]]) -> Counter[str]:
    """Microseconds by kind of operation, without what a loop or a branch spent in the operations inside it.

    >>> loop = {"pid": 1, "tid": 1, "ts": 0, "dur": 10, "name": "while.3"}
    >>> dot = {"pid": 1, "tid": 1, "ts": 2, "dur": 7, "name": "dot.12"}
    >>> sorted(own_time([dot, loop]).items())
    [('dot', 7), ('while', 3)]
    """
    lanes: dict[tuple[int, int], list[Mapping[str, Any]]] = defaultdict(list)
    for event in events:
        lanes[event["pid"], event["tid"]].append(event)
    spent: Counter[str] = Counter()
    for lane in lanes.values():
        around: list[Mapping[str, Any]] = []
        for event in sorted(lane, key=lambda e: (e["ts"], -e["dur"])):
            while around and around[-1]["ts"] + around[-1]["dur"] <= event["ts"]:
                around.pop()
            if around:
                spent[_kind(around[-1]["name"])] -= event["dur"]
            spent[_kind(event["name"])] += event["dur"]
            around.append(event)
    return spent


def _kind(name: str) -> str:
    """Name without its number.

    >>> [_kind(n) for n in ("dot.12", "loop_add_fusion_3", "gemm_128x64")]
    ['dot', 'loop_add_fusion', 'gemm_128x64']
    """
    return re.sub(r"([._]\d+)+$", "", name)
