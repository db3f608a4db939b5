"""Measured numbers on the pages are those of the recorded files: each sentence is rendered from them and looked up."""

import json
import re
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
BENCHMARKS = "experiments/benchmarks/results"


class Recorded:
    """Values of a result file by their path, parts apart by ``|``: ``of("table|ours|seconds")``."""

    def __init__(self, file: str):
        self.content: Any = json.loads((ROOT / file).read_text(encoding="utf-8"))

    def __call__(self, path: str) -> Any:
        value = self.content
        for part in path.split("|"):
            value = value[part]
        return value

    def rho(self, path: str) -> str:
        """A correlation with its interval."""
        one = self(path)
        return f"{one['rho']:.2f} [{one['low']:.2f}, {one['high']:.2f}]"

    def nats(self, path: str, sign: str = "+", spread: bool = True) -> str:
        """A mean of nats with its interval."""
        one = self(path)
        ends = sorted((abs(one["low"]), abs(one["high"]))) if sign == "fall" else (one["low"], one["high"])
        mean = f"{abs(one['mean']):.1f}" if sign == "fall" else f"{one['mean']:{sign}.1f}"
        return f"{mean} [{ends[0]:.1f}, {ends[1]:.1f}]" if spread else mean

    def percent(self, path: str) -> str:
        """A share of whole per cent with its interval, within 0 and 100."""
        one = self(path)
        return f"{one['mean'] * 100:.0f} % [{max(one['low'], 0) * 100:.0f}, {min(one['high'], 1) * 100:.0f}]"


def claim(file: str, name: str) -> Mapping[str, Any]:
    return next(c for c in recorded(file)("claims") if c["id"] == name)


@cache
def recorded(file: str) -> Recorded:
    return Recorded(file)


def bench(name: str) -> Recorded:
    return recorded(f"{BENCHMARKS}/{name}.json")


def experiment(name: str, scale: str = "small") -> Recorded:
    return recorded(f"experiments/{name}/results/{scale}.json")


def scoring() -> list[str]:
    avx2, avx512 = (bench(f"side_by_side_cpu{kind}")("cases")[0] for kind in ("_avx2", ""))
    shares = [f"{case['table']['ours']['share_of_peak'] * 100:.0f} %" for case in (avx2, avx512)]
    ways = {"the official code": "official", "padded batches of PyTorch": "batched", "packed rows": "packed"}
    times = []
    for name, way in ways.items():
        both = " and ".join(f"{case['ratios'][f'torch-{way}'][1]:.1f}" for case in (avx2, avx512))
        times.append(f"{name} {both} times")
    head = bench("score_speed_cpu")("ratios")["ours with head score / ours, cpu_seconds"]
    return [
        f"{shares[0]} of the measured peak with AVX2, {shares[1]} with AVX-512",
        ", ".join(times),
        f"The head score costs {head:.1f}x CHES",
    ]


def step() -> list[str]:
    said = []
    for file in ("train_speed_avx2", "train_speed_cpu"):
        of, cases = bench(file), []
        for case in ("256+256", "384+128"):
            ratios = of(f"lengths|{case}|ratios")
            times = [f"{ratios[f'{peer} / ours, cpu_s_per_step_median']:.1f}x" for peer in ("trl", "tunix")]
            shares = [f"{100 / ratios[f'{peer} / ours, peak_rss_mib']:.0f} %" for peer in ("trl", "tunix")]
            cases.append(f"{case}: {' and '.join(times)} as fast, memory {' and '.join(shares)} of theirs")
        said.append("; ".join(cases))
    return said


def theory() -> str:
    of = recorded("theory/results/toy/claims.json")
    assert of("failed") == 0
    return f"all of {of('passed')} claims hold, in {sum(c['seconds'] for c in of('claims')):.0f} s"


