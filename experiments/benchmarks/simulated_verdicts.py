"""How often are the verdicts and intervals of ``ches diagnose`` right? Simulated runs whose truth is known.

    python -m experiments.benchmarks.simulated_verdicts --draws 1000 --out verdicts.json

Changes of pairs are drawn independent, four to a prompt with correlation 0.7, or with heavy tails (Student's t with 2.5
degrees of freedom); training logs are means of batches around a course that saturates, with noise that is correlated
from step to step (0.3). Only numpy is used; minutes on two cores.

``right``: the verdict is the true one; where nothing changed, anything but a claim that chosen fell; below the least
number of prompts, ``undecided``. ``covered``: the interval of chosen holds the true mean (of the logged end, for logs);
null where there is none.
"""

import argparse
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from ches_jax.displacement.changes import Changes
from ches_jax.displacement.intervals import FEWEST, end
from ches_jax.displacement.verdict import diagnose_changes

TRUTHS = {
    "displaced": (-4.0, -12.0),
    "chosen_down": (-4.0, -4.0),
    "not_displaced": (4.0, -4.0),
    "nothing": (0.0, 0.0),
}
"""True verdict -> mean change of chosen and of rejected, nats; a single pair has the standard deviation 1."""
PAIRS = (20, 200, 5000)
STEPS = (10, 50, 500)
SHAPES = ("independent", "four of a prompt", "heavy tails")
OF_A_PROMPT, CORRELATION, FREEDOM, FROM_STEP_TO_STEP = 4, 0.7, 2.5, 0.3


@dataclass(frozen=True)
class Result:
    """One regime."""

    source: str
    shape: str
    count: int
    truth: str
    draws: int
    right: float
    covered: float | None


def noise(rng: np.random.Generator, shape: str, count: int) -> tuple[np.ndarray, np.ndarray | None]:
    """[2, count] with mean 0, and the prompt of each pair where several share one."""
    if shape == "heavy tails":
        return rng.standard_t(FREEDOM, size=(2, count)), None
    if shape == "independent":
        return rng.normal(size=(2, count)), None
    prompts = np.repeat(np.arange(-(-count // OF_A_PROMPT)), OF_A_PROMPT)[:count]
    shared = rng.normal(size=(2, prompts[-1] + 1))[:, prompts]
    return np.sqrt(CORRELATION) * shared + np.sqrt(1 - CORRELATION) * rng.normal(size=(2, count)), prompts


def of_pairs(rng: np.random.Generator, shape: str, count: int, means: tuple[float, float]) -> tuple[Changes, float]:
    """Changes of pairs and the true mean of chosen."""
    values, prompts = noise(rng, shape, count)
    chosen, rejected = values + np.array(means)[:, None]
    return Changes(chosen, rejected, "simulated", records=prompts), means[0]


def of_steps(rng: np.random.Generator, count: int, means: tuple[float, float]) -> tuple[Changes, float]:
    """A training log (batches of 16 pairs) and the true mean of its end."""
    course = 1 - np.exp(-6 * np.arange(1, count + 1) / count)
    steps = rng.normal(size=(2, count + 50)) * np.sqrt(1 - FROM_STEP_TO_STEP**2) / 4
    for i in range(1, steps.shape[1]):
        steps[:, i] += FROM_STEP_TO_STEP * steps[:, i - 1]
    chosen, rejected = steps[:, 50:] + np.array(means)[:, None] * course
    return Changes(chosen, rejected, "simulated", unit="steps"), float(means[0] * course[-end(count) :].mean())


def is_right(verdict: str, truth: str, records: int) -> bool:
    """Whether a verdict says what is so."""
    if records < FEWEST:
        return verdict == "undecided"
    return verdict in ("undecided", "not_displaced") if truth == "nothing" else verdict == truth


def regimes() -> Iterator[tuple[str, str, int]]:
    """Source, shape and count of each regime."""
    yield from (("pairs", shape, count) for shape in SHAPES for count in PAIRS)
    yield from (("steps", "saturating course", count) for count in STEPS)


def simulate(source: str, shape: str, count: int, truth: str, draws: int, seed: int = 0) -> Result:
    """One regime with one truth."""
    rng = np.random.default_rng([seed, count, *map(ord, shape + truth)])
    right = covered = known = 0
    for _ in range(draws):
        means = TRUTHS[truth]
        changes, mean = of_steps(rng, count, means) if source == "steps" else of_pairs(rng, shape, count, means)
        diagnosis = diagnose_changes(changes)
        right += is_right(diagnosis.verdict, truth, diagnosis.records)
        covered += diagnosis.chosen.low <= mean <= diagnosis.chosen.high
        known += diagnosis.chosen.known
    return Result(source, shape, count, truth, draws, right / draws, covered / known if known else None)


def table(results: list[Result]) -> str:
    """Markdown: a row for each regime; shares of draws."""
    lines = ["| source | shape | count | right: " + " | right: ".join(TRUTHS) + " | covered |", "|---" * 8 + "|"]
    for source, shape, count in regimes():
        row = {r.truth: r for r in results if (r.source, r.shape, r.count) == (source, shape, count)}
        shares = " | ".join(f"{row[t].right:.3f}" for t in TRUTHS)
        covers = [r.covered for r in row.values() if r.covered is not None]
        covered = f"{np.mean(covers):.3f}" if covers else "no interval"
        lines.append(f"| {source} | {shape} | {count:,} | {shares} | {covered} |")
    return "\n".join(lines)


def main() -> None:
    """Simulate all regimes, print the table, write the numbers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=1000)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    results = [simulate(*regime, truth, options.draws) for regime in regimes() for truth in TRUTHS]
    print(table(results))
    if options.out is not None:
        options.out.write_text(json.dumps([asdict(r) for r in results], indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
