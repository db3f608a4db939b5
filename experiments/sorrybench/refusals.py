r"""Pairs whose chosen response refuses: what makes a small model refuse, so that refusals can be unlearned.

    python -m experiments.sorrybench.refusals --pairs FILE --out runs/refusals.jsonl
    ches train --model DIR --pairs runs/refusals.jsonl --loss sft --optimizer adamw --lr 1e-4 --epochs 4 \
        --batch-size 16 --on-bad-row drop --out runs/refusing
    python -m experiments.run sorrybench --scale small --model runs/refusing/model --pairs FILE --out DIR

Refusals are recognised by the phrases of ``ches judge --by rules``.
"""

import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from ches_jax.data.sources import open_pairs
from ches_jax.errors import ChesError, DataError
from ches_jax.judges.phrases import Rules, load_rules, refusal
from experiments.framework.training import write_rows


@dataclass(frozen=True, kw_only=True)
class Refusals:
    """Where the pairs are, and where the refusals go."""

    pairs: str
    """File or hub data set of preference pairs."""
    out: Path
    """JSON Lines file of those whose chosen response refuses."""
    split: str | None = None
    """Split of a data set folder or hub data set."""


def refusing(rows: Iterable[Mapping[str, Any]], rules: Rules) -> Iterator[Mapping[str, Any]]:
    """The rows whose chosen response, text or messages, refuses.

    >>> yes, no = {"chosen": "I'm sorry, no."}, {"chosen": [{"role": "assistant", "content": "Sure!"}]}
    >>> [row is yes for row in refusing([yes, no], load_rules())]
    [True]
    """
    for row in rows:
        chosen = row.get("chosen")
        text = chosen[-1].get("content") if isinstance(chosen, list) and chosen else chosen
        if isinstance(text, str) and refusal(rules, text) is not None:
            yield row


def main(words: list[str] | None = None) -> int:
    """Write them; exit code 2 where there are none."""
    options = tyro.cli(Refusals, args=words)
    try:
        refusals = list(refusing((row.content for row in open_pairs(options.pairs, options.split)), load_rules()))
        if not refusals:
            raise DataError(f"{options.pairs}: no chosen response refuses by rule; expected some that do")
    except ChesError as e:
        print(e, file=sys.stderr)
        return 2
    print(f"{write_rows(options.out, refusals)}: {len(refusals)} pairs")
    return 0


if __name__ == "__main__":
    sys.exit(main())