def rates() -> str:
    bundled, human = (
        claim(f"theory/results/{d}/claims.json", "F2")["detail"]["spearman"] for d in ("bundled", "human_pairs")
    )
    return (
        f"bundled: head score {bundled['head_score']['rho']:.2f}, CHES {bundled['ches']['rho']:.2f}; human pairs: "
        f"{human['head_score']['rho']:.2f}, {human['ches']['rho']:.2f}"
    )


def similarity() -> str:
    of = experiment("similarity")
    at = "result|objectives|dpo|random_pairs"
    equal = of(f"{at}|at_equal_lengths")
    windows = [w["dlogp_chosen"]["mean"] for w in of("result|objectives|dpo|measures|ches|windows").values()]
    assert windows == sorted(windows, reverse=True)
    return (
        f"head score {of.rho(f'{at}|spearman|head_score')}, CHES {of.rho(f'{at}|spearman|ches')}; at equal lengths "
        f"{equal['head_score']:.2f}, {equal['ches']:.2f}; windows of CHES fall strictly, {windows[0]:.1f} to "
        f"{windows[-1]:.1f} nats"
    )


HELD, OWN = "result|lrs|3e-05|sets|held_out", "result|lrs|3e-05|sets|train"
TALKS = "result|lrs|1e-05|sets|held_out"


def forecast() -> list[str]:
    of, talks = experiment("forecast"), experiment("forecast", "small-dialogues")
    p, q = f"{HELD}|predictors", f"{TALKS}|predictors"
    return [
        f"{of('result|pairs|held')} TruthfulQA pairs, stories260K after SFT, DPO (chosen fell by "
        f"{of.nats(f'{HELD}|chosen', 'fall', spread=False)} nats)",
        f"forecast {of.rho(f'{p}|first order')}, a pilot of 4 updates {of(f'{p}|pilot|rho'):.2f}, head score "
        f"{of(f'{p}|head_score|rho'):.2f}, CHES {of(f'{p}|ches|rho'):.2f} (the wrong sign)",
        f"HH-RLHF dialogues, 3.1M Llama (fell by {talks.nats(f'{TALKS}|chosen', 'fall', spread=False)} nats): forecast "
        f"{talks.rho(f'{q}|first order')}, pilot {talks(f'{q}|pilot|rho'):.2f}, head score "
        f"{talks(f'{q}|head_score|rho'):.2f}, CHES {talks(f'{q}|ches|rho'):.2f}",
    ]


def dialogues() -> list[str]:
    of = experiment("forecast", "small-dialogues")
    p, gain = f"{TALKS}|predictors", "result|filters|{}|both"
    fit = of(f"{p}|first order|calibration")
    fall = 1 - of("result|filters|influence|chosen|mean") / of("result|filters|all|chosen|mean")
    lowered = of.nats(f"{TALKS}|chosen", "fall").replace(" ", " nats ", 1)
    equal = [of(f"{p}|{name}|equal_lengths|rho") for name in ("first order", "head_score", "ches")]
    return [
        f"{of('result|pairs|held')} held-out pairs by {lowered} ({of(f'{TALKS}|chosen_fell') * 100:.0f} % fell; margin "
        f"{of(f'{TALKS}|margin|mean'):+.1f}). Spearman: forecast {of.rho(f'{p}|first order')}, at equal lengths "
        f"{equal[0]:.2f}; pilot {of(f'{p}|pilot|rho'):.2f}; head score {of(f'{p}|head_score|rho'):.2f}, CHES "
        f"{of(f'{p}|ches|rho'):.2f} ({equal[1]:+.2f} and {equal[2]:+.2f} at equal lengths). actual = "
        f"{fit['slope']:.2f} x forecast - {-fit['intercept']:.1f} nats, R2 {fit['r2']:.2f}. Without the highest "
        f"influence {of.nats(gain.format('influence')).replace(' ', ' nats ', 1)} ({fall * 100:.0f} % less fall), "
        f"random {of.nats(gain.format('random'))}, an SFT term instead {of.nats(gain.format('with_sft'))}",
        forecast_costs(of),
        f"takes {of('result|costs|forward_in_blocks'):.2f} of that unit",
    ]


