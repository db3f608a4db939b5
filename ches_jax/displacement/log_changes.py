r"""What the rewards of a training log say about log-probabilities.

The reward of DPO and its relatives is :math:`r_\pm = \beta (\ln \pi(y_\pm|x) - \ln \pi_{ref}(y_\pm|x))`: over beta it
is the change since the reference, in nats. Other rewards are no changes, and none is made of them:

- without a reference (ORPO, CPO, SimPO): beta times the log-probability itself;
- of a reward model or a function (RLHF, PPO, GRPO, training of a reward model).

A change per token (IPO of TRL, DPO with averaged log-probabilities) tells a direction and no nats of responses; so does
a log whose beta is not known.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import numpy as np

from ches_jax.displacement.changes import Changes, Curve
from ches_jax.displacement.intervals import FEWEST
from ches_jax.displacement.readers.log import Log, Series
from ches_jax.displacement.readers.run_settings import RunSettings
from ches_jax.errors import ChesError

SIDES = ("chosen", "rejected")
Scale = Literal["nats", "sign", "per token"]
ONE = Series(np.zeros(1, int), np.ones(1))
"""The divisor of what is no product with beta."""
WITHOUT_REFERENCE = ("orpo", "simpo", "cpo", "cpo_simpo", "alphapo", "tpo", "tpo-l", "sft")
"""Losses whose rewards are log-probabilities and no changes."""
PER_TOKEN = ("ipo", "ipo_mean", "dpo_norm", "ln_dpo", "lndpo")
"""Losses for which trainers average log-probabilities over tokens."""
UNPAIRED = ("kto", "kto_pair", "apo_zero_unpaired", "bco")
"""Losses of single responses: their chosen and rejected ones belong to other prompts."""
SHORT = 8.0
"""Nats: log-probabilities of whole responses are below minus this, those of a token above it."""
EARLY, NEAR = 0.05, 0.2
"""The first entry is of the start, or near it, where its step is within this share of the run."""
REACH = 8
"""Times the pace of the entries that follow by which rewards may have left 0 before the first one. Of rewards that
approach their end as 1 - exp(-t / T), it is exceeded where T is shorter than the first entry."""
BETA_ERROR = 0.02
"""Relative error up to which a recovered beta is taken, and two betas are called the same."""
HOW_TO_LOG = (
    "trainers of the DPO family log rewards/chosen and rewards/rejected by themselves (TRL: logging_steps=10, and "
    'eval_strategy="steps" with an eval_dataset for the held-out ones); from two models the changes are computed by '
    "ches diagnose --before MODEL --after MODEL --pairs FILE"
)


def log_changes(log: Log, settings: RunSettings, beta: float | None = None, rewards: str = "auto") -> Changes:
    """The changes of log-probabilities that a log tells: held-out ones where there are any, training ones beside.

    Args:
      log: as it was read.
      settings: of the run, where files tell.
      beta: of the run, as its user says.
      rewards: ``changes`` says that the rewards are changes since a reference, where the log looks otherwise.

    Raises:
      ChesError: no rewards of both responses; rewards that are no changes, or end with NaN; betas that contradict each
        other.
    """
    if beta is not None and not beta > 0:
        raise ChesError(f"--beta {beta}: expected a positive number")
    prefix = "dlogp_" if _has(log, "dlogp_") else ""
    if not prefix:
        log = _without_absent_sides(log, settings)
        _require_rewards(log)
    log = _without_bad_entries(log, prefix)
    scale, divisor, notes = ("nats", ONE, []) if prefix else _scale(log, settings, beta, rewards)
    sets = [
        _changes(log, name, _curve(log, name, prefix, divisor), scale, (*log.notes, *notes))
        for name in _has(log, prefix)
    ]
    return sets[0] if len(sets) == 1 else replace(sets[0], beside=sets[1])


def _scale(log: Log, settings: RunSettings, beta: float | None, rewards: str) -> tuple[Scale, Series, list[str]]:
    """The unit of rewards over a divisor (over the steps), and notes on it."""
    if rewards == "auto" and (why := _no_changes(log, settings)) is not None:
        raise ChesError(
            f"{log.source}: {why}, so its rewards are no changes since a reference. {_logps_in_words(log)}Compare the "
            "models instead: ches diagnose --before MODEL --after MODEL --pairs FILE. If the run did have a reference, "
            "say so with --rewards changes"
        )
    notes = []
    if set(settings.losses) & set(UNPAIRED):
        notes.append(
            f"{settings.loss}: chosen and rejected responses are of other prompts; their margin is one of means"
        )
    if rewards == "auto" and (why := _per_token(log, settings)) is not None:
        return "per token", ONE, [*notes, why]
    known, whence = _beta(log, settings, beta)
    if known is None:
        notes.append("beta is not known, so only directions are reported; --beta NUMBER gives nats")
        if settings.loss is None and not log.matching("logps|log_probs"):
            notes.append(
                "nothing in the log says that its rewards are beta times changes of log-probabilities; trainings of "
                "reward models log outputs of their model by the same names"
            )
        return "sign", ONE, notes
    first, last = known.values[0], known.values[-1]
    words = f"beta {first:g}" if first == last else f"beta {first:g} to {last:g}, each reward by that of its step,"
    return "nats", known, [*notes, f"{words} ({whence}) turns rewards into nats"]


def _changes(log: Log, name: str, curve: Curve, scale: Scale, notes: tuple[str, ...]) -> Changes:
    held_out = name == "held_out"
    intervals = (
        "held-out intervals are the noise between evaluations of these pairs; other held-out pairs may differ more"
        if held_out
        else "training intervals are over blocks of steps; training pairs say less than held-out ones"
    )
    notes = (*notes, "the log has means of batches; single pairs may have done otherwise", intervals)
    return Changes(
        curve.chosen,
        curve.rejected,
        log.source,
        notes,
        unit="evaluations" if held_out else "steps",
        scale=scale,
        held_out=held_out,
        curve=curve,
    )


def _has(log: Log, prefix: str) -> list[str]:
    """The sets that have both sides of a quantity."""
    return [name for name in ("held_out", "train") if all(log.get(name, f"{prefix}{side}") for side in SIDES)]


def _require_rewards(log: Log) -> None:
    if _has(log, ""):
        if found := log.of_a_reward_model:
            raise ChesError(
                f"{log.source}: it logs {', '.join(found[:2])}, as the training of a reward model does: its rewards "
                f"are outputs of that model and no log-probabilities; {HOW_TO_LOG}"
            )
        return
    if not log.names:
        raise ChesError(f"{log.source}: has no metrics in it yet; {HOW_TO_LOG}")
    one = [side for side in SIDES for name in ("held_out", "train") if log.get(name, side)]
    found = ", ".join(log.names[:8]) + (", ..." if len(log.names) > 8 else "")
    if one:
        missing = SIDES[1 - SIDES.index(one[0])]
        raise ChesError(f"{log.source}: has rewards of {one[0]} responses and none of {missing} ones; {HOW_TO_LOG}")
    if reinforcement := log.of_reinforcement:
        raise ChesError(
            f"{log.source}: a log of reinforcement learning ({', '.join(reinforcement[:3])}): its rewards come from a "
            f"reward model or a function and say nothing about chosen and rejected responses; {HOW_TO_LOG}"
        )
    beside = ""
    if "current_steps" in log.names:
        beside = "; a trainer_log.jsonl of LLaMA-Factory leaves them out, trainer_state.json beside it has them"
    raise ChesError(f"{log.source}: has no rewards/chosen and rewards/rejected (it has {found}){beside}; {HOW_TO_LOG}")


def _without_absent_sides(log: Log, settings: RunSettings) -> Log:
    """A log of single responses (KTO) without the NaN of a side of which a batch had none: the other has a number."""
    if not set(settings.losses) & set(UNPAIRED) and not any(log.get(name, "kl") for name in ("train", "held_out")):
        return log
    series = dict(log.series)
    for name in _has(log, ""):
        steps, *sides = _both(log, name)
        for side, own, other in zip(SIDES, sides, sides[::-1], strict=True):
            absent = steps[np.isnan(own) & np.isfinite(other)]
            there = series[name, side]
            keep = ~np.isin(there.steps, absent)
            series[name, side] = Series(there.steps[keep], there.values[keep])
        if not np.isin(series[name, "chosen"].steps, series[name, "rejected"].steps).any():
            raise ChesError(
                f"{log.source}: no {'evaluation' if name == 'held_out' else 'logged step'} has rewards of chosen and "
                "of rejected responses both; log more batches in one entry (logging_steps)"
            )
    return replace(log, series=series)


def _without_bad_entries(log: Log, prefix: str) -> Log:
    """A log without numbers that are NaN or infinite, which a note counts and names.

    A step overflowed there, or a batch held an empty response.

    Raises:
      ChesError: the log ends with such rewards, or has no others.
    """
    for name in _has(log, prefix):
        _require_an_end(log, name, prefix)
    bad = {key: ~np.isfinite(there.values) for key, there in log.series.items()}
    if not any(of_one.any() for of_one in bad.values()):
        return log
    words = [
        f"{_called(*key)} at {of_one.sum()} of {of_one.size} entries ({_steps(log.series[key].steps[of_one])})"
        for key, of_one in bad.items()
        if of_one.any()
    ]
    series = {k: Series(log.series[k].steps[~b], log.series[k].values[~b]) for k, b in bad.items() if not b.all()}
    left = replace(log, series=series, notes=(*log.notes, f"left out as NaN or infinite: {', '.join(words)}"))
    apart = [name for name in _has(left, prefix) if not _both(left, name, prefix)[0].size]
    series = {(name, q): there for (name, q), there in series.items() if name not in apart}
    if not _has(left := replace(left, series=series), prefix):
        raise ChesError(f"{log.source}: no step has finite rewards of both responses ({', '.join(words)})")
    return left


def _require_an_end(log: Log, name: str, prefix: str) -> None:
    """Rewards that end with NaN, and no finite loss beside it, say that the run diverged.

    What it was before is not what became of it.

    Raises:
      ChesError: they are.
    """
    loss = log.get(name, "loss")
    alive = -1 if loss is None else max(loss.steps[np.isfinite(loss.values)], default=-1)
    for side in SIDES:
        series = log.get(name, f"{prefix}{side}")
        assert series is not None
        bad = ~np.isfinite(series.values)
        if bad[-1] and series.steps[-1] > alive:
            raise ChesError(
                f"{log.source}: {_called(name, prefix + side)} is NaN or infinite at {bad.sum()} of {bad.size} "
                f"entries, first at step {series.steps[bad.argmax()]}, and at the end: the run diverged, or its last "
                "batches held an empty response; diagnose a log that ends before, or mend the run"
            )


def _called(name: str, quantity: str) -> str:
    """A quantity of a set as TRL calls it.

    >>> _called("held_out", "chosen"), _called("train", "logp_rejected"), _called("train", "loss")
    ('eval_rewards/chosen', 'logps/rejected', 'loss')
    """
    known = {**{s: f"rewards/{s}" for s in SIDES}, **{f"logp_{s}": f"logps/{s}" for s in SIDES}}
    known |= {"accuracy": "rewards/accuracies", "margin": "rewards/margins"}
    return f"{'eval_' * (name == 'held_out')}{known.get(quantity, quantity)}"


def _steps(steps: np.ndarray) -> str:
    """The first of some steps in words.

    >>> _steps(np.array([5])), _steps(np.arange(1, 9))
    ('step 5', 'steps 1, 2, 3, ...')
    """
    some = ", ".join(map(str, steps[:3].tolist()))
    return f"step{'s' * (len(steps) > 1)} {some}{', ...' * (len(steps) > 3)}"


def _both(log: Log, name: str, prefix: str = "") -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Steps at which both sides were logged, and the sides."""
    chosen, rejected = log.get(name, f"{prefix}chosen"), log.get(name, f"{prefix}rejected")
    assert chosen is not None and rejected is not None
    steps, i, j = np.intersect1d(chosen.steps, rejected.steps, return_indices=True)
    return steps, chosen.values[i], rejected.values[j]


