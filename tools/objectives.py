"""docs/objectives.md: every objective from the registry, and what each did in one small run of the bundled model.

    python tools/objectives.py measure     runs what docs/objectives.json does not have yet; a minute each
    python tools/objectives.py page        writes docs/objectives.md from the registry and docs/objectives.json

The runs differ in their loss alone: the same pairs in the same order, the same optimiser, the same number of updates.
The optimiser divides each gradient by its size, so the unit of a loss does not decide how far a run gets.
"""

import inspect
import json
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

from equations import from_sphinx

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "objectives.md"
NUMBERS = ROOT / "docs" / "objectives.json"
COLUMNS = ("chosen_token_rewards", "rejected_token_rewards")
"""Rewards of tokens, as `ches label --by contrast` writes them."""
RUN = {"limit": 128, "holdout": 32, "batch_size": 16, "steps": 12, "lr": 5e-5, "optimizer": "rmsprop", "seed": 0}
"""Options that all runs share."""
WRAPPED = (
    "wpo(dpo)",
    "gate(dpo)",
    "rc(dpo)",
    "smooth(dpo)",
    "unbiased(dpo)",
    "soft(dpo)",
    "lcpo(dpo)",
    "weighted(dpo)",
    "unsure_tokens(dpo)",
    "beyond_shared_length(dpo)",
    "differing_spans(dpo)",
    "dpo + sft",
    "dpo + sft_sum",
    "simpo + sft",
)
"""Expressions beside the losses themselves. ``soft`` has the probability 0.9 for every label, ``weighted`` weight 1."""


def expressions() -> list[str]:
    """What is measured: each equation once under its first name, and the expressions of ``WRAPPED``."""
    from ches_jax.losses import distinct_losses

    return [*distinct_losses(), *WRAPPED]


class Bench:
    """One start for all runs: the bundled model, its reference, the batches, and two compiled programs.

    The gradient of a loss is that of the log-probabilities, each times what the loss makes of it (its incentives). So
    one program computes log-probabilities, one takes incentives and makes an update, and a loss compiles only itself.
    """

    def __init__(self, folder: Path):
        import jax
        import numpy as np

        from ches_jax.models.attention.choose import with_gradient
        from ches_jax.train.assemble import assemble
        from ches_jax.train.config import TrainConfig
        from ches_jax.train.data.examples import _spans
        from ches_jax.train.forward import batch_logps
        from ches_jax.train.observe.pair_logprobs import Evaluator
        from ches_jax.train.optimizer import make_optimizer
        from ches_jax.train.setup import prepare

        every = "every_token(dpo)"  # its batches hold tokens and the reference of each
        config = TrainConfig(**RUN, loss=every, out=str(folder / "run"), probes="none", watch=2**31, export=False)
        (folder / "run").mkdir()
        run = prepare(config)
        parts = assemble(run, folder / "run")
        self.run, self.start = run, parts.take_state()
        spans = _spans(run.train.pairs, config.eos)
        loader, plan = parts.loader, run.plan
        self.batches = []
        for step in range(plan.total):
            (batch,), (group,) = loader(step), plan.update(step)
            n = len(group)
            extra = {"weights": np.ones(n), "label_probability": np.full(n, 0.9)}
            extra |= {"rewards_chosen": np.full(n, 2.0), "rewards_rejected": np.ones(n)}
            extra |= {"scores": np.tile([1.0, 0.0], (n, 1))}
            extra = {k: v.astype(np.float32) for k, v in extra.items()}
            assert batch.tokens is not None
            width = batch.tokens.mask.shape[2]
            for name, values in spans.items():
                mask = np.zeros((n, width), np.int32)
                for row, i in zip(mask, group, strict=True):
                    row[: len(values[i])] = values[i]
                extra[name] = mask
            self.batches.append(batch._replace(extra=extra))
        optimizer = make_optimizer(config.optimizer, run.schedule)
        policy = parts.policy
        self.evaluate = Evaluator(policy.abstract, run.mesh, run.layout, run.attention.attend)
        self.policy = policy

        def logps(params: Any, batch: Any) -> Any:
            model = policy.with_parameters(policy.parameters(params))
            return batch_logps(model, batch, norms=True, attend=with_gradient(model.config, model.dtype))

        def update(params: Any, opt_state: Any, batch: Any, cotangents: Any) -> Any:
            def of(params: Any) -> Any:
                found = logps(params, batch)
                return found.responses, found.tokens

            _, back = jax.vjp(of, params)
            (gradient,) = back(cotangents)
            updates, opt_state = optimizer.update(gradient, opt_state, params)
            return jax.tree.map(lambda p, u: p + u.astype(p.dtype), params, updates), opt_state

        self.logps, self.update = jax.jit(logps), jax.jit(update)
        self.before = {n: self.evaluate(policy.parameters(self.start.params), p) for n, p in run.sets.items()}

    def measure(self, expression: str) -> dict[str, Any]:
        """Mean changes of one run with their intervals, nats: chosen, rejected, margin, and the same held out."""
        import jax
        import jax.numpy as jnp
        import numpy as np

        from ches_jax.losses import parse_loss
        from ches_jax.train.batch_loss import loss_inputs
        from ches_jax.train.forward import ResponseLogps
        from ches_jax.train.objective import initial_loss_state

        loss = parse_loss(expression)

        def incentives(responses: Any, tokens: Any, norms: Any, batch: Any, state: Any) -> Any:
            def mean(sides: Any) -> Any:
                responses, tokens = sides
                value, aux = loss(loss_inputs(loss, batch, ResponseLogps(responses, tokens, norms), state))
                new = {k.removeprefix("state/"): v for k, v in aux.items() if k.startswith("state/")}
                return jnp.mean(value), new

            return jax.grad(mean, has_aux=True)((responses, tokens))

        program = jax.jit(incentives)
        params, opt_state, state = self.start.params, self.start.opt_state, initial_loss_state(loss)
        for batch in self.batches:
            found = self.logps(params, batch)
            thin = batch._replace(
                rows=batch.rows._replace(**{n: np.zeros((0, 1), np.int32) for n in batch.rows._fields})
            )
            cotangents, state = program(found.responses, found.tokens, found.head_norms, thin, state)
            params, opt_state = self.update(params, opt_state, batch, cotangents)
        numbers: dict[str, Any] = {"loss": repr(loss)}
        for name, prefix in (("train", ""), ("held_out", "held_out_")):
            now = self.evaluate(self.policy.parameters(params), self.run.sets[name])
            numbers |= {prefix + column: interval for column, interval in changes(now, self.before[name]).items()}
        return numbers


