"""Claims that something never happens: swept at random, then attacked by an optimiser (``theory.toy.search``).

The value of a check is the worst violation (a negative number is the distance kept); the ends that were approached are
in the detail, since a bound that nothing comes near may be true and useless.
"""

import math
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from theory.claims.identities import errors_of, inverted
from theory.claims.registry import Context, Outcome, bound, statistical, sweep, swept, worst
from theory.statements import theorems
from theory.statements.coefficients import coefficients, pair_coefficient
from theory.toy import instances
from theory.toy.instances import Draw, noise
from theory.toy.search import SearchResult, ascend
from theory.toy.ufm import UFM, Responses, gram, residual

STARTS = 64
V = 5
REACHED = 0.02
"""How near a search has to come to a bound that cannot be improved."""


def outcome(seen: dict[str, Any], searched: dict[str, SearchResult], *, tight: bool = False, **figure: Any) -> Outcome:
    """Worst violation over all parts of a claim; each part's number is the violation seen there.

    Args:
      seen: violations of random instances, by part.
      searched: the worst that a search found, by part.
      tight: the claim says that its bounds cannot be improved: a search that ends short of one by more than
        ``REACHED`` counts as a violation by what is missing. (A quantity that is 0 throughout keeps every bound.)
      figure: what is drawn.
    """
    parts = {f"sweep {k}": worst(v) for k, v in seen.items()} | {f"search {k}": f.best for k, f in searched.items()}
    missing = [-found.best - REACHED for found in searched.values()] if tight else []
    value = max([*parts.values(), *missing])
    return Outcome(value=value, n=len(next(iter(seen.values()))), detail=parts, figure=figure)


def starts(ctx: Context, *shape: int, scale: float = 1.0) -> Array:
    """Random starting points of a search, [STARTS, *shape]."""
    numbers = noise((*ctx.key(), 99), STARTS)
    return scale * jnp.asarray(numbers.normal)[:, : math.prod(shape)].reshape(STARTS, *shape)


def coefficient(logits: Array, y: int | Array, z: int | Array) -> tuple[Array, Array]:
    """(alpha, 2 (1-pi(y))(1-pi'(y'))) between two rows of logits."""
    left, right = residual(logits[0], jnp.asarray(y)), residual(logits[1], jnp.asarray(z))
    return left @ right, 2 * left[y] * right[z]


def _wide_logits(draw: Draw, vocabulary: int) -> Array:
    return draw.normal((2, vocabulary)) * jnp.exp(draw.uniform((2, 1), -1.0, 3.0))


@lru_cache(maxsize=4)
def _coefficients(seed: int, count: int) -> dict[str, np.ndarray]:
    """Coefficients of random distributions with random tokens, half of them equal; shared by A1 to A3."""

    def check(draw, vocabulary):
        logits = _wide_logits(draw, vocabulary)
        tokens = instances.three_tokens(draw, vocabulary)[0]
        same = draw.uniform() < 0.5
        z = jnp.where(same, tokens[0], tokens[1])
        alpha, most = coefficient(logits, tokens[0], z)
        scalar = pair_coefficient(jax.nn.softmax(logits[0]), tokens[0], jax.nn.softmax(logits[1]), z)
        return {"alpha": alpha, "bound": most, "same": same, "error": jnp.abs(alpha - scalar)}

    return sweep(Context(seed=seed).key("coefficients"), count, check, [{"vocabulary": 4}, {"vocabulary": 30}])


def random_coefficients(ctx: Context) -> dict[str, np.ndarray]:
    """Coefficients of many random pairs of predictions, with their bounds."""
    return _coefficients(ctx.seed, 20 * ctx.instances)


@lru_cache(maxsize=4)
def _extremes(seed: int) -> dict[str, SearchResult]:
    """The ends of alpha for the same token and for different ones, by search."""

    def values(x):
        same, different = coefficient(x, 0, 0)[0], coefficient(x, 0, 1)[0]
        return {"same": same, "-same": -same, "different": different, "-different": -different}

    return ascend(values, starts(Context(seed=seed, id="coefficients"), 2, V))


def _shifted(result: SearchResult, by: float) -> SearchResult:
    return result._replace(best=result.best - by)


