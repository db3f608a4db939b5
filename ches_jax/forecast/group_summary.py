"""What the forecast of groups says, in numbers and in words."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa

from ches_jax.forecast.config import GroupsConfig

WINNERS, LOSERS = "winners", "losers"


def summarise(table: pa.Table, config: GroupsConfig, known: str, updates: int) -> dict[str, Any]:
    """The numbers of a finished run over groups.

    Args:
      table: ``groups.parquet``.
      config: what was asked.
      known: what the advantages come from, ``advantage`` or ``reward``.
      updates: of the run that is forecast.
    """
    column = {n: table[n].to_numpy(zero_copy_only=False) for n in table.schema.names if n != "row_id"}
    c, group = column["coefficient"], column["group"]
    sizes = np.bincount(group)
    learning = np.unique(group[c != 0])
    inside = {WINNERS: c > 0, LOSERS: c < 0}
    winners = inside[WINNERS]
    return {
        "objective": config.objective,
        "advantages": f"from rewards, {config.objective}" if known == "reward" else "of the rows",
        "optimizer": config.optimizer,
        "lr": config.lr,
        "updates": updates,
        "groups": len(sizes),
        "responses": len(c),
        "groups_without_advantage": len(sizes) - len(learning),
        "responses_of_a_group": {"least": int(sizes.min()), "most": int(sizes.max())},
        "sets": {name: _set(column, some) for name, some in inside.items() if some.any()},
        "winners_that_fall": int(column["falls"].sum()),
        "groups_with_one": int(np.unique(group[column["falls"]]).size),
        "winners_forecast_to_fall": int((column["forecast"][winners] < 0).sum()),
    }


def _set(column: Mapping[str, np.ndarray], inside: np.ndarray) -> dict[str, Any]:
    names = ("forecast", "rate", "rate_own", "rate_winners", "rate_losers", "head_rate")
    return {"responses": int(inside.sum()), **{n: float(column[n][inside].mean()) for n in names}}


def summary_text(summary: Mapping[str, Any]) -> str:
    """The summary for a person."""
    lines = [
        f"{summary['groups']} groups, {summary['responses']} responses; advantages {summary['advantages']}; "
        f"{summary['groups_without_advantage']} groups of equal rewards or zero advantage teach nothing",
        f"{summary['updates']} updates of {summary['optimizer']} at {summary['lr']:g}, first order, means:",
    ]
    for name, one in summary["sets"].items():
        lines.append(
            f"  {name:7} {one['responses']:6}: {one['forecast']:+.3g} nats by all groups; rate by its own group "
            f"{one['rate']:+.3g} = own {one['rate_own']:+.3g}, other winners {one['rate_winners']:+.3g}, other losers "
            f"{one['rate_losers']:+.3g}"
        )
    winners = summary["sets"].get(WINNERS)
    if winners:
        n = winners["responses"]
        lines.append(
            f"winners that fall (lazy likelihood displacement): {summary['winners_that_fall']} of {n} by their own "
            f"group's update, in {summary['groups_with_one']} groups; {summary['winners_forecast_to_fall']} of {n} by "
            "all groups' updates"
        )
    return "\n".join(lines)


def headline(summary: Mapping[str, Any]) -> str:
    """One line of results."""
    winners = summary["sets"].get(WINNERS)
    of = f" of {winners['responses']}" if winners else ""
    return f"{summary['groups']} groups: {summary['winners_that_fall']}{of} winners fall by their own group's update"
