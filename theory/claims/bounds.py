"""Claims that something never happens: swept at random, then attacked by an optimiser (``theory.search``).

The value of a check is the worst violation (a negative number is the distance kept); the ends that were approached are
in the detail, since a bound that nothing comes near may be true and useless.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from theory import instances, theorems
from theory.claims.identities import SEQUENCE, stack
from theory.claims.registry import Context, Outcome, claim, sweep, worst
from theory.coefficients import coefficients
from theory.instances import Draw, noise
from theory.search import ascend
from theory.ufm import UFM, Pairs, Responses, kernel, residual

SLACK = 1e-12
STARTS = 64
V = 5


def outcome(swept: dict[str, Any], found: dict[str, float]) -> Outcome:
    """Worst violation over all parts of a claim; each part's number is the violation seen there."""
    parts = {f"sweep {k}": worst(v) for k, v in swept.items()} | {f"search {k}": v for k, v in found.items()}
    n = len(next(iter(swept.values()))) if swept else STARTS
    return Outcome(value=max(parts.values()), n=n, detail=parts)


def starts(ctx: Context, id: str, *shape: int, scale: float = 1.0) -> Array:
    """Random starting points of a search, [STARTS, *shape]."""
    size = 1
    for axis in shape:
        size *= axis
    numbers = noise((*ctx.key(id), 99), STARTS)
    return scale * jnp.asarray(numbers.normal)[:, :size].reshape(STARTS, *shape)


def free(value: Array) -> tuple[Array, Array]:
    """An objective without a constraint."""
    return value, jnp.zeros(())


def coefficient(logits: Array, y: int | Array, z: int | Array) -> tuple[Array, Array]:
    """(alpha, 2 (1-pi(y))(1-pi'(y'))) between two rows of logits."""
    left, right = residual(logits[0], jnp.asarray(y)), residual(logits[1], jnp.asarray(z))
    return left @ right, 2 * left[y] * right[z]


def _wide_logits(draw: Draw, vocabulary: int) -> Array:
    return draw.normal((2, vocabulary)) * jnp.exp(draw.uniform((2, 1), -1.0, 3.0))


def _coefficient_sweep(ctx: Context, id: str, parts) -> dict[str, Any]:
    """``parts(alpha, bound, same)`` on random distributions with random tokens, half of them equal."""

    def check(draw, vocabulary):
        logits = _wide_logits(draw, vocabulary)
        tokens = instances.three_tokens(draw, vocabulary)[0]
        same = draw.uniform() < 0.5
        z = jnp.where(same, tokens[0], tokens[1])
        alpha, bound = coefficient(logits, tokens[0], z)
        return parts(alpha, bound, same)

    return sweep(ctx.key(id), 20 * ctx.instances, check, [{"vocabulary": 4}, {"vocabulary": 30}])


@claim("A1", "alpha and beta lie in [-2, 2]", source="Theorem 6, Theorem 7", status="bound", tolerance=SLACK)
def coefficient_range(ctx: Context) -> Outcome:
    swept = _coefficient_sweep(ctx, "A1", lambda a, b, same: {"|alpha| - 2": jnp.abs(a) - 2})
    logits = starts(ctx, "A1", 2, V)
    found = {
        "alpha - 2": ascend(lambda x: free(coefficient(x, 0, 0)[0]), logits).best - 2,
        "-alpha - 2": ascend(lambda x: free(-coefficient(x, 0, 1)[0]), logits).best - 2,
    }
    return outcome(swept, found)


@claim(
    "A2",
    "|alpha| <= 2 (1 - pi(y)) (1 - pi'(y')), and nothing smaller would do",
    source="derived",
    status="bound",
    tolerance=SLACK,
)
def coefficient_bound(ctx: Context) -> Outcome:
    swept = _coefficient_sweep(ctx, "A2", lambda a, b, same: {"ratio - 1": jnp.abs(a) / b - 1})
    logits = starts(ctx, "A2", 2, V)

    def ratio(x):
        alpha, bound = coefficient(x, 0, 0)
        return free(alpha / bound)

    return outcome(swept, {"ratio - 1": ascend(ratio, logits, rate=0.2).best - 1})


