"""``ches label --by density-ratio``: rows of one response to the same rows with a weight for unpaired BCO."""

import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from ches_jax.data.audit import UNSCORABLE, Audit, require_clean
from ches_jax.data.prompts import lookup
from ches_jax.data.sources import Record, row_id
from ches_jax.data.unpaired import LABEL, ONE_RESPONSE, is_good, with_own_flags
from ches_jax.errors import DataError
from ches_jax.inputs import Opener
from ches_jax.label.config import LabelConfig
from ches_jax.label.density import density_ratio, weights_of
from ches_jax.scores.prompt_states import prompt_states
from ches_jax.stats import QUANTILES, quantiles

RATIO, WEIGHT = "density_ratio", "density_weight"


def rows_of_one_response(config: LabelConfig, opener: Opener) -> list[Record]:
    """The rows as pairs of two equal responses, and whether they are good under ``LABEL``; with those of no content.

    Raises:
      DataError: rows of another kind, a label that is none.
    """
    source = opener.rows(config.pairs, config.split, config.columns, ONE_RESPONSE, "pairs")
    name = config.columns.get(LABEL) or LABEL
    rows = []
    for (where, raw), (row,) in itertools.islice(source.rows_with_raw(0), config.limit):
        if row.fault:
            rows.append(row)
            continue
        try:
            good = is_good(name, lookup(raw, name))
        except DataError as error:
            raise DataError(f"{source.name}, {where}: {error}") from None
        # one response may be there as a good and as a bad one
        identity = row_id({"row": row.row_id, "good": good})
        rows.append(replace(row, row_id=identity, extra={**row.extra, LABEL: good}))
    return rows


def density_weights(
    config: LabelConfig, opener: Opener, rows: Sequence[Record]
) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
    """``RATIO`` and ``WEIGHT`` of each row by its id, and what the classifier knows; unfit rows are left out.

    Raises:
      DataError: rows that are not fit, under the policy ``on_bad_row``; none that is.
      ChesError: rows of one kind only, or too few of one.
    """
    model = opener.model(config.model)
    opener.tokenizer(model, config.template)
    tokenizer = model.pair_tokenizer(
        max_length=config.max_length, eos=config.eos, template=config.template, template_args=config.template_args
    )
    pairs = [with_own_flags(pair) for pair in tokenizer(rows)]
    audit = Audit()
    audit.extend(pairs)
    if config.on_bad_row == "error":
        require_clean(audit, config.pairs)
    usable = [
        i
        for i, pair in enumerate(pairs)
        if (not pair.flags if config.on_bad_row == "drop" else UNSCORABLE.isdisjoint(pair.flags))
    ]
    if not usable:
        raise DataError(f"{config.pairs}: no row is left ({len(rows)} read, all left out)")
    good = np.array([rows[i].extra[LABEL] for i in usable])
    prompts = [pairs[i].prompt for i in usable]
    features = prompt_states(model.directory, model.decoder, prompts, config.representation, config.dtype)
    found = density_ratio(
        features,
        good,
        prompts,
        folds=config.folds,
        seed=config.seed,
        most_rows=config.fit_rows,
        penalty=config.penalty,
    )
    weight = weights_of(found.ratio, good, config.min_ratio, config.max_ratio)
    columns = {
        rows[i].row_id: {RATIO: float(r), WEIGHT: float(w)} for i, r, w in zip(usable, found.ratio, weight, strict=True)
    }
    of_bad = weight[~good]
    summary = {
        "density": {
            "representation": config.representation,
            "folds": config.folds,
            "seed": config.seed,
            "fit_rows": config.fit_rows,
            "bounds": [config.min_ratio, config.max_ratio],
            "good": int(good.sum()),
            "bad": int((~good).sum()),
            "prompts": len(set(prompts)),
            "penalty": found.penalty,
            "held_out_loss": found.held_out_loss,
            "held_out_auc": found.held_out_auc,
            "ratio_of_bad": dict(zip(QUANTILES, quantiles(found.ratio[~good]), strict=True)),
            "at_lower_bound": float(np.mean(found.ratio[~good] <= config.min_ratio)),
            "at_upper_bound": float(np.mean(found.ratio[~good] >= config.max_ratio)),
            "effective_bad": float(of_bad.sum() ** 2 / (of_bad**2).sum()),
        }
    }
    return columns, summary