def _curve(log: Log, name: str, prefix: str, divisor: Series) -> Curve:
    steps, chosen, rejected = _both(log, name, prefix)
    by = np.interp(steps, divisor.steps, divisor.values)
    accuracy, loss = log.get(name, "accuracy"), log.get(name, "loss")
    last = float(accuracy.values[-1]) if accuracy is not None and np.isfinite(accuracy.values[-1]) else None
    ends = None
    if loss is not None and len(loss.values) > 1 and np.isfinite(loss.values[[0, -1]]).all():
        ends = (float(loss.values[0]), float(loss.values[-1]))
    return Curve(steps, chosen / by, rejected / by, last, ends)


def _no_changes(log: Log, settings: RunSettings) -> str | None:
    """Why rewards are no changes since a reference; None where nothing says so."""
    if settings.losses and set(settings.losses) <= set(WITHOUT_REFERENCE):
        return f"it was trained with {' + '.join(settings.losses).upper()}, which has no reference"
    if settings.no_reference:
        return "it was trained with reference_free, which leaves out the reference"
    for name in ("train", "held_out"):
        if log.get(name, "odds_ratio") is not None:
            return "it logs the odds ratio of ORPO, which has no reference"
    for name in _has(log, ""):
        if (factor := _factor_of_logps(log, name)) is not None:
            return f"its rewards are {factor:.3g} times its logps (ORPO, CPO, SimPO: without a reference)"
    if (start := _start(log)) is not None:
        chosen, rejected = start
        return (
            f"its first rewards are {chosen:+.3g} and {rejected:+.3g}, where those of a policy that starts at its "
            "reference are 0: without a reference (ORPO, CPO, SimPO), or of a reward model"
        )
    if settings.moving_reference:
        return "its reference is moved to the policy as it trains"
    if _leaves_the_line(log):
        return (
            "its held-out rewards do not follow its held-out logps along a line, so that beta or the reference changed "
            "during the run (a schedule that the log does not hold, sync_ref_model), or rewards are of something else"
        )
    return None


