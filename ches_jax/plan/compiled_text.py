"""What a compiled program moves between devices, read from its text: collectives by kind, with their bytes.

A collective inside a loop counts as often as the loop runs, which the compiler writes beside it, or its condition says
(a counter from 0 below a constant, to which its body adds a constant). So all layers of a scanned model are counted.
Rings of ``collective-permute`` that feed a product piece by piece are the compiler's way to gather a sharded weight
while it multiplies.
"""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "ragged-all-to-all")
BYTES = {
    "pred": 1, "s4": 0.5, "u4": 0.5, "s8": 1, "u8": 1, "f8e4m3fn": 1, "f8e5m2": 1, "s16": 2, "u16": 2, "bf16": 2,
    "f16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8,
}  # fmt: skip
_HEADER = re.compile(r"^(?:ENTRY )?%?(?P<name>[\w.\-]+) \(.*\) -> .* \{$")
_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%(?P<name>[\w.\-]+) = (?P<type>\(.*?\)|\S+) (?P<op>[\w\-]+)\((?P<rest>.*)$")
_ARRAY = re.compile(r"(?P<dtype>[a-z]\w*)\[(?P<shape>[\d,]*)\]")
_CALLED = re.compile(r"(?:body|condition|to_apply|calls|branch_computations)=\{?(?P<names>%[\w.\-]+(?:, ?%[\w.\-]+)*)")
_CONSTANT = re.compile(r"%(?P<name>[\w.\-]+) = [su]\d+\[\]\S* constant\((?P<value>\d+)\)")
_COUNTED = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_COMPARED = re.compile(r"ROOT .* compare\(%(?P<counter>[\w.\-]+), %(?P<bound>[\w.\-]+)\), direction=LT")
_PLACE = re.compile(r"%(?P<name>[\w.\-]+) = [su]\d+\[\]\S* get-tuple-element\(.*\), index=(?P<index>\d+)")
_ADDED = re.compile(r"%(?P<name>[\w.\-]+) = [su]\d+\[\]\S* add\(%(?P<one>[\w.\-]+), %(?P<other>[\w.\-]+)\)")
_RESULT = re.compile(r"ROOT .* tuple\((?P<names>[^()]*)\)")
_CHANNEL = re.compile(r"channel_id=(\d+)")
_CHAIN = re.compile(r'chain_id="(\d+)"')
_SOURCE = re.compile(r'op_name="([^"]*)"')
_REGIONS = re.compile(r"condition=%(?P<condition>[\w.\-]+), body=%(?P<body>[\w.\-]+)")


class Collective(NamedTuple):
    """One collective operation of a program."""

    kind: str
    bytes: int
    """Of what one device has afterwards."""
    times: int
    """How often it runs; of a loop of unknown length once."""
    source: str
    """Where in the program it comes from, as jax names it."""


def collectives(text: str) -> list[Collective]:
    """Every collective of a compiled program.

    >>> text = '''
    ... ENTRY %main (a: f32[4]) -> f32[16] {
    ...   %a = f32[4]{0} parameter(0)
    ...   ROOT %g = f32[16]{0} all-gather(%a), dimensions={0}, metadata={op_name="gather"}
    ... }
    ... '''
    >>> collectives(text)
    [Collective(kind='all-gather', bytes=64, times=1, source='gather')]
    """
    bodies = dict(_computations(text))
    entry = next((name for name in bodies if re.search(rf"^ENTRY %?{re.escape(name)} ", text, re.MULTILINE)), None)
    found: list[Collective] = []

    def walk(name: str, times: int, seen: set[tuple[str, ...]], fused: bool) -> None:
        for line in bodies.get(name, ()):
            match = _INSTRUCTION.match(line)
            if match is None:
                continue
            op = match["op"].removesuffix("-start")
            channel, chain, source = (pattern.search(line) for pattern in (_CHANNEL, _CHAIN, _SOURCE))
            # The fusions that start, carry on and end a collective beside other work each hold all of it, under one
            # channel. Elsewhere a channel says nothing: all collectives of a shard_map have the first one.
            parts = tuple(found[1] if found else "" for found in (channel, chain, source))
            key = (op, *parts) if fused and channel else (op, match["name"])
            if op in KINDS and key not in seen:
                seen.add(key)
                size = _result_bytes(match["type"], match["op"].endswith("-start"))
                found.append(Collective(op, size, times, source[1] if source else ""))
            loops = op == "while"
            inside = times * (_trips(bodies, line) if loops else 1)
            seen_inside = set() if loops else seen
            for called in _CALLED.finditer(match["rest"]):
                for inner in re.findall(r"%([\w.\-]+)", called["names"]):
                    walk(inner, inside, seen_inside, fused or op == "fusion")

    if entry is not None:
        walk(entry, 1, set(), False)
    return found


def _trips(bodies: dict[str, list[str]], line: str) -> int:
    """How often a loop runs; 1 where that is decided by another than a counter below a constant."""
    if counted := _COUNTED.search(line):
        return int(counted[1])
    regions = _REGIONS.search(line)
    condition = bodies.get(regions["condition"], []) if regions else []
    compared = next((m for one in condition if (m := _COMPARED.search(one))), None)
    bound = None if compared is None else _constants(condition).get(compared["bound"])
    if regions is None or compared is None or bound is None:
        return 1
    places = {m["name"]: int(m["index"]) for one in condition if (m := _PLACE.search(one))}
    return -(-bound // _step(bodies.get(regions["body"], []), places.get(compared["counter"])))


def _step(body: list[str], place: int | None) -> int:
    """What a loop adds to its counter, which is at ``place`` of its values; 1 where that is not a constant."""
    result = next((m["names"] for one in body if (m := _RESULT.search(one))), "")
    names = re.findall(r"%([\w.\-]+)", result)
    if place is None or place >= len(names):
        return 1
    constants = _constants(body)
    added = (m for one in body if (m := _ADDED.search(one)) and m["name"] == names[place])
    steps = (constants.get(m[term]) for m in added for term in ("one", "other"))
    return next((step for step in steps if step), 1)


def _constants(lines: list[str]) -> dict[str, int]:
    return {m["name"]: int(m["value"]) for one in lines if (m := _CONSTANT.search(one))}


def _computations(text: str) -> Iterator[tuple[str, list[str]]]:
    name, lines = None, []
    for line in text.splitlines():
        header = _HEADER.match(line)
        if header and not line.startswith(" "):
            name, lines = header["name"], []
        elif line.startswith("}") and name is not None:
            yield name, lines
            name = None
        elif name is not None:
            lines.append(line)


def _result_bytes(kind: str, starts: bool) -> int:
    """Bytes of the result: of an operation that starts it is the second array, behind its operand."""
    sizes = [
        int(BYTES.get(m["dtype"], 0) * math.prod(int(n) for n in m["shape"].split(",") if n))
        for m in _ARRAY.finditer(kind)
    ]
    if starts and len(sizes) > 1:
        return max(sizes[0], sizes[1])
    return sum(sizes)


def totals(found: list[Collective]) -> dict[str, dict[str, int]]:
    """By kind: how many run, their bytes on a device, and those of the largest one.

    >>> totals([Collective("all-reduce", 8, 3, ""), Collective("all-reduce", 4, 1, "")])
    {'all-reduce': {'runs': 4, 'bytes': 28, 'largest': 8}}
    """
    by_kind: dict[str, dict[str, int]] = {}
    for one in found:
        kind = by_kind.setdefault(one.kind, {"runs": 0, "bytes": 0, "largest": 0})
        kind["runs"] += one.times
        kind["bytes"] += one.times * one.bytes
        kind["largest"] = max(kind["largest"], one.bytes)
    return by_kind
