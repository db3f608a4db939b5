"""The card of a selection: what was kept, by which rule, from what, and what that does not show."""

from collections.abc import Mapping
from typing import Any

from ches_jax.runs.markdown import cell, table

_HEADER = """\
---
tags:
- preference
- dpo
- ches
configs:
- config_name: default
  data_files:
  - split: train
    path: pairs.jsonl
---
"""

_CAUTION = """\
## Before you use it

- A score is a property of a pair *on one model*. Score again for another model.
- CHES grows with the rejected response's length. Compare with `--control length` and
  `--control random`, which keep as many rows.
- Whether to drop the most similar pairs is debated. The paper found that training on the pairs with
  the lowest length-normalised CHES kept a model from unlearning refusals; others advise pairs that
  differ as little as possible on the surface. Filtering does not stop displacement as such.
"""


def card(summary: Mapping[str, Any]) -> str:
    """The dataset card: what was kept, by which rule, from which scores; cautions."""
    rule, counts, lengths = summary["rule"], summary["counts"], summary["mean_lengths"]
    share = counts["kept"] / counts["scored"]
    kept_range, all_range = summary["score_range"]["kept"], summary["score_range"]["all"]
    lines = [
        "# A selection of preference pairs",
        "",
        f"{counts['kept']} of {counts['scored']} scored rows ({share:.2%}), by `{rule['keep']}` of "
        f"`{rule['by']}`; control: {rule['control']}; duplicates left out: {rule['dedup']}; seed {rule['seed']}.",
        "",
        f"- {rule['by']} of the kept rows: {kept_range[0]:.6g} to {kept_range[1]:.6g} "
        f"(all: {all_range[0]:.6g} to {all_range[1]:.6g})",
        *(f"- dropped, {cell(reason)}: {n}" for reason, n in summary["source"]["dropped"].items()),
    ]
    if soft := summary["soft"]:
        lines += [f"- soft weights, {name.replace('_', ' ')}: {_number(v)}" for name, v in soft.items()]
    lines += ["", "## Length shift", "", "| mean tokens | kept | all |", "|---|---|---|"]
    lines += [f"| {n} | {lengths['kept'][n]:.1f} | {lengths['all'][n]:.1f} |" for n in lengths["all"]]
    rho = summary["spearman_score_length_difference"]
    lines += ["", f"Spearman({rule['by']}, rejected - chosen tokens) over all rows: {_number(rho)}"]
    if categories := summary.get("categories"):
        lines += ["", "## Categories", "", "| category | kept | scored |", "|---|---|---|"]
        lines += [f"| {cell(c)} | {n['kept']} | {n['scored']} |" for c, n in categories.items()]
    lines += ["", "## Provenance", ""]
    source = {f"source {k}": summary["source"][k] for k in ("pairs", "fingerprint")}
    provenance = source | {f"scores {k}": v for k, v in summary["scores"].items()}
    lines += table(provenance)
    return _HEADER + "\n".join(lines) + "\n\n" + _CAUTION


def _number(value: float | None) -> str:
    return "undefined" if value is None else f"{value:.4g}"
