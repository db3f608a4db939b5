"""Figures of what the claims saw: each takes one claim's data and gives pictures, with words for those who cannot see.

A figure is made from results alone (``figures.json``); nothing is computed again.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from theory.drawing import BLUE, INK, ORANGE, PALETTE, drawable, panels, vector

Data = dict[str, Any]
SCORE_AXIS = "Spearman's correlation with the fall of ln pi(y+)"


class Picture(NamedTuple):
    """A figure."""

    name: str
    svg: bytes
    alt: str
    caption: str


def numbers(values: Any) -> np.ndarray:
    """Numbers as JSON keeps them (infinities as text)."""
    return np.asarray(values, dtype=np.float64)


def _title(run: Data) -> str:
    return f"{run['chosen']} > {run['rejected']}, s = {run['scale']:g}: {run['verdict']}"


def regimes(data: Data) -> Iterator[Picture]:
    """The named constructions: log-probabilities, masses, terms of Theorem 4, tokens of Theorem 5, the band."""
    runs = list(data.values())
    words = "; ".join(_title(run) for run in runs)

    figure, every = panels(2, 3)
    for axes, run in zip(every, runs, strict=False):
        t, lp = numbers(run["times"]), numbers(run["log_probs"])
        change = lp - lp[:1]
        axes.plot(t, change[:, 0], color=BLUE, label="ln pi(y+)")
        axes.plot(t, change[:, 1], color=ORANGE, linestyle="--", label="ln pi(y-)")
        axes.plot(t, change[:, 0] - change[:, 1], color=INK, linestyle=":", label="margin")
        short = t[t <= t[-1] / 10]
        axes.plot(short, run["rate"] * short, color=PALETTE[2], linewidth=2.5, alpha=0.7, label="rate at t = 0")
        low, high = float(change[:, 0].min()), float((change[:, 0] - change[:, 1]).max())
        axes.set_ylim(1.1 * min(low, -0.05 * high), 1.1 * high)
        axes.set_title(_title(run), fontsize=9)
        axes.set(xlabel="time", ylabel="change, nats")
    _legend_in(every, len(runs))
    yield Picture(
        "toy_log_probabilities",
        vector(figure),
        f"Changes over time under gradient flow: {words}.",
        "1. Log-probabilities and margin under gradient flow of DPO, with the rate that Theorem 4 gives",
    )

    figure, every = panels(2, 3)
    for axes, run in zip(every, runs, strict=False):
        labels = {"chosen": BLUE, "same": PALETTE[6], "opposite": ORANGE, "other": "#bbbbbb"}
        parts = [numbers(run["masses"][name]) for name in labels]
        axes.stackplot(numbers(run["times"]), *parts, labels=list(labels), colors=list(labels.values()))
        axes.set_title(_title(run), fontsize=9)
        axes.set(xlabel="time", ylabel="probability", ylim=(0, 1))
        _early(axes)
    _legend_in(every, len(runs))
    yield Picture(
        "toy_masses",
        vector(figure),
        f"Probability of each group of tokens over time: {words}.",
        "2. Where the probability goes: y+, tokens of the same meaning, of the opposite one, others",
    )

    figure, every = panels(2, 3)
    for axes, run in zip(every, runs, strict=False):
        terms = run["terms"]
        values = numbers(list(terms.values()))
        ends = np.cumsum(values)
        bars = [*zip(ends - values, values, strict=True), (0.0, ends[-1])]
        colours = [BLUE if v >= 0 else ORANGE for v in values]
        for i, ((start, height), colour) in enumerate(zip(bars, [*colours, INK], strict=True)):
            axes.bar(i, height, bottom=start, color=colour)
        axes.axhline(0, color=INK, linewidth=0.8)
        axes.use_sticky_edges = False
        axes.margins(y=0.06)
        names = [name.replace("m_", "m: ").replace("S_", "S: ").replace("_", " ") for name in terms]
        axes.set_xticks(range(len(bars)), [*names, "rate"], rotation=60, ha="right", fontsize=7)
        axes.set_title(_title(run), fontsize=9)
        axes.set(ylabel="nats per time")
    _blank_after(every, len(runs))
    yield Picture(
        "toy_terms",
        vector(figure),
        "Terms of Theorem 4 at the start, added up to the rate of ln pi(y+).",
        "4. Theorem 4 at the start, term by term; blue lifts y+, orange lowers it, black is the rate",
    )

    figure, every = panels(2, 3)
    for axes, run in zip(every, runs, strict=False):
        x, y = numbers(run["direction"]), numbers(run["gains"])
        own = [run["tokens"].index(run[side]) for side in ("chosen", "rejected")]
        other = np.setdiff1d(np.arange(len(x)), own)
        axes.scatter(x[other], y[other], s=14, color=BLUE, label="other tokens")
        axes.scatter(x[own], y[own], s=22, color=ORANGE, marker="s", label="the pair")
        top = other[np.argmax(x[other])]
        axes.annotate(
            run["tokens"][top], (x[top], y[top]), textcoords="offset points", xytext=(-4, -11), fontsize=8, ha="right"
        )
        axes.margins(0.12)
        axes.set_title(_title(run), fontsize=9)
        axes.set(xlabel="<W_z, W_+ - W_->", ylabel="change of ln pi(z), nats")
    _legend_in(every, len(runs))
    yield Picture(
        "toy_tokens",
        vector(figure),
        "Gain of every token over the run against its product with W_+ - W_-.",
        "9. Which tokens gain: Theorem 5's direction at the start against the change at the end",
    )

    figure, every = panels(2, 3)
    for axes, run in zip(every, runs, strict=False):
        t = numbers(run["times"])
        low, high = (np.log(np.maximum(numbers(end), 1e-300)) for end in run["band"])
        low, high = (np.clip(v, -4, 4) for v in (low, high))
        axes.fill_between(t, low, high, color=PALETTE[6], alpha=0.5, label="band")
        axes.axhline(0, color=INK, label="DPO: d+ / d- = 1")
        axes.set_title(_title(run), fontsize=9)
        axes.set(xlabel="time", ylabel="ln(d+ / d-)", ylim=(-4, 4))
        _early(axes)
    _legend_in(every, len(runs))
    yield Picture(
        "toy_band",
        vector(figure),
        "The disentanglement band over training, and the ratio of incentives of DPO.",
        "8. The disentanglement band along the flow (cut at +-4): y+ rises while the line is above its lower end, "
        "y- falls while it is below its upper end",
    )


def _early(axes: Any) -> None:
    """An axis of time that shows the beginning: logarithmic, from 0.01 to the end."""
    axes.set_xscale("log")
    axes.set_xlim(0.01, axes.dataLim.x1)
    axes.set_xticks([0.01, 0.1, 1, 10], ["0.01", "0.1", "1", "10"])


def _blank_after(every: list[Any], used: int) -> None:
    for axes in every[used:]:
        axes.set_axis_off()


def _legend_in(every: list[Any], used: int) -> None:
    """The legend of the first plot in the first unused place."""
    _blank_after(every, used)
    place = every[used] if used < len(every) else every[0]
    place.legend(
        *every[0].get_legend_handles_labels(), loc="center" if used < len(every) else "best", frameon=False, fontsize=9
    )


def optimisers(data: Data) -> Iterator[Picture]:
    """One construction under several optimisers."""
    figure, every = panels(1, len(data), (2.6, 2.6), sharey=True)
    for axes, (name, values) in zip(every, data.items(), strict=True):
        change = numbers(values) - numbers(values)[:1]
        axes.plot(change[:, 0], color=BLUE, label="ln pi(y+)")
        axes.plot(change[:, 1], color=ORANGE, linestyle="--", label="ln pi(y-)")
        axes.plot(change[:, 0] - change[:, 1], color=INK, linestyle=":", label="margin")
        axes.set_title(name, fontsize=9)
        axes.set(xlabel="step")
    every[0].set_ylabel("change, nats")
    every[0].legend(frameon=False, fontsize=8)
    yield Picture(
        "toy_optimisers",
        vector(figure),
        "Log-probabilities of the pair No > Never under four optimisers.",
        "1b. The same pair (No > Never, s = 12) under discrete optimisers",
    )


def phases(data: Data) -> Iterator[Picture]:
    """Where pairs are displaced."""
    x, y, displaced = np.sqrt(numbers(data["size"])), numbers(data["cosine"]), np.asarray(data["displaced"], bool)
    figure, (axes,) = panels(1, 1, (5.2, 3.6))
    axes.scatter(x[~displaced], y[~displaced], s=8, color="#b5b5b5", label="y+ rises", linewidths=0)
    axes.scatter(x[displaced], y[displaced], s=16, color=ORANGE, marker="^", label="y+ falls", linewidths=0)
    axes.axvline(1, color=INK, linestyle="--", linewidth=1, label="|h| = diam(W) / 2")
    axes.set(xscale="log", xlabel="|h| / (diam(W) / 2)", ylabel="cosine of centred W_+ and W_-")
    axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    yield Picture(
        "toy_phases",
        vector(figure),
        f"{int(displaced.sum())} of {len(x)} random pairs are displaced, all left of the line.",
        "3. Random pairs of single tokens: none is displaced right of the line (claim D2)",
    )


def descent(data: Data) -> Iterator[Picture]:
    """Error of gradient descent against the flow."""
    yield _errors(
        "toy_descent",
        data["steps"],
        {"gradient descent against the flow": data["errors"]},
        "step size",
        "G1. Gradient descent follows the flow with an error of first order (median)",
    )


def taylor(data: Data) -> Iterator[Picture]:
    """Error of one predicted step."""
    lines = {"first order": data["first"], "second order": data["second"]}
    yield _errors("toy_taylor", data["steps"], lines, "step size", "11. What a predicted step leaves out (median)")


def _errors(name: str, x: Any, lines: dict[str, Any], xlabel: str, caption: str) -> Picture:
    figure, (axes,) = panels(1, 1, (4.6, 3.2))
    for (label, y), colour, marker in zip(lines.items(), PALETTE, "os^v", strict=False):
        axes.loglog(numbers(x), numbers(y), color=colour, marker=marker, markersize=4, label=label)
    axes.set(xlabel=xlabel, ylabel="error of ln pi(y+), nats")
    axes.legend(frameon=False, fontsize=8)
    return Picture(name, vector(figure), f"{caption}: {', '.join(lines)}.", caption)


def one_step(data: Data) -> Iterator[Picture]:
    """Predicted against measured change on the model."""
    figure, every = panels(1, len(data), (3.6, 3.2))
    for axes, (name, run) in zip(every, data.items(), strict=True):
        x, y = 1e3 * numbers(run["predicted"]), 1e3 * numbers(run["measured"])
        ends = [min(x.min(), y.min()), max(x.max(), y.max())]
        axes.plot(ends, ends, color="#999999", linewidth=1, label="slope 1")
        axes.scatter(x, y, s=14, color=BLUE, linewidths=0, label="pairs")
        axes.set_title(f"{name} step", fontsize=9)
        axes.set(xlabel="predicted change, millinats", ylabel="measured change, millinats")
        axes.legend(frameon=False, fontsize=8)
    yield Picture(
        "model_one_step",
        vector(figure),
        "Predicted against measured change of ln pi(y+) after one step, each pair a point.",
        "6a. One step on the whole batch: predicted and measured",
    )
    sizes = next(iter(data.values()))["sizes"]
    yield _errors(
        "model_taylor",
        sizes,
        {f"{name} step": run["wrong"] for name, run in data.items()},
        "largest predicted change, nats",
        "11b. Error of the first-order prediction on the model (median pair)",
    )


def forest(table: Data, name: str, caption: str) -> Picture:
    """Correlations with their intervals, the strongest first."""
    rows = sorted(table.items(), key=lambda item: item[1]["rho"])
    figure, (axes,) = panels(1, 1, (5.6, 0.9 + 0.24 * len(rows)))
    for i, (score, seen) in enumerate(rows):
        special = score in ("head_score", "ches")
        axes.plot([seen["low"], seen["high"]], [i, i], color=ORANGE if special else BLUE, linewidth=2)
        axes.plot(seen["rho"], i, "o", color=ORANGE if special else BLUE, markersize=5)
    axes.axvline(0, color=INK, linewidth=0.8)
    axes.set_yticks(range(len(rows)), [score for score, _ in rows], fontsize=8)
    axes.set(xlabel=SCORE_AXIS + ", 95% interval", xlim=(-1.03, 1.03))
    values_in_words = ", ".join(f"{score} {seen['rho']:.2f}" for score, seen in reversed(rows))
    return Picture(name, vector(figure), f"{caption}: {values_in_words}.", caption)


def against_rates(data: Data) -> Iterator[Picture]:
    """Scores and the true rate."""
    yield forest(data["spearman"], "model_spearman_rate", "Scores against the true own-pair rate (claim F2)")
    points = {name: numbers(values) for name, values in data["points"].items()}
    own = points.pop("own rate")
    figure, every = panels(1, len(points), (2.7, 2.6))
    for axes, (name, values) in zip(every, points.items(), strict=True):
        axes.scatter(values, own, s=12, color=BLUE, linewidths=0)
        axes.set_title(f"{name} ({data['spearman'][name]['rho']:+.2f})", fontsize=9)
        axes.set(xlabel=name)
        axes.ticklabel_format(axis="both", style="sci", scilimits=(-2, 3))
        axes.locator_params(axis="x", nbins=4)
    every[0].set_ylabel("own-pair rate, nats per time")
    yield Picture(
        "model_scatter",
        vector(figure),
        "Each pair's true rate against its scores.",
        "6b. The true own-pair rate of ln pi(y+) against other predictions; in brackets Spearman's correlation with "
        "its fall",
    )


def against_training(data: Data) -> Iterator[Picture]:
    """Scores and what a few steps of training did."""
    yield forest(
        data["spearman"], "model_spearman_training", "Scores against 5 steps of RMSProp, each pair alone (claim F3)"
    )
    change = numbers(data["change"])
    figure, every = panels(2, 3, (2.7, 2.4), sharey=True)
    for axes, (name, values) in zip(every, data["scores"].items(), strict=False):
        fifths = np.array_split(np.argsort(numbers(values), kind="stable"), 5)
        means = [change[rows].mean() for rows in fifths]
        errors = [change[rows].std(ddof=1) / len(rows) ** 0.5 if len(rows) > 1 else 0.0 for rows in fifths]
        axes.bar(range(5), means, yerr=errors, color=BLUE, ecolor=INK, capsize=2)
        axes.axhline(0, color=INK, linewidth=0.8)
        axes.set_xticks(range(5), ["0-20", "20-40", "40-60", "60-80", "80-100"], fontsize=7)
        axes.set_title(name, fontsize=9)
        axes.set(xlabel="percentile of the score")
    for axes in every[::3]:
        axes.set_ylabel("mean change of ln pi(y+), nats")
    yield Picture(
        "model_percentiles",
        vector(figure),
        "Mean change of ln pi(y+) in each fifth of the pairs, by score.",
        "7. Fifths of the pairs by score, and what training did to y+ (bars: one standard error)",
    )


def coefficients(data: Data) -> Iterator[Picture]:
    """The coefficients between the tokens of one pair."""
    alpha = numbers(data["alpha"])
    figure, (axes,) = panels(1, 1, (1.8 + 0.36 * alpha.shape[1], 1.4 + 0.3 * alpha.shape[0]))
    drawn = axes.imshow(alpha, cmap="PuOr", vmin=-2, vmax=2, aspect="auto")
    words = [[drawable(w).strip() or "(space)" for w in data[side]] for side in ("chosen", "rejected")]
    axes.set_yticks(range(len(words[0])), words[0], fontsize=8, parse_math=False)
    axes.set_xticks(range(len(words[1])), words[1], fontsize=8, rotation=60, ha="right", parse_math=False)
    axes.set(ylabel="token of y+", xlabel="token of y-")
    figure.colorbar(drawn, ax=axes, label="alpha")
    yield Picture(
        "model_alpha",
        vector(figure),
        f"Coefficients between {len(words[0])} and {len(words[1])} tokens, {alpha.min():.2f} to {alpha.max():.2f}.",
        "5. The coefficients alpha^- of Theorem 6 for one pair; CHES puts 1 everywhere",
    )


def gaining_tokens(data: Data) -> Iterator[Picture]:
    """The tokens that Theorem 5 puts first, and how fast they rise."""
    words = [drawable(w).strip() or "(space)" for w in data["words"]]
    figure, (axes, other) = panels(1, 2, (3.2, 3.6), sharey=True)
    at = range(len(words))
    axes.barh(at, numbers(data["along"]), color=BLUE)
    other.barh(at, numbers(data["gains"]), color=ORANGE)
    other.axvline(data["median gain"], color=INK, linestyle="--", linewidth=1, label="median token")
    axes.set_yticks(at, words, fontsize=8, parse_math=False)
    axes.invert_yaxis()
    axes.set(xlabel="<W_z, W_+ - W_->")
    other.set(xlabel="d/dt ln pi(z), nats per time")
    other.legend(frameon=False, fontsize=8)
    pair = " > ".join(repr(drawable(w)) for w in data["pair"])
    yield Picture(
        "model_tokens",
        vector(figure),
        "The 15 tokens that Theorem 5 ranks first, with their true rates.",
        f"9b. First tokens by <W_z, W_+ - W_-> where one pair begins to differ ({pair}), and their true rates",
    )


def shares(data: Data) -> Iterator[Picture]:
    """Shares of the kernel by module and layer."""
    parts = {name: numbers(values) for name, values in data["by layer"].items()}
    layers = max(len(values) for values in parts.values())
    names = ["embed", *(f"layer {i}" for i in range(layers)), "final norm", "head"]
    figure, (axes,) = panels(1, 1, (1.6 + 0.55 * len(names), 3.4))
    bottom = np.zeros(len(names))
    for (name, values), colour in zip(parts.items(), PALETTE, strict=False):
        heights = np.zeros(len(names))
        if len(values) == layers and name not in names:
            heights[1 : 1 + layers] = values
        else:
            heights[names.index(name)] = values.sum()
        axes.bar(range(len(names)), heights, bottom=bottom, color=colour, label=name)
        bottom += heights
    axes.set_xticks(range(len(names)), names, rotation=45, ha="right", fontsize=8)
    axes.set(ylabel="share of |grad ln pi(y+)|^2")
    axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    values_in_words = ", ".join(f"{name} {values.sum():.2f}" for name, values in parts.items())
    yield Picture(
        "model_shares",
        vector(figure),
        f"Share of each module: {values_in_words}.",
        "10. Where the gradient of ln pi(y+) lies: mean share of K++ by module and layer",
    )


def influence(data: Data) -> Iterator[Picture]:
    """Which pair moves which response."""
    k = numbers(data["influence"])
    figure, (axes,) = panels(1, 1, (4.4, 3.6))
    most = float(np.abs(k).max())
    drawn = axes.imshow(k, cmap="PuOr", vmin=-most, vmax=most)
    at = range(len(k))
    axes.set_xticks(at, [str(i + 1) for i in at])
    axes.set_yticks(at, [str(i + 1) for i in at])
    axes.set(xlabel="pair that is trained", ylabel="chosen response that moves")
    figure.colorbar(drawn, ax=axes, label="rate of ln pi(y+), nats per time")
    yield Picture(
        "model_influence",
        vector(figure),
        "Rates of each chosen response under each pair's own loss.",
        "12. Influence of every pair on every chosen response; the diagonal is the own-pair rate",
    )


DRAWN: dict[str, Callable[[Data], Iterator[Picture]]] = {
    "R1": regimes,
    "R4": optimisers,
    "D2": phases,
    "G1": descent,
    "G3": taylor,
    "F6": one_step,
    "F2": against_rates,
    "F3": against_training,
    "F4": coefficients,
    "F5": gaining_tokens,
    "F7": shares,
    "K0m": influence,
}
"""Which claim's data which figures are drawn from."""


def pictures(data: dict[str, Data]) -> Iterator[tuple[str, Picture]]:
    """(claim, figure) for every claim that left data for one."""
    for claim, draw in DRAWN.items():
        if claim in data:
            for picture in draw(data[claim]):
                yield claim, picture
