"""Write authors_golden.json: what functions of papers' own code compute on random numbers.

No code of theirs is kept here; this script is run by hand, with the checkout whose commit is named:

    git clone https://github.com/Vance0124/Token-level-Direct-Preference-Optimization tdpo
    git -C tdpo checkout 2a736ecb285394a8419b461816bce1ba3b093cc9
    python tests/losses/make_authors_golden.py tdpo/trainers.py

The two functions that make TDPO's loss are taken out of their file, which imports more than is installed.
"""

import ast
import json
import sys
from pathlib import Path
from typing import Any

import torch

OUT = Path(__file__).with_name("authors_golden.json")
COMMIT = "Vance0124/Token-level-Direct-Preference-Optimization@2a736ecb285394a8419b461816bce1ba3b093cc9"
FUNCTIONS = ("tdpo_loss", "_tdpo_get_batch_logps")
PAIRS, WIDTH, VOCABULARY = 4, 6, 7
IGNORED = -100


def authors_functions(path: Path) -> dict[str, Any]:
    """``FUNCTIONS`` of a file, without what else it imports."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    kept: list[ast.stmt] = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name in FUNCTIONS]
    names: dict[str, Any] = {"torch": torch, "F": torch.nn.functional}
    exec("from typing import *", names)
    exec(compile(ast.Module(kept, []), str(path), "exec"), names)
    return names


def main(path: Path) -> None:
    """Random logits of policy and reference for both responses of each pair, and the losses."""
    theirs = authors_functions(path)
    generator = torch.Generator().manual_seed(0)
    sides: dict[str, dict[str, Any]] = {}
    sums = {}
    for side in ("chosen", "rejected"):
        logits, reference = (
            2 * torch.randn(PAIRS, WIDTH, VOCABULARY, generator=generator, dtype=torch.float64) for _ in range(2)
        )
        labels = torch.randint(0, VOCABULARY, (PAIRS, WIDTH), generator=generator)
        prompt = torch.randint(1, WIDTH - 1, (PAIRS,), generator=generator)
        labels[torch.arange(WIDTH)[None] < prompt[:, None]] = IGNORED
        sums[side] = theirs["_tdpo_get_batch_logps"](logits, reference, labels)
        values = {"logits": logits, "reference": reference, "labels": labels}
        sides[side] = {name: value.tolist() for name, value in values.items()}
    (chosen, chosen_kl, _), (rejected, rejected_kl, _) = sums["chosen"], sums["rejected"]
    cases = []
    for loss, hyper in (("tdpo", {"beta": 0.3}), ("tdpo2", {"beta": 0.3, "alpha": 0.7})):
        values, *_ = theirs["tdpo_loss"](
            chosen, rejected, chosen_kl, rejected_kl, 0.3, hyper.get("alpha", 0.5), loss == "tdpo2"
        )
        cases.append({"loss": loss, "hyper": hyper, "per_pair": values.tolist()})
    record = {"source": COMMIT, "torch": torch.__version__, "sides": sides, "cases": cases}
    OUT.write_text(json.dumps(record) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
