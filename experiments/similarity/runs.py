"""The stages from the windows on: one training run per window and seed, and the coefficients of single pairs."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from experiments.framework.intervals import spread
from experiments.framework.item import Work
from experiments.framework.training import run_training, write_rows
from experiments.framework.tuning import start_model
from experiments.similarity.config import Objective, SimilarityScale
from experiments.similarity.data import pairs_file


def run_name(objective: str, measure: str, quantile: float, seed: int) -> str:
    """Name of the stage of one training run."""
    return f"train/{objective}/{measure}/{quantile:g}/{seed}"


def train_window(
    work: Work, name: str, objective: Objective, measure: str, quantile: float, seed: int
) -> dict[str, Any]:
    """One epoch on the pairs of a window; the change of every pair."""
    import json

    from ches_jax.train.config import TrainConfig

    config: SimilarityScale = work.config
    rows = work.value("windows")["rows"][measure][f"{quantile:g}"]
    lines = pairs_file(work).read_text(encoding="utf-8").splitlines()
    out = work.folder(f"train/{name}-{measure}-{quantile:g}-{seed}")
    file = write_rows(out.with_name(f"{out.name}.jsonl"), [json.loads(lines[i]) for i in rows])
    done = run_training(
        TrainConfig(
            model=str(start_model(work)),
            pairs=str(file),
            out=str(out),
            loss=objective.loss,
            loss_args=dict(objective.loss_args),
            lr=objective.lr,
            batch_size=config.batch_size,
            accumulate=config.accumulate,
            max_length=config.max_length,
            on_bad_row="keep",
            template="none",
            row_tokens=row_tokens(config),
            watch=config.window,
            seed=seed,
            mesh=config.mesh,
            export=False,
        ),
        quiet=True,
    )
    file.unlink()
    end = done.of("train")
    return {
        "losses": done.losses,
        "dlogp_chosen": float(end["dlogp_chosen"].mean()),
        "dlogp_rejected": float(end["dlogp_rejected"].mean()),
        "per_token": float(end["dlogp_chosen"].sum() / end["chosen_tokens"].sum()),
        "displaced": float((end["dlogp_chosen"] < 0).mean()),
        "margin": float(end["margin"].mean()),
        "loss_change": loss_change(objective, end["margin"]),
        "pairs": {
            "row": [rows[i] for i in end["index"].tolist()],
            "dlogp_chosen": [round(v, 5) for v in end["dlogp_chosen"].tolist()],
            "margin": [round(v, 5) for v in end["margin"].tolist()],
        },
    }


def loss_change(objective: Objective, margins: np.ndarray) -> float:
    r"""Change of the mean loss since the start, from the changes of the margins (the start is the reference).

    .. math:: \mathrm{DPO}:\ \ln(1 + e^{-\beta m}) - \ln 2, \qquad \mathrm{IPO}:\ (m - 1/(2\tau))^2 - 1/(2\tau)^2

    >>> loss_change(Objective("ipo_sum", {"tau": 0.5}, 1e-6), np.array([1.0]))
    -1.0
    """
    if objective.loss == "dpo":
        return float(np.logaddexp(0.0, -objective.loss_args["beta"] * margins).mean() - np.log(2))
    target = 0.5 / objective.loss_args["tau"]
    return float(((margins - target) ** 2).mean() - target**2)


def row_tokens(config: SimilarityScale) -> int:
    """One row length for all runs of a scale, so that they share their compiled programs: the longest possible pair."""
    return -(-2 * config.max_length // 64) * 64


def coefficients(work: Work) -> dict[str, Any]:
    """Appendix G.2: shares of positive alphas and inner products, over the first pairs that have a score."""
    from ches_jax.models.checkpoint.load import load_model

    config: SimilarityScale = work.config
    model = load_model(start_model(work), dtype="float32", param_dtype="float32")
    pairs = _token_pairs(work)
    usable = [p for p in pairs if p.chosen.targets("include") and p.rejected.targets("include")]
    usable = [p for p in usable if len(p.prompt) < config.max_length][: config.coefficients_of]
    return mean_coefficients([_coefficients(model, p, config.max_length) for p in usable])


def _token_pairs(work: Work) -> list[Any]:
    from ches_jax.data.sources import open_pairs
    from ches_jax.data.tokenize import PairTokenizer, load_tokenizer

    config: SimilarityScale = work.config
    tokenizer = PairTokenizer(load_tokenizer(start_model(work)), max_length=config.max_length, template="none")
    rows = [row for row in open_pairs(str(pairs_file(work))) if row.index < 4 * config.coefficients_of]
    return tokenizer(rows)


class PairCoefficients(NamedTuple):
    """Of one pair: shares of positive entries."""

    inner: float
    """<h+, h->, all k and k'."""
    alpha_minus: float
    alpha_plus: float
    """All k and k', with the diagonal, which cannot be negative."""
    alpha_plus_off: float
    """Without the diagonal; NaN for a response of one token."""

    @classmethod
    def of(cls, h: np.ndarray, e: np.ndarray, g: np.ndarray, f: np.ndarray) -> "PairCoefficients":
        """From the states and residuals (e_y - pi) of the chosen response (h, e) and of the rejected one (g, f)."""

        def share(values: np.ndarray) -> float:
            return float((values > 0).mean()) if values.size else float("nan")

        plus = e @ e.T
        off = plus[~np.eye(len(plus), dtype=bool)]
        return cls(share(h @ g.T), share(e @ f.T), share(plus), share(off))


def mean_coefficients(pairs: Sequence[PairCoefficients]) -> dict[str, Any]:
    """Mean over pairs of each share, with intervals over pairs."""
    values = np.array(pairs, np.float64)
    shares = {
        name: spread(column[np.isfinite(column)].tolist())
        for name, column in zip(PairCoefficients._fields, values.T, strict=True)
    }
    return {"pairs": len(pairs), **shares}


def _coefficients(model: Any, pair: Any, length: int) -> PairCoefficients:
    """Signs of one pair's coefficients, from the states and residuals of both responses."""
    sides = [
        _states(model, (*pair.prompt, *r.content), len(pair.prompt), r.targets("include"), length)
        for r in (pair.chosen, pair.rejected)
    ]
    return PairCoefficients.of(*sides[0], *sides[1])


def _states(model: Any, sequence: Any, prompt: int, targets: Any, length: int) -> tuple[np.ndarray, np.ndarray]:
    """[|y|, D] states that predict a response, and [|y|, V] residuals e_y - pi, float32."""
    import jax.numpy as jnp

    tokens = np.zeros((1, length), np.int32)
    tokens[0, : len(sequence)] = sequence
    hidden = np.asarray(_hidden()(model, jnp.asarray(tokens)))[0, prompt - 1 : prompt - 1 + len(targets)]
    logits = np.asarray(model.logits(jnp.asarray(hidden)), np.float32)
    probabilities = np.exp(logits - logits.max(1, keepdims=True))
    residual = -probabilities / probabilities.sum(1, keepdims=True)
    residual[np.arange(len(targets)), list(targets)] += 1.0
    return hidden.astype(np.float32), residual


_compiled: list[Any] = []


def _hidden() -> Any:
    from flax import nnx

    if not _compiled:
        _compiled.append(nnx.jit(lambda model, tokens: model.hidden(tokens)))
    return _compiled[0]