@claim(
    "A3",
    "the same token: alpha in [0, 2); different tokens: alpha in (-2, 1)",
    source="derived",
    status="bound",
    tolerance=SLACK,
)
def coefficient_signs(ctx: Context) -> Outcome:
    swept = _coefficient_sweep(
        ctx,
        "A3",
        lambda a, b, same: {
            "same: -alpha": jnp.where(same, -a, -1.0),
            "different: alpha - 1": jnp.where(same, -1.0, a - 1),
            "different: -alpha - 2": jnp.where(same, -1.0, -a - 2),
        },
    )
    logits = starts(ctx, "A3", 2, V)
    found = {
        "same: -alpha": ascend(lambda x: free(-coefficient(x, 0, 0)[0]), logits).best,
        "different: alpha - 1": ascend(lambda x: free(coefficient(x, 0, 1)[0]), logits).best - 1,
        "different: -alpha - 2": ascend(lambda x: free(-coefficient(x, 0, 1)[0]), logits).best - 2,
    }
    return outcome(swept, found)


@claim(
    "A4",
    "first position, different tokens: alpha^-_11 in [-1/2, 1), and alpha^+_11 - alpha^-_11 = 1 - pi+ + pi-",
    source="derived",
    status="bound",
    tolerance=SLACK,
)
def first_coefficient(ctx: Context) -> Outcome:
    def of(row):
        logits = jnp.stack([row, row])
        return coefficient(logits, 0, 1)[0], coefficient(logits, 0, 0)[0]

    def check(draw, vocabulary):
        row = _wide_logits(draw, vocabulary)[0]
        minus, plus = of(row)
        error = residual(row, jnp.asarray(0))
        difference = plus - minus - (error[0] - error[1])
        return {"-1/2 - alpha": -0.5 - minus, "alpha - 1": minus - 1, "identity": jnp.abs(difference)}

    swept = sweep(ctx.key("A4"), 20 * ctx.instances, check, [{"vocabulary": 3}, {"vocabulary": 30}])
    rows = starts(ctx, "A4", V)
    found = {
        "-1/2 - alpha": ascend(lambda x: free(-0.5 - of(x)[0]), rows).best,
        "alpha - 1": ascend(lambda x: free(of(x)[0] - 1), rows).best,
    }
    return outcome(swept, found)


@claim(
    "A5",
    "sum alpha^+ <h,h'> = |grad_W ln pi(y+)|^2 >= 0 whatever the signs of its terms; m of Theorem 6 >= 0",
    source="derived; Theorem 6 for m",
    status="bound",
    tolerance=SLACK,
)
def own_terms(ctx: Context) -> Outcome:
    def check(draw, **size):
        i = instances.random_pair(draw, **size)
        chosen, rejected = (theorems.response_of(i.model, r) for r in i.pairs)
        terms = theorems.theorem_6(i.model.unembedding, chosen, rejected, jnp.asarray(-1.0)).terms
        m = terms["m_chosen_norm"] + terms["m_rejected_norm"] + terms["m_later_tokens"]
        c = coefficients(i.model.unembedding, chosen, chosen)
        negative = (c.real & (c.alpha < 0)).sum() / c.real.sum()
        return {"-alpha_plus": -terms["alpha_plus"], "-m": -m, "negative share": negative}

    swept = sweep(ctx.key("A5"), ctx.instances, check, SEQUENCE)
    negative = swept.pop("negative share")
    width, length = 2, 3

    def attack(x):
        w, h = x[: V * width].reshape(V, width), x[V * width :].reshape(length, width)
        # the direction of the sum, not its size: otherwise the search would only shrink everything
        response = theorems.Response(jnp.arange(length), h, jnp.ones(length, bool))
        c = coefficients(w, response, response)
        products = c.alpha * c.similarity
        return free(-products.sum() / jnp.abs(products).sum())

    found = {"-alpha_plus": ascend(attack, starts(ctx, "A5", V * width + length * width)).best}
    result = outcome(swept, found)
    return Outcome(value=result.value, n=result.n, detail=result.detail | {"negative alphas": float(negative.mean())})