def forecast_costs(of: Callable[[str], Any]) -> str:
    return (
        f"forecast {of('result|costs|forecast'):.1f}, influence {of('result|costs|influence'):.1f} with "
        f"{of('result|pairs|probes')} probes, second order {of('result|costs|push_twice'):.1f} more"
    )


def forecast_page() -> list[str]:
    of = experiment("forecast")
    p, q, gain = f"{HELD}|predictors", f"{OWN}|predictors", "result|filters|{}|both"
    pairs, fit = of("result|pairs"), of(f"{p}|first order|calibration")
    fall = 1 - of("result|filters|influence|chosen|mean") / of("result|filters|all|chosen|mean")
    return [
        f"SFT on {pairs['sft']} TruthfulQA pairs",
        f"chosen responses of {pairs['held']} held-out pairs by "
        f"{of.nats(f'{HELD}|chosen', 'fall').replace(' ', ' nats ', 1)}",
        f"({of(f'{HELD}|chosen_fell') * 100:.0f} % fell; margin {of(f'{HELD}|margin|mean'):+.1f}) and those of its own "
        f"{pairs['train']} pairs by {of.nats(f'{OWN}|chosen', 'fall', spread=False)}.",
        f"without SFT: {of.nats('result|untuned|held_out|chosen')} held-out, "
        f"{of.nats('result|untuned|train|chosen', spread=False)} on its own pairs",
        f"forecast {of.rho(f'{p}|first order')}, at equal lengths {of(f'{p}|first order|equal_lengths|rho'):.2f}; head "
        f"score {of(f'{p}|head_score|rho'):.2f}, CHES {of(f'{p}|ches|rho'):.2f} (the *wrong* sign), length-normalised "
        f"CHES {of(f'{p}|ln_ches|rho'):+.2f} ({of(f'{p}|ln_ches|equal_lengths|rho'):+.2f} at equal lengths)",
        f"A pilot of 4 updates, measured: {of.rho(f'{p}|pilot')}",
        f"forecast {of(f'{q}|first order|rho'):.2f} at first order, {of(f'{q}|second order|rho'):.2f} at second, pilot "
        f"{of(f'{q}|pilot|rho'):.2f}",
        f"actual = {fit['slope']:.2f} x forecast - {-fit['intercept']:.1f} nats, R2 {fit['r2']:.2f} (first order, "
        f"held-out). The mean forecast was {fit['mean_forecast']:.1f}",
        f"{pairs['test']} test pairs, {len(of('seeds'))} draws of the pool, against all pairs: highest influence "
        f"{of.nats(gain.format('influence')).replace(' ', ' nats ', 1)} ({fall * 100:.0f} % less fall, margin "
        f"{of('result|filters|influence|margin|mean'):.2f} against {of('result|filters|all|margin|mean'):.2f}), "
        f"highest CHES {of.nats(gain.format('ches'))}, head score {of.nats(gain.format('head_score'))}, random "
        f"{of.nats(gain.format('random'))}, longest rejected {of.nats(gain.format('rejected_tokens'))}, highest "
        f"length-normalised CHES {of.nats(gain.format('ln_ches'))}, lowest influence (the wrong half) "
        f"{of.nats(gain.format('least_influence'))}; all pairs with weights by influence "
        f"{of.nats(gain.format('soft_influence'))}, an SFT term instead {of.nats(gain.format('with_sft'))}",
        forecast_costs(of),
    ]


