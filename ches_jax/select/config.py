"""The options of ``ches select``. Plain data: importing this module loads no jax."""

from dataclasses import dataclass, field
from typing import Literal

from ches_jax.options import Columns, Options, Place
from ches_jax.types import Control


@dataclass(frozen=True, kw_only=True)
class SelectConfig(Options):
    """What ``ches select`` does.

    >>> SelectConfig(scores="runs/a", keep="lowest:0.05", out="kept").keep
    'lowest:0.05'
    """

    scores: Place
    """A directory of ``ches influence`` or ``ches score``, or the table in it."""
    out: Place
    """The directory to write; must not exist, or be empty."""
    by: str = "influence"
    """The score: influence (of a directory of `ches influence`; the only filter that was measured to help), head_score,
    ches, ln_ches, last_hidden_inner, cosine, swapped, minus_edit_distance, projection, logp_margin, chosen_tokens or
    random; the more harmful or similar a pair, the higher. soft_ches: CHES expected under a label_probability column of
    the data, p CHES + (1 - p) swapped. Or column:EXPRESSION over numbers of the table and of the
    data, with + - * / comparisons abs log min max: column:chosen_score-rejected_score."""
    keep: str = "lowest:0.05"
    """Which rows: lowest:0.05 (a share), lowest:19 (rows), highest:0.05, window:0.5,512 (quantile, rows),
    quantile:0,0.25, below:-10, above:-10, or soft:0.5 (all rows, weighted)."""
    dedup: Literal["none", "exact", "near"] = "none"
    """Rows that repeat an earlier one are left out before the rule: exactly (but for case, punctuation and white
    space), or nearly (word triples of prompt and of both responses with a Jaccard similarity from 0.8)."""
    control: Control = "none"
    """To compare with: as many rows, by chance (random) or by response length alone (length)."""
    seed: int = 0
    """Of the controls and of ``--by random``."""
    pairs: str | None = None
    """The pairs that were scored; taken from the run when not given."""
    split: str | None = None
    """Which split of them; taken from the run when not given."""
    columns: Columns = field(default_factory=dict)
    """Other names of columns (prompt=instruction); taken from the run when not given."""