@claim(
    "A6",
    "Theorem 8's alpha: in (-2, 0) for a contradicting sample, (0, 2) for an agreeing one, (-1, 1) for any other",
    source="Theorem 8; derived",
    status="bound",
    tolerance=SLACK,
)
def sample_coefficients(ctx: Context) -> Outcome:
    def violations(w, h, tokens):
        yp, ym, other, another = tokens[0], tokens[1], tokens[2], tokens[3]
        chosen, rejected = jnp.stack([yp, other, yp, other]), jnp.stack([ym, yp, other, another])
        h = jnp.stack([h, h, h, h])
        a = theorems.sample_coefficients(w, h, chosen, rejected)[0]
        return {
            "contradicting": jnp.maximum(a[1], -2 - a[1]),
            "agreeing": jnp.maximum(-a[2], a[2] - 2),
            "distinct": jnp.abs(a[3]) - 1,
        }

    def check(draw, vocabulary):
        first = instances.three_tokens(draw, vocabulary - 1)[0]
        tokens = jnp.concatenate([first, jnp.array([vocabulary - 1], jnp.int32)])
        return violations(draw.normal((vocabulary, 3)), 3 * draw.normal((3,)), tokens)

    swept = sweep(ctx.key("A6"), 10 * ctx.instances, check, [{"vocabulary": 5}, {"vocabulary": 12}])
    tokens = jnp.arange(4)

    def attack(part):
        # a free row of logits is W h with W = logits and h = 1
        return lambda x: free(violations(x[:, None], jnp.ones(1), tokens)[part])

    found = {part: ascend(attack(part), starts(ctx, "A6", V)).best for part in swept}
    return outcome(swept, found)


def token_pair(w: Array, h: Array) -> tuple[UFM, Pairs]:
    """Tokens 0 (preferred) and 1 on one prompt."""
    model, one = UFM(w, h[None, :]), jnp.ones((1, 1), bool)
    pairs = [Responses(jnp.full((1, 1), t, jnp.int32), jnp.zeros((1, 1), jnp.int32), one) for t in (0, 1)]
    return model, Pairs(*pairs)


def gram(w: Array, h: Array) -> Array:
    """K of a pair of single tokens, [2, 2]."""
    model, pairs = token_pair(w, h)
    both = stack(*pairs)
    return kernel(model, both, both).total


def _displacement_draw(draw: Draw, vocabulary: int, width: int) -> tuple[Array, Array]:
    """W and a small h, so that a good share is displaced."""
    w = draw.normal((vocabulary, width))
    return w, draw.normal((width,)) * jnp.exp(draw.uniform((), -3.0, 0.5))


def _unpack(x: Array) -> tuple[Array, Array]:
    return x[:-1], x[-1]


def _pushed(k: Array) -> Array:
    """How clearly a pair is displaced: (K+- - K++) in units of K++ + |K+-|; positive iff it is."""
    return (k[0, 1] - k[0, 0]) / (k[0, 0] + jnp.abs(k[0, 1]))


@claim(
    "D1",
    "one pair, equal incentives: displaced => |grad ln pi(y-)| > |grad ln pi(y+)|",
    source="derived",
    status="bound",
    tolerance=SLACK,
)
def displaced_needs_larger_rejected_gradient(ctx: Context) -> Outcome:
    def check(draw, **size):
        k = gram(*_displacement_draw(draw, **size))
        return {
            "K++/K-- - 1": jnp.where(k[0, 1] > k[0, 0], k[0, 0] / k[1, 1] - 1, -1.0),
            "displaced": k[0, 1] > k[0, 0],
        }

    swept = sweep(ctx.key("D1"), 10 * ctx.instances, check, [{"vocabulary": 4, "width": 3}])
    displaced = float(swept.pop("displaced").mean())

    def attack(x):
        k = gram(*_unpack(x))
        return k[0, 0] / k[1, 1] - 1, _pushed(k) - 1e-9

    result = outcome(swept, {"K++/K-- - 1": ascend(attack, starts(ctx, "D1", V, 3, scale=0.7)).best})
    return Outcome(value=result.value, n=result.n, detail=result.detail | {"share displaced": displaced})


@claim(
    "D1t",
    "single tokens: displaced => some third token z has <W_z, D> > <W_+, D>; two tokens alone are never displaced",
    source="derived",
    status="bound",
    tolerance=SLACK,
)
def displaced_needs_a_third_token(ctx: Context) -> Outcome:
    def excess(w, h):
        """(K+- - K++ for two tokens; the third tokens' best lead, negative when a violation)."""
        k = gram(w, h)
        along = w @ (w[0] - w[1])
        lead = (along[2:].max() - along[0]) / jnp.abs(along).max()
        return jnp.where(k[0, 1] > k[0, 0], -lead, -1.0), _pushed(gram(w[:2], h))

    def check(draw, **size):
        lead, two = excess(*_displacement_draw(draw, **size))
        return {"no third token": lead, "two tokens": two}

    swept = sweep(ctx.key("D1t"), 10 * ctx.instances, check, [{"vocabulary": 4, "width": 3}])

    def lead(x):
        w, h = _unpack(x)
        along = w @ (w[0] - w[1])
        return (along[0] - along[2:].max()) / jnp.abs(along).max(), _pushed(gram(w, h)) - 1e-9

    points = starts(ctx, "D1t", V, 3, scale=0.7)
    found = {
        "no third token": ascend(lead, points).best,
        "two tokens": ascend(lambda x: free(_pushed(gram(x[:2], x[-1]))), points).best,
    }
    return outcome(swept, found)