def changes(now: Any, then: Any) -> dict[str, list[float]]:
    """Mean changes of chosen, rejected and margin, each (chosen, rejected) before and after, with intervals."""
    import numpy as np

    from ches_jax.displacement.intervals import of_pairs

    chosen, rejected = now[0] - then[0], now[1] - then[1]
    found = of_pairs(np.stack([chosen, rejected, chosen - rejected]))
    return {
        column: [round(v, 3) for v in (interval.mean, interval.low, interval.high)]
        for column, interval in zip(("chosen", "rejected", "margin"), found, strict=True)
    }


def by_training(expression: str, folder: Path) -> dict[str, Any]:
    """``Bench.measure`` of a loss that reads more than log-probabilities: a run of ``ches train``."""
    import numpy as np
    import pyarrow.parquet as pq

    from ches_jax.losses import parse_loss
    from ches_jax.losses.tokens import TOKEN_WEIGHTS
    from ches_jax.train.config import TrainConfig
    from ches_jax.train.loop import train

    out = folder / expression
    options: dict[str, Any] = {}
    if parse_loss(expression).needs >= TOKEN_WEIGHTS:
        options = {"pairs": str(_rewarded(folder / "rewarded")), "token_weights": ",".join(COLUMNS)}
    config = TrainConfig(**RUN, **options, loss=expression, out=str(out), probes="none", watch=2**31, export=False)
    train(config, quiet=True)
    rows = pq.read_table(out / "displacement.parquet").to_pylist()
    numbers: dict[str, Any] = {"loss": repr(parse_loss(expression))}
    for name, prefix in (("train", ""), ("held_out", "held_out_")):
        of_set = [row for row in rows if row["set"] == name and row["step"] == RUN["steps"]]
        moved = np.array([[row["dlogp_chosen"], row["dlogp_rejected"]] for row in of_set]).T
        numbers |= {prefix + column: interval for column, interval in changes(moved, 0 * moved).items()}
    return numbers


def _rewarded(out: Path) -> Path:
    """The pairs with the rewards that the model gives their tokens."""
    from ches_jax.label.config import LabelConfig
    from ches_jax.label.run import PAIRS, label

    if not out.exists():
        label(LabelConfig(by="contrast", limit=RUN["limit"], out=str(out)), quiet=True)
    return out / PAIRS


