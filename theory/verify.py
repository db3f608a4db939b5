"""Runs the claims: ``python -m theory.verify [--claims T4 T5] [--out DIR] [--model DIR --pairs FILE]``.

Without a model the claims about toy models run, in float64; with one, those about a real model. Double precision is
switched on for this run only, never by an import.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from ches_jax.errors import ChesError
from ches_jax.options import require_positive
from ches_jax.runs.directory import device_name, require_no_other, versions, write_json
from ches_jax.runs.files import replacing
from ches_jax.runs.store import remove
from theory.claims import Claim, Context, all_claims, find
from theory.report import CLAIMS, FIGURES


@dataclass(frozen=True, kw_only=True)
class Result:
    """A claim and what was seen."""

    id: str
    statement: str
    source: str
    status: str
    scope: str
    passed: bool
    value: float
    """Worst error, worst violation or, for what is refuted as printed, how wrong it is."""
    tolerance: float
    n: int
    seed: int
    dtype: str
    seconds: float
    detail: dict[str, Any]
    figure: dict[str, Any]
    """What the claim's figures are drawn from."""


def verify(
    claims: str | Sequence[str] | None = None,
    *,
    seed: int = 0,
    instances: int = 1000,
    model: str | Path | None = None,
    pairs: str | Path | None = None,
    limit: int = 32,
    quiet: bool = False,
) -> list[Result]:
    """Checks claims; the arguments are those of ``ches_jax.verify``, which calls this.

    Raises:
      ChesError: an unknown id, a claim about a real model without one, or numbers of which no check can be made.
    """
    require_positive({"instances": instances, "limit": limit})
    if seed < 0:
        raise ChesError(f"--seed {seed}: expected 0 or more")
    with jax.enable_x64(True):
        real = None
        if model is not None:
            from theory.models.real import open_real_model

            real = open_real_model(model, pairs, limit=limit)
        chosen = (
            find([claims] if isinstance(claims, str) else claims)
            if claims
            else all_claims("toy" if model is None else "model")
        )
        without_model = [c.id for c in chosen if c.scope == "model" and real is None]
        if without_model:
            raise ChesError(f"claims about a real model ({', '.join(without_model)}) need --model DIR")
        context = Context(seed=seed, instances=instances, model=real)
        bar = tqdm(chosen, desc="claims", unit="claim", disable=quiet or None, file=sys.stderr)
        results = []
        for c in bar:
            bar.set_postfix_str(c.id)
            results.append(_run(c, context))
        return results


def _run(c: Claim, context: Context) -> Result:
    start = time.perf_counter()
    seen = c.check(replace(context, id=c.id))
    return Result(
        id=c.id,
        statement=c.statement,
        source=c.source,
        status=c.status,
        scope=c.scope,
        passed=bool(c.holds(seen)),
        value=float(seen.value),
        tolerance=c.tolerance,
        n=int(seen.n),
        seed=context.seed,
        dtype="float64",
        seconds=round(time.perf_counter() - start, 3),
        detail=_plain(seen.detail),
        figure=_plain(seen.figure),
    )


def _plain(value: Any) -> Any:
    """JSON values of whatever a check put in its detail."""
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, np.ndarray | jax.Array):
        return _plain(np.asarray(value).tolist())
    if isinstance(value, np.generic):
        return _plain(value.item())
    # JSON has no infinities
    return str(value) if isinstance(value, float) and not np.isfinite(value) else value


def _short(value: Any) -> Any:
    """Numbers with the six digits that a figure can show."""
    if isinstance(value, dict):
        return {k: _short(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_short(v) for v in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


def table(results: Sequence[Result]) -> str:
    """The results as text, one line each."""
    lines = [f"{'':4}  {'id':5} {'status':18} {'value':>10}  {'tolerance':>10} {'n':>7} {'s':>6}  statement"]
    for r in results:
        sign = ">=" if r.status == "refuted as printed" else "<="
        lines.append(
            f"{'ok' if r.passed else 'FAIL':4}  {r.id:5} {r.status:18} {r.value:10.2e} {sign}{r.tolerance:9.0e} "
            f"{r.n:7d} {r.seconds:6.1f}  {r.statement}"
        )
    return "\n".join(lines)


def write_results(out: Path, results: Sequence[Result], options: dict[str, Any]) -> Path:
    """``claims.json`` (the options (`asked`), versions, device, every result), ``claims.txt``, ``figures.json``."""
    path = out / CLAIMS
    remove(path)  # it is written last: with it all of this is of one verification
    passed = sum(r.passed for r in results)
    summary = {"passed": passed, "failed": len(results) - passed, "asked": options}
    claims = [{k: v for k, v in asdict(r).items() if k != "figure"} for r in results]
    with replacing(out / FIGURES) as temporary:
        temporary.write_text(json.dumps({r.id: _short(r.figure) for r in results if r.figure}) + "\n", encoding="utf-8")
    with replacing(out / "claims.txt") as temporary:
        temporary.write_text(table(results) + "\n", encoding="utf-8")
    write_json(path, summary | {"versions": versions(), "device": device_name(), "claims": claims})
    return path


def parser() -> argparse.ArgumentParser:
    """Options of the command line."""
    p = argparse.ArgumentParser(prog="ches verify", description="check the claims of the theory")
    p.add_argument("--claims", nargs="+", metavar="ID", help="ids; default: all that apply")
    p.add_argument("--out", type=Path, help="directory for the results; ches report DIR makes a page of them")
    p.add_argument("--model", help="Hugging Face model directory: check the claims about real models on it")
    p.add_argument("--pairs", help="preference pairs for --model; default: the bundled ones")
    p.add_argument("--limit", type=int, default=32, help="pairs used (default 32)")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--instances", type=int, default=1000, help="random instances of an exact claim (default 1000)")
    p.add_argument("--list", action="store_true", help="name the claims and stop")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns 0 if every claim holds, 1 if one fails, 2 for bad input."""
    options = parser().parse_args(argv)
    try:
        if options.list:
            print("\n".join(f"{c.id:5} {c.scope:5} {c.status:18} {c.statement}" for c in all_claims()))
            return 0
        if options.out:
            require_no_other(options.out, CLAIMS, "this verification")
        results = verify(
            options.claims,
            seed=options.seed,
            instances=options.instances,
            model=options.model,
            pairs=options.pairs,
            limit=options.limit,
        )
        print(table(results))
        failed = [r.id for r in results if not r.passed]
        print(
            f"{len(results) - len(failed)} of {len(results)} claims hold"
            + (f"; not: {', '.join(failed)}" if failed else "")
        )
        if options.out:
            recorded = {name: getattr(options, name) for name in ("seed", "instances", "model", "pairs", "limit")}
            print(write_results(options.out, results, recorded))
    except ChesError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