@claim(
    "D1i",
    "one pair, any positive incentives: y+ never falls while y- rises",
    source="derived (K is positive semidefinite)",
    status="bound",
    tolerance=SLACK,
)
def never_inverted(ctx: Context) -> Outcome:
    def inverted(k, up, down):
        chosen, rejected = up * k[0, 0] - down * k[0, 1], up * k[0, 1] - down * k[1, 1]
        scale = jnp.maximum(up, down) * jnp.abs(k).max()
        return jnp.minimum(-chosen, rejected) / scale

    def check(draw, **size):
        incentives = jnp.exp(draw.uniform((2,), -3.0, 3.0))
        i = instances.random_pair(draw, **size)
        both = stack(*i.pairs)
        return {"both": inverted(kernel(i.model, both, both).total, incentives[0], incentives[1])}

    swept = sweep(ctx.key("D1i"), ctx.instances, check, SEQUENCE)

    def attack(x):
        up, down = jnp.exp(x[-1, 0]), jnp.exp(x[-1, 1])
        return free(inverted(gram(*_unpack(x[:-1])), up, down))

    return outcome(swept, {"both": ascend(attack, starts(ctx, "D1i", V + 1, 3)).best})


@claim(
    "D2",
    "plain flow, single tokens: displaced => |h| < diam(W) / 2",
    source="derived",
    status="bound",
    tolerance=SLACK,
)
def displaced_needs_small_features(ctx: Context) -> Outcome:
    def ratio(w, h):
        distances = ((w[:, None, :] - w[None, :, :]) ** 2).sum(-1)
        return 4 * (h @ h) / distances.max()

    def check(draw, **size):
        w, h = _displacement_draw(draw, **size)
        k = gram(w, h)
        return {"|h|^2/(diam/2)^2 - 1": jnp.where(k[0, 1] > k[0, 0], ratio(w, h) - 1, -1.0)}

    swept = sweep(ctx.key("D2"), 10 * ctx.instances, check, [{"vocabulary": 4, "width": 3}])

    def attack(x):
        w, h = _unpack(x)
        return ratio(w, h) - 1, _pushed(gram(w, h)) - 1e-9

    found = {"|h|^2/(diam/2)^2 - 1": ascend(attack, starts(ctx, "D2", V, 3, scale=0.7), steps=600).best}
    return outcome(swept, found)


@claim(
    "D2p",
    "1 - pi by subtraction loses the sign of the rate near pi(y+) = 1; sums of the other probabilities keep it",
    source="derived (float32)",
    status="bound",
    tolerance=1e-5,
)
def stable_residuals(ctx: Context) -> Outcome:
    def check(draw, vocabulary, width):
        w = draw.normal((vocabulary, width))
        # far into certainty, where 1 - pi(y+) is between 1e-4 and 1e-12
        logits = jnp.concatenate([jnp.atleast_1d(draw.uniform((), 10.0, 28.0)), draw.normal((vocabulary - 1,))])
        exact = residual(logits, jnp.asarray(0)) @ w
        low, narrow = residual(logits.astype(jnp.float32), jnp.asarray(0)), w.astype(jnp.float32)
        pi = jnp.where(jnp.arange(vocabulary) == 0, 1.0, 0.0).astype(jnp.float32) - jax.nn.softmax(
            logits.astype(jnp.float32)
        )
        size = jnp.abs(residual(logits, jnp.asarray(0))) @ jnp.abs(w)

        def error(e):
            return jnp.max(jnp.abs((e @ narrow).astype(exact.dtype) - exact) / size)

        return {"stable": error(low), "by subtraction": error(pi)}

    swept = sweep(ctx.key("D2p"), ctx.instances, check, [{"vocabulary": 6, "width": 4}])
    return Outcome(
        value=worst(swept["stable"]),
        n=len(swept["stable"]),
        detail={"worst by subtraction": worst(swept["by subtraction"])},
    )