@bound("A1", "alpha and beta lie in [-2, 2]", "Theorem 6, Theorem 7")
def coefficient_range(ctx: Context) -> Outcome:
    ends = _extremes(ctx.seed)
    searched = {"alpha - 2": _shifted(ends["same"], 2), "-alpha - 2": _shifted(ends["-different"], 2)}
    drawn = random_coefficients(ctx)
    return outcome({"|alpha| - 2": np.abs(drawn["alpha"]) - 2, "scalar formula": drawn["error"]}, searched, tight=True)


@bound("A2", "|alpha| <= 2 (1 - pi(y)) (1 - pi'(y')), and nothing smaller would do", "derived")
def coefficient_bound(ctx: Context) -> Outcome:
    drawn = random_coefficients(ctx)

    def ratio(x):
        value, largest = coefficient(x, 0, 0)
        return {"ratio - 1": value / largest - 1}

    searched = ascend(ratio, starts(ctx, 2, V), rate=0.2)
    return outcome({"ratio - 1": np.abs(drawn["alpha"]) / drawn["bound"] - 1}, searched, tight=True)


@bound("A3", "the same token: alpha in [0, 2); different tokens: alpha in (-2, 1)", "derived")
def coefficient_signs(ctx: Context) -> Outcome:
    drawn = random_coefficients(ctx)
    alpha, same = drawn["alpha"], drawn["same"]
    ends = _extremes(ctx.seed)
    seen = {
        "same: -alpha": -alpha[same],
        "different: alpha - 1": alpha[~same] - 1,
        "different: -alpha - 2": -alpha[~same] - 2,
    }
    searched = {
        "same: -alpha": ends["-same"],
        "different: alpha - 1": _shifted(ends["different"], 1),
        "different: -alpha - 2": _shifted(ends["-different"], 2),
    }
    return outcome(seen, searched, tight=True)


@bound(
    "A4",
    "first position, different tokens: alpha^-_11 in [-1/2, 1), and alpha^+_11 - alpha^-_11 = 1 - pi+ + pi-",
    "derived",
)
def first_coefficient(ctx: Context) -> Outcome:
    def ends(row):
        minus = coefficient(jnp.stack([row, row]), 0, 1)[0]
        return {"-1/2 - alpha": -0.5 - minus, "alpha - 1": minus - 1}

    def check(draw, vocabulary):
        row = _wide_logits(draw, vocabulary)[0]
        plus, error = coefficient(jnp.stack([row, row]), 0, 0)[0], residual(row, jnp.asarray(0))
        violations = ends(row)
        difference = plus - (violations["alpha - 1"] + 1) - (error[0] - error[1])
        return violations | {"identity": jnp.abs(difference)}

    seen = sweep(ctx.key(), 20 * ctx.instances, check, [{"vocabulary": 3}, {"vocabulary": 30}])
    return outcome(seen, ascend(ends, starts(ctx, V)), tight=True)


@bound(
    "A5",
    "sum alpha^+ <h,h'> = |grad_W ln pi(y+)|^2 >= 0 whatever the signs of its terms; m of Theorem 6 >= 0",
    "derived; Theorem 6 for m",
)
def own_terms(ctx: Context) -> Outcome:
    seen = errors_of(ctx, "sequence")
    width, length = 2, 3

    def values(x):
        w, h = x[: V * width].reshape(V, width), x[V * width :].reshape(length, width)
        real = jnp.ones(length, bool)
        chosen, rejected = (theorems.Response(jnp.arange(length) + i, h, real) for i in range(2))
        terms = theorems.theorem_6(w, chosen, rejected, jnp.asarray(-1.0)).terms
        m = [terms["m_chosen_norm"], terms["m_rejected_norm"], terms["m_later_tokens"]]
        # the direction of a sum, not its size: otherwise the search would only shrink everything
        c = coefficients(w, chosen, chosen)
        products = c.alpha * c.similarity
        return {"-alpha_plus": -products.sum() / jnp.abs(products).sum(), "-m": -sum(m) / (w**2).sum()}

    searched = ascend(values, starts(ctx, V * width + length * width))
    result = outcome({"-alpha_plus": seen["A5 -alpha_plus"], "-m": seen["A5 -m"]}, searched)
    return Outcome(
        value=result.value,
        n=result.n,
        detail=result.detail | {"negative alphas": float(seen["A5 negative"].mean())},
    )