def _factor_of_logps(log: Log, name: str) -> float | None:
    """The factor between rewards and log-probabilities, where one fits every entry."""
    steps, *rewards = _both(log, name)
    series = [log.get(name, f"logp_{side}") for side in SIDES]
    if any(s is None for s in series):
        return None
    pairs = [
        (r[np.isin(steps, s.steps)], s.values[np.isin(s.steps, steps)])
        for r, s in zip(rewards, series, strict=True)
        if s
    ]
    reward, logps = (np.concatenate([pair[k] for pair in pairs]) for k in (0, 1))
    if not reward.size or not 0 < logps @ logps < np.inf:
        return None
    factor = float(reward @ logps / (logps @ logps))
    return factor if factor > 0 and np.allclose(reward, factor * logps, rtol=0.02, atol=1e-4) else None


def _start(log: Log) -> tuple[float, float] | None:
    """The first rewards, where they are of the start and as large as the later ones.

    Near the start, a policy that left its reference may have moved: there they have to be twice as large as all that
    came later, or (where no logps tell it) out of reach of the pace at which the first half of the entries went on.
    """
    for name in _has(log, ""):
        steps, *sides = _both(log, name)
        share = steps[0] / max(log.last_step, 1)
        if len(steps) < FEWEST or share > NEAR:
            continue
        first = [float(side[0]) for side in sides]
        if name == "train" and share <= EARLY:
            bounds = [0.5 * np.median(np.abs(side[1:])) for side in sides]
        else:
            bounds = [2 * abs(np.median(side[-(len(side) // 3) :]) - side[0]) for side in sides]
            if log.get(name, "logp_chosen") is None:  # of which they would be a multiple
                bounds = [min(b, REACH * _pace(steps, side)) for b, side in zip(bounds, sides, strict=True)]
        if all(abs(f) > max(bound, 0.02) for f, bound in zip(first, bounds, strict=True)):
            return first[0], first[1]
    return None


def _pace(steps: np.ndarray, side: np.ndarray) -> float:
    """How far a side would have come by the first entry, at the mean pace of the first half of the entries."""
    half = max(len(steps) // 2, 2)
    return abs(float(np.polyfit(steps[:half], side[:half], 1)[0])) * float(steps[0])


def _leaves_the_line(log: Log) -> bool:
    """Whether held-out logps go a smooth way and rewards are no multiple of their change."""
    if "held_out" not in _has(log, "") or ((logged := _logged_beta(log)) is not None and np.ptp(logged.values) > 0):
        return False
    found = [(x, y) for x, y in _held_out_sides(log) or () if len(x) > 3 and _is_smooth(x)]
    if not found:
        return False
    x, y = (np.concatenate([pair[i] - pair[i].mean() for pair in found]) for i in (0, 1))
    slope = float(x @ y / (x @ x))
    residual = float(np.sqrt(np.mean((y - slope * x) ** 2)))
    noise = max(_rounding(rewards) + abs(slope) * _rounding(logps) for logps, rewards in found)
    return residual > max(noise, 0.05 * float(np.sqrt(np.mean(y**2))))


def _is_smooth(course: np.ndarray) -> bool:
    """Whether evaluations go one way, as those of the same pairs do: beyond rounding, and with little noise."""
    noise = float(np.sqrt((np.diff(course, n=2) ** 2).mean() / 6))
    return noise < 0.2 * course.std() and course.std() > 3 * _rounding(course)


def _rounding(values: np.ndarray) -> float:
    """Half of the last decimal place of numbers as they were logged.

    >>> _rounding(np.array([-120.5, -121.0])), _rounding(np.array([-0.0122, 0.01]))
    (0.05, 5e-05)
    """
    places = next((p for p in range(9) if np.allclose(values, np.round(values, p), rtol=0, atol=1e-10)), 9)
    return 0.5 * 10.0**-places


def _per_token(log: Log, settings: RunSettings) -> str | None:
    """Why rewards are no nats of responses, but means over tokens; None where nothing says so.

    Logps that are seen to be sums outweigh the name of a loss (trainers differ in what they average), and not an option
    of the run that says how they are made.
    """
    if settings.averaged:
        return f"{settings.averaged} weighs the tokens of a response: directions are reported, and no nats of responses"
    logps = [s.values for n in ("held_out", "train") for side in SIDES if (s := log.get(n, f"logp_{side}")) is not None]
    if logps and np.isfinite(known := np.concatenate(logps)).any():
        if known[np.isfinite(known)].min() <= -SHORT:
            return None
        return (
            f"its logps are above -{SHORT:g}: means over tokens, or responses of a few tokens; directions are reported."
            " If they are sums over whole responses, say so with --rewards changes"
        )
    if averaging := set(settings.losses) & set(PER_TOKEN):
        return (
            f"{', '.join(sorted(averaging))} averages log-probabilities over tokens: directions are reported, and no "
            "nats of responses"
        )
    return None


def _beta(log: Log, settings: RunSettings, option: float | None) -> tuple[Series | None, str]:
    """Beta over the steps and where it is from. What several places tell must agree."""
    logged = _logged_beta(log)
    if logged is not None and np.ptp(logged.values) > BETA_ERROR * logged.values.max():
        if option is not None:
            first, last = logged.values[[0, -1]]
            raise ChesError(f"{log.source}: logs a beta that goes from {first:g} to {last:g}; leave out --beta")
        return logged, "the log"
    known = [(option, "--beta"), (recovered_beta(log), "slope of eval rewards against eval logps")]
    known += [(None if logged is None else float(logged.values[-1]), "the log"), (settings.beta, settings.beta_from)]
    betas = [(value, where) for value, where in known if value is not None]
    for value, where in betas[1:]:
        if abs(value - betas[0][0]) > BETA_ERROR * value:
            raise ChesError(
                f"{log.source}: beta is {betas[0][0]:g} ({betas[0][1]}) and {value:g} ({where}); which one made these "
                "rewards? Give it as --beta, and move away what says otherwise"
            )
    return (Series(np.zeros(1, int), np.array([betas[0][0]])), betas[0][1]) if betas else (None, "")


def _logged_beta(log: Log) -> Series | None:
    """Beta as the run logged it: online DPO, schedules of beta."""
    found = log.get("train", "beta") or log.get("held_out", "beta")
    return found if found is not None and np.isfinite(found.values).all() and (found.values > 0).all() else None


def recovered_beta(log: Log) -> float | None:
    r"""Beta as the slope of held-out rewards against held-out log-probabilities; None where the log cannot tell it.

    Held-out pairs are the same at every evaluation, so :math:`r = \beta (\ln\pi - \ln\pi_{ref})` is a line in
    :math:`\ln\pi`. It is taken where both sides fit one slope to ``BETA_ERROR`` (rounding of what was logged included).
    """
    found = _held_out_sides(log) if "held_out" in _has(log, "") else None
    if found is None:
        return None
    rounding = max(float(np.finfo(np.float32).eps * np.abs(logps).max()) for logps, _ in found)
    x, y = (np.concatenate([pair[i] - pair[i].mean() for pair in found]) for i in (0, 1))
    slope = _slope(x, y, rounding)
    return None if slope is None else _round(slope)


def _held_out_sides(log: Log) -> list[tuple[np.ndarray, np.ndarray]] | None:
    """Log-probabilities and rewards of each side at the evaluations that logged both; None where they did not."""
    steps, *rewards = _both(log, "held_out")
    found = []
    for side, reward in zip(SIDES, rewards, strict=True):
        series = log.get("held_out", f"logp_{side}")
        if series is None:
            return None
        common, i, j = np.intersect1d(steps, series.steps, return_indices=True)
        if len(common) < 2 or not np.isfinite([series.values[j], reward[i]]).all():
            return None
        found.append((series.values[j], reward[i]))
    return found


def _slope(x: np.ndarray, y: np.ndarray, rounding: float) -> float | None:
    spread = float(np.sqrt(x @ x))
    if not spread > 0:
        return None
    slope = float(x @ y) / spread**2
    residual = float(np.sqrt(((y - slope * x) ** 2).sum()))
    error = residual / spread + abs(slope) * rounding * np.sqrt(len(x)) / spread
    return slope if slope > 0 and error < BETA_ERROR * slope else None


def _round(value: float) -> float:
    """The nearest number of two digits where the value is within ``BETA_ERROR / 2`` of it."""
    short = float(f"{value:.1e}")
    return short if abs(short - value) <= BETA_ERROR / 2 * value else value


def _logps_in_words(log: Log) -> str:
    """What the log-probabilities themselves did, where they were logged."""
    for name, label in (("held_out", "held-out"), ("train", "training")):
        series: Sequence[Series | None] = [log.get(name, f"logp_{side}") for side in SIDES]
        words = [f"{side} {s.values[0]:.3g} to {s.values[-1]:.3g}" for side, s in zip(SIDES, series, strict=True) if s]
        if words:
            return f"Its {label} logps went: {', '.join(words)}, as logged. "
    return ""