def needs_a_run(expression: str) -> bool:
    """Whether a loss reads more than log-probabilities of pairs, samples and lists."""
    from ches_jax.losses import parse_loss
    from ches_jax.losses.tokens import TOKEN_WEIGHTS
    from ches_jax.train.objective import is_unpaired, reads_joint
    from ches_jax.train.token_masks import reads_reference_states

    loss = parse_loss(expression)
    return is_unpaired(loss) or reads_joint(loss) or reads_reference_states(loss) or loss.needs >= TOKEN_WEIGHTS


def measured() -> dict[str, Any]:
    """What was measured so far, by expression."""
    return json.loads(NUMBERS.read_text(encoding="utf-8"))["runs"] if NUMBERS.exists() else {}


def measure_all() -> None:
    """Runs what is not there yet; keeps each result as it comes."""
    found = measured()
    with tempfile.TemporaryDirectory() as folder:
        bench = None
        for expression in expressions():
            if expression in found:
                continue
            try:
                if needs_a_run(expression):
                    found[expression] = by_training(expression, Path(folder))
                else:
                    bench = bench or Bench(Path(folder))
                    found[expression] = bench.measure(expression)
            except Exception as error:  # a loss that cannot be run is reported, the others are still run
                print(expression, "FAILED", type(error).__name__, str(error)[:200], flush=True)
                continue
            print(expression, found[expression], flush=True)
            text = json.dumps({"run": RUN, "runs": found}, indent=1)
            text = re.sub(r"\[\s+([^\]]+?)\s+\]", lambda m: "[" + " ".join(m[1].split()) + "]", text)
            NUMBERS.write_text(text + "\n", encoding="utf-8")


def cell(interval: list[float]) -> str:
    """A mean with its interval."""
    mean, low, high = interval
    return f"{mean:+.2f} [{low:+.2f}, {high:+.2f}]"


def verdict(run: dict[str, Any]) -> str:
    """What happened to the chosen responses of training, in a word."""
    (_, low, high), (_, margin, _) = run["chosen"], run["margin"]
    if high < 0:
        return "**displaces**" if margin > 0 else "falls"
    return "rises" if low > 0 else "undecided"


HEAD = """# Objectives

Every loss, wrapper and rule that `ches train --loss EXPRESSION` takes; `python tools/objectives.py page` writes this
page from the registry. An expression is made of losses with their numbers, wrappers and weights, such as
`wpo(dpo(beta=0.1)) + 0.2*sft`; what is resolved is printed and kept in `run.json`. The same in Python:
`ches_jax.losses.parse_loss`, or the functions themselves.

Notation: r+ and r- are log-ratios to the reference in nats, summed over the tokens of the chosen and rejected response;
m = r+ - r-, z = beta m. Incentives are minus the derivative of the loss by ln pi(chosen), and its derivative by
ln pi(rejected); `ches_jax.losses.incentives` gives them for every loss by automatic differentiation. Below they are at
the reference, for one pair of 4 and 6 tokens (-8 and -15 nats): what pushes first, and how unequally.

TRL's `loss_type=["sigmoid", "bco_pair", "sft"]` with `loss_weights=[0.8, 0.2, 1]` is
`0.8*sigmoid + 0.2*bco_pair_unshifted + sft`; `--loss '["sigmoid", "sft"]'` is read too, with all weights 1. TRL's `ipo`
is `ipo_mean`, `nca_pair` is `nca`, `ld_alpha` is `ld_dpo`, `discopop_tau` is the tau of `discopop`, and
`f_divergence_type` with `sigmoid` is `fdpo_forward_kl`, `fdpo_js` or `fdpo_alpha`. In Python `ches_jax.losses.from_trl`
takes these under TRL's names. `use_weighting` is `wpo(...)` but for an alignment of the weights that TRL adds, and
`rpo_alpha`, which TRL had before 1.0, is `+ ALPHA*sft`.

<picture>
<source media="(max-width: 45em)" srcset="images/incentives_narrow.svg">
<img alt="How hard each loss of pairs pushes, by the margin" src="images/incentives.svg">
</picture>

The picture has every loss whose rows are single pairs; `python tools/incentive_plots.py` draws it from the registry.
Where the two curves are one, a loss pushes both responses equally; where the solid one lies below the line, it lowers
the chosen response.
"""