@bound(
    "A6",
    "Theorem 8's alpha: in (-2, 0) for a contradicting sample, (0, 2) for an agreeing one, (-1, 1) for any other",
    "Theorem 8; derived",
)
def sample_coefficients(ctx: Context) -> Outcome:
    def violations(w, h, tokens):
        yp, ym, other, another = tokens
        chosen, rejected = jnp.stack([yp, other, yp, other]), jnp.stack([ym, yp, other, another])
        a = theorems.sample_coefficients(w, jnp.stack([h, h, h, h]), chosen, rejected)[0]
        return {
            "contradicting: alpha": a[1],
            "contradicting: -2 - alpha": -2 - a[1],
            "agreeing: -alpha": -a[2],
            "agreeing: alpha - 2": a[2] - 2,
            "distinct": jnp.abs(a[3]) - 1,
        }

    def check(draw, vocabulary):
        first = instances.three_tokens(draw, vocabulary - 1)[0]
        tokens = jnp.concatenate([first, jnp.array([vocabulary - 1], jnp.int32)])
        return violations(draw.normal((vocabulary, 3)), 3 * draw.normal((3,)), tokens)

    seen = sweep(ctx.key(), 10 * ctx.instances, check, [{"vocabulary": 5}, {"vocabulary": 12}])
    # a free row of logits is W h with W = logits and h = 1
    searched = ascend(lambda x: violations(x[:, None], jnp.ones(1), jnp.arange(4)), starts(ctx, V))
    return outcome(seen, searched, tight=True)


def pair_gram(w: Array, h: Array) -> Array:
    """K of tokens 0 (preferred) and 1 on one prompt, [2, 2]."""
    one, context = jnp.ones((1, 1), bool), jnp.zeros((1, 1), jnp.int32)
    sides = [Responses(jnp.full((1, 1), t, jnp.int32), context, one) for t in (0, 1)]
    return gram(UFM(w, h[None, :]), *sides)


def _unpack(x: Array) -> tuple[Array, Array]:
    return x[:-1], x[-1]


def _pushed(k: Array) -> Array:
    """How clearly a pair is displaced: (K+- - K++) in units of K++ + |K+-|; positive iff it is."""
    return (k[0, 1] - k[0, 0]) / (k[0, 0] + jnp.abs(k[0, 1]))


def _displaced(x: Array) -> Array:
    """A constraint: the pair is displaced."""
    return _pushed(pair_gram(*_unpack(x))) - 1e-9


def _lead(w: Array) -> Array:
    """By how much y+ is ahead of every third token along W_+ - W_-; negative when one leads."""
    along = w @ (w[0] - w[1])
    return (along[0] - along[2:].max()) / jnp.abs(along).max()


def _size(w: Array, h: Array) -> Array:
    """|h|^2 / (diam(W) / 2)^2."""
    distances = ((w[:, None, :] - w[None, :, :]) ** 2).sum(-1)
    return 4 * (h @ h) / distances.max()


@lru_cache(maxsize=4)
def _displacements(seed: int, count: int) -> dict[str, np.ndarray]:
    """Random pairs of single tokens with small features, so that a good share is displaced; shared by D1, D1t, D2."""

    def check(draw, vocabulary, width):
        w = draw.normal((vocabulary, width))
        h = draw.normal((width,)) * jnp.exp(draw.uniform((), -3.0, 0.5))
        k = pair_gram(w, h)
        pi = jax.nn.softmax(w @ h)
        centred = w[:2] - (pi @ w)[None, :]
        norms = jnp.linalg.norm(centred, axis=1)
        return {
            "displaced": k[0, 1] > k[0, 0],
            "K++/K--": k[0, 0] / k[1, 1],
            "lead": _lead(w),
            "two tokens": _pushed(pair_gram(w[:2], h)),
            "size": _size(w, h),
            "cosine": (centred[0] @ centred[1]) / (norms[0] * norms[1]),
        }

    return sweep(Context(seed=seed).key("displacements"), count, check, [{"vocabulary": 4, "width": 3}])


def displacements(ctx: Context) -> dict[str, np.ndarray]:
    """What those pairs are like."""
    return _displacements(ctx.seed, 10 * ctx.instances)