def refusals() -> list[str]:
    of = experiment("sorrybench", "small-refusing")
    pairs = of("result|pairs")
    train = "result|methods|{}|train"
    return [
        f"tuned to refuse {of('result|initial|train|mean') * 100:.0f} %",
        f"all pairs {of(train.format('dpo') + '|mean') * 100:.0f} % ({pairs['types']['mixed']} of {pairs['pairs']} "
        f"prefer a refusal to a compliance); two refusals only {of.percent(train.format('dpo-two_refusals'))}; 5 % of "
        f"the pairs, as many updates: lowest head score {of.percent(train.format('dpo-head_score-long'))}, ln-CHES "
        f"{of.percent(train.format('dpo-ln_ches-long'))}, random {of.percent(train.format('dpo-random-long'))}",
    ]


def memory() -> str:
    table = bench("stream_rows")("table")
    few, many = table["10000"]["peak_rss_mb"], table["1000000"]["peak_rss_mb"]
    return f"{few:.0f} MB for 10,000, {many:.0f} MB for 1,000,000"


def loading() -> str:
    full, half = (bench(f"load_model_{d}")("ours_over_transformers") for d in ("float32", "bfloat16"))
    return (
        f"process: {full['process_seconds']:.2f}x the time (fp32), {half['process_seconds']:.2f}x (bf16); "
        f"{full['peak_rss_mb']:.2f}x and {half['peak_rss_mb']:.2f}x the memory. The load call alone: "
        f"{full['seconds']:.0f}x and {half['seconds']:.0f}x slower"
    )


def experts() -> str:
    of = bench("load_experts")
    return (
        f"peak memory of the process {of('peak_ratio'):.2f}x the bytes of its parameters; "
        f"{of('needed_ratio'):.3f}x beyond a process that loads nothing"
    )


def scan() -> str:
    table = bench("scan_layers")("table")
    loop, scanned = table["loop 24 layers"], table["scan 24 layers"]
    return (
        f"compiles {loop['compile_seconds'] / scanned['compile_seconds']:.1f}x faster, runs "
        f"{loop['run_seconds'] / scanned['run_seconds']:.2f}x faster"
    )


PAGES: dict[str, dict[str, Callable[[], str | list[str]]]] = {
    "README.md": {"scoring speed": scoring, "a DPO step": step, "before training": forecast},
    "docs/results.md": {
        "theory, toy models": theory,
        "which score predicts the true rate": rates,
        "which score predicts the change": similarity,
        "are refusals unlearned": refusals,
        "memory of": memory,
        "loading a mixture": experts,
        "loading 1.2 billion": loading,
        "scan over layers": scan,
    },
    "docs/forecast.md": {"what was measured": forecast_page, "dialogues": dialogues},
}
ELSEWHERE = {
    "the bundled world": "tests/experiments/test_bundled_training.py, on the model that ships",
    "exactness": "the bounds of tests/models/test_golden.py, computed there",
    "an epoch over": "runs that are not kept; the command stands in the row",
}
"""Rows of the README and of the results whose numbers are no recorded file's."""


def words(text: str) -> str:
    return re.sub(r"\s+", " ", text)


@pytest.mark.parametrize(("page", "row"), [(page, row) for page, rows in PAGES.items() for row in rows])
def test_the_numbers_of_a_row_are_those_recorded(page: str, row: str):
    rendered = PAGES[page][row]()
    text = words((ROOT / page).read_text(encoding="utf-8"))
    missing = [one for one in ([rendered] if isinstance(rendered, str) else rendered) if words(one) not in text]
    assert missing == [], f"{page} does not say what the recorded files say"


def test_every_row_of_the_tables_is_rendered_or_says_where_its_numbers_are_from():
    pages = [(ROOT / page).read_text(encoding="utf-8") for page in ("README.md", "docs/results.md")]
    tables = [page.partition("| what | result | command |")[2].splitlines()[2:] for page in pages]
    rows = [line.split("|")[1].strip() for table in tables for line in table if line.startswith("|")]
    known = [*PAGES["README.md"], *PAGES["docs/results.md"], *ELSEWHERE]
    assert [row for row in rows if sum(row.startswith(name) for name in known) != 1] == []
    assert len(rows) == len(known)