def incentive_cells(name: str) -> str:
    """Incentives of a loss at the reference, where it is one of pairs."""
    import jax.numpy as jnp
    import numpy as np

    from ches_jax.losses import LossInputs, RunningMean, incentives, parse_loss

    loss = parse_loss(name)
    logps = {"logp_chosen": -8.0, "logp_rejected": -15.0, "ref_logp_chosen": -8.0, "ref_logp_rejected": -15.0}
    numbers = {
        **logps,
        **{name.replace("logp_", "logp_joint_"): value for name, value in logps.items()},
        "chosen_tokens": 4.0,
        "rejected_tokens": 6.0,
        "rewards_chosen": 2.0,
        "rewards_rejected": 1.0,
        "weights": 1.0,
        "label_probability": 0.9,
    }
    whole = {
        "reward_mean": RunningMean(0.0, 0.0),
        "label_prior": 0.9,
        "log_delta": 0.0,
        "head_norm_chosen": 1.0,
        "head_norm_rejected": 1.0,
    }
    if not loss.needs <= numbers.keys() | whole.keys():
        return "by token, sample or rank"
    fields: dict[str, Any] = {k: jnp.array([v]) for k, v in numbers.items() if k in loss.needs}
    fields |= {k: v for k, v in whole.items() if k in loss.needs}
    push = incentives(loss)(LossInputs(**fields))
    return f"{float(np.asarray(push.chosen)[0]):.3g}, {float(np.asarray(push.rejected)[0]):.3g}"


def page() -> str:
    """The whole page."""
    from ches_jax.losses import WRAPPERS, describe, distinct_losses, get_loss

    runs = measured()
    left = [name for name in expressions() if name not in runs]
    missing = f" Not measured yet: {', '.join(f'`{name}`' for name in left)}." if left else ""
    out = [HEAD]
    out.append("## Which objectives displace\n")
    out.append(
        f"One run each of the bundled model on the first {RUN['limit']} bundled pairs: {RUN['steps']} updates of "
        f"{RUN['batch_size']} pairs, {RUN['optimizer']},\nlearning rate {RUN['lr']:g}, {RUN['holdout']} rows held out. "
        "Mean changes in nats with 95% intervals over pairs. Samples and lists\nare the two responses of each pair, "
        "scores 2 and 1 (lists: 1 and 0), labels right with probability 0.9; unpaired\nlosses read each "
        f"response alone. `every_token` and `given_weights` with weights of 1 are the loss they wrap, and so is "
        f"`weighted(bco)`\nhere, where good and bad responses have the same prompts.{missing} "
        "The numbers are `docs/objectives.json`.\n"
    )
    out.append(
        "| loss | chosen responses | ln pi(chosen) | ln pi(rejected) | margin | held-out chosen | held-out margin |"
    )
    out.append("|---|---|---|---|---|---|---|")
    for run in sorted(runs.values(), key=lambda run: run["chosen"][0]):
        keys = ("chosen", "rejected", "margin", "held_out_chosen", "held_out_margin")
        out.append(f"| `{run['loss']}` | {verdict(run)} | " + " | ".join(cell(run[k]) for k in keys) + " |")
    out.append("\n## Losses\n")
    for name, names in distinct_losses().items():
        out.append(f"### {name}\n")
        if len(names) > 1:
            out.append("Also: " + ", ".join(f"`{get_loss(n)!r}`" for n in names[1:]) + ".\n")
        out.append(
            f"`{get_loss(name)!r}` · incentives at the reference: {incentive_cells(name)} · {get_loss(name).source}\n"
        )
        out.append(markdown(describe(name)))
    out.append("## Wrappers and rules of tokens\n")
    for name, one in WRAPPERS.items():
        numbers = "".join(f", {k}={v:g}" for k, v in one.defaults.items())
        source = f" · {one.source}" if one.source else ""
        out.append(f"### {name}\n\n`{name}(LOSS{numbers})`{source}\n")
        out.append(markdown(inspect.getdoc(one.make) or ""))
    return "\n".join(out).rstrip() + "\n"


def markdown(docstring: str) -> str:
    """A docstring with its equations as blocks, and its sections as words in bold."""
    text = from_sphinx(inspect.cleandoc(docstring))
    text = re.sub(r"^(Defaults|References|Args):\n((?:[ ]+.*(?:\n|\Z))+)", _section, text, flags=re.M)
    return text.replace("``", "`") + "\n"


def _section(match: re.Match[str]) -> str:
    lines = inspect.cleandoc(match[2]).splitlines()
    joined = "\n".join(f"- {line}" if match[1] == "Args" and not line.startswith(" ") else line for line in lines)
    return f"**{match[1]}.** {joined}\n" if match[1] != "Args" else f"{joined}\n"


if __name__ == "__main__":
    if sys.argv[1:] == ["measure"]:
        measure_all()
    elif sys.argv[1:] == ["page"]:
        PAGE.write_text(page(), encoding="utf-8")
    else:
        raise SystemExit(__doc__)