@bound("D1", "one pair, equal incentives: displaced => |grad ln pi(y-)| > |grad ln pi(y+)|", "derived")
def displaced_needs_larger_rejected_gradient(ctx: Context) -> Outcome:
    seen = displacements(ctx)

    def ratio(x):
        k = pair_gram(*_unpack(x))
        return {"K++/K-- - 1": k[0, 0] / k[1, 1] - 1}

    searched = ascend(ratio, starts(ctx, V, 3, scale=0.7), slack=_displaced)
    result = outcome({"K++/K-- - 1": seen["K++/K--"][seen["displaced"]] - 1}, searched)
    detail = result.detail | {"share displaced": float(seen["displaced"].mean())}
    return Outcome(value=result.value, n=len(seen["displaced"]), detail=detail)


@bound(
    "D1t",
    "single tokens: displaced => some third token z has <W_z, D> > <W_+, D>; two tokens alone are never displaced",
    "derived",
)
def displaced_needs_a_third_token(ctx: Context) -> Outcome:
    seen = displacements(ctx)
    points = starts(ctx, V, 3, scale=0.7)
    searched = ascend(lambda x: {"no third token": _lead(x[:-1])}, points, slack=_displaced)
    searched |= ascend(lambda x: {"two tokens": _pushed(pair_gram(x[:2], x[-1]))}, points)
    return outcome(
        {"no third token": np.where(seen["displaced"], seen["lead"], -1.0), "two tokens": seen["two tokens"]}, searched
    )


@bound(
    "D1i",
    "one pair, any positive incentives: y+ never falls while y- rises",
    "derived (K is positive semidefinite)",
)
def never_inverted(ctx: Context) -> Outcome:
    def attack(x):
        up, down = jnp.exp(x[-1, 0]), jnp.exp(x[-1, 1])
        return {"both": inverted(pair_gram(*_unpack(x[:-1])), up, down)}

    return outcome({"both": errors_of(ctx, "sequence")["D1i"]}, ascend(attack, starts(ctx, V + 1, 3)))


@bound("D2", "plain flow, single tokens: displaced => |h| < diam(W) / 2", "derived")
def displaced_needs_small_features(ctx: Context) -> Outcome:
    seen = displacements(ctx)
    name = "|h|^2/(diam/2)^2 - 1"

    points = starts(ctx, V, 3, scale=0.7)
    searched = ascend(lambda x: {name: _size(*_unpack(x)) - 1}, points, slack=_displaced, steps=600)
    shown = slice(0, 2000)
    figure: dict[str, Any] = {k: seen[k][shown] for k in ("displaced", "size", "cosine")}
    return outcome({name: np.where(seen["displaced"], seen["size"] - 1, -1.0)}, searched, **figure)


@statistical(
    "D2p",
    "float32: 1 - pi as the sum of the other probabilities keeps its digits near pi(y+) = 1, the difference does not",
    "derived",
    1e-5,
)
@swept(
    {"vocabulary": 6, "width": 4},
    outcome_of=lambda seen: Outcome(
        value=worst(seen["stable"]),
        n=len(seen["stable"]),
        detail={"worst by subtraction": worst(seen["by subtraction"])},
    ),
)
def stable_residuals(draw: Draw, vocabulary: int, width: int) -> dict[str, Array]:
    w = draw.normal((vocabulary, width))
    # far into certainty, where 1 - pi(y+) is between 1e-4 and 1e-12
    logits = jnp.concatenate([jnp.atleast_1d(draw.uniform((), 10.0, 28.0)), draw.normal((vocabulary - 1,))])
    exact = residual(logits, jnp.asarray(0)) @ w
    low, narrow = residual(logits.astype(jnp.float32), jnp.asarray(0)), w.astype(jnp.float32)
    subtracted = jax.nn.one_hot(0, vocabulary, dtype=jnp.float32) - jax.nn.softmax(logits.astype(jnp.float32))
    size = jnp.abs(residual(logits, jnp.asarray(0))) @ jnp.abs(w)

    def error(e):
        return jnp.max(jnp.abs((e @ narrow).astype(exact.dtype) - exact) / size)

    return {"stable": error(low), "by subtraction": error(subtracted)}
