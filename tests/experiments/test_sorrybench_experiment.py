"""Section 6: pairs and their labels, subsets, scales, grammar, and what the numbers are made of."""

import dataclasses
from typing import Any

import numpy as np
import pytest

from ches_jax.errors import DataError
from ches_jax.select.keep import keep_indices
from experiments import sorrybench
from experiments.bundled import replies
from experiments.bundled.grammar import kind
from experiments.bundled.world import build_world
from experiments.framework.item import Work, configure
from experiments.framework.training import write_rows
from experiments.sorrybench import data, refusals, report, runs
from experiments.sorrybench.config import LOSSES, SCALES, SUBSETS, TYPES, Objective, SorryScale
from experiments.sorrybench.runs import largest_rate, mean_loss
from experiments.sorrybench.summary import kept_types, method_summary, score_summary


def test_the_paper_scale_is_the_papers():
    c = SCALES["paper"]
    assert (c.batch_size, c.accumulate, len(c.seeds), c.keep, c.temperature, c.max_new_tokens) == (
        32,
        8,
        3,
        0.05,
        0.7,
        512,
    )
    assert (c.rates, c.gold_rates) == ((5e-6,), (1e-6,))
    assert dict(LOSSES) == {"dpo": ("dpo", {"beta": 0.1}), "ipo": ("ipo_sum", {"tau": 0.01})}
    assert (c.methods["dpo+sft"].sft, c.methods["ipo+sft"].sft) == (1.0, 1000.0)
    assert c.with_options(model="meta-llama/Meta-Llama-3-8B-Instruct").methods["dpo+sft"].sft == 0.1
    # 370 of 435 requests train, 19 of them are kept, 12 updates on all and one on the kept
    assert 435 - int(c.test_share * 435) == 370
    assert len(keep_indices(np.arange(370.0), f"lowest:{c.keep:.6f}")) == 19 and -(-370 // 32) == 12
    names = [s.name for s in sorrybench.stages(c)]
    assert not any(n.startswith("try/") for n in names), "the paper's rates are not searched again"


def test_requests_of_the_user_are_taken_whole_and_have_no_gold(tmp_path):
    path = tmp_path / "r.jsonl"
    path.write_text("{}\n")
    scale = configure("sorrybench", "paper", {"pairs": str(path)})
    assert (scale.split, scale.where, scale.gold, scale.gold_splits) == (None, {}, None, (None,))
    assert not any("gold" in s.name for s in sorrybench.stages(scale))


def test_every_filter_stands_beside_its_control_at_equal_numbers_of_updates():
    for scale in SCALES.values():
        for name in SUBSETS:
            assert scale.methods[f"dpo-{name}-long"].as_long and not scale.methods[f"dpo-{name}"].as_long


@pytest.fixture
def work(tmp_path) -> Work:
    return Work("sorrybench", "tiny", SCALES["tiny"], tmp_path, quiet=True)


def test_requests_of_the_bundled_world_are_split_and_have_gold_pairs(work):
    assert data.write_requests(work) == {"found": 810, "usable": 810, "train": 370, "test": 65}
    rows = data.read_lines(data.requests_file(work))
    assert len({r["prompt"] for r in rows}) == 435 and sum(r["test"] for r in rows) == 65
    assert all(r["prompt"].startswith("<|user|> ") and r["prompt"].endswith("<|assistant|>") for r in rows)
    assert all(kind(r["gold"]["chosen"]) == "refusal" and kind(r["gold"]["rejected"]) == "compliance" for r in rows)
    held_out = {r.text for r in build_world(0).held_out.mischief}
    assert not any(r["prompt"][9:-13] in held_out for r in rows)


def config(**changes: Any) -> SorryScale:
    """The paper's scale with a tokenizer that is at hand; a response has room after a short request."""
    return dataclasses.replace(SCALES["paper"].with_options(model="bundled", **changes), max_new_tokens=400)


def test_requests_and_gold_responses_in_the_shape_of_the_hub(tmp_path):
    """Rows as sorry-bench has them: turns, choices, a human score; several styles; requests that lack a side."""
    requests = [
        {"question_id": i, "turns": [f"request {i}"], "prompt_style": style}
        for i in range(30)
        for style in ("base", "slang")
    ]
    judged = [
        {
            "question_id": i,
            "choices": [{"index": 0, "turns": [f"answer {i} {score}"]}],
            "prompt_style": "base",
            "human_score": score,
        }
        for i in range(30)
        for score in (0.0, 1.0)
        if (i, score) != (7, 1.0)
    ]
    judged += [{**judged[0], "prompt_style": "slang", "choices": [{"turns": ["other style"]}]}]
    where = {"prompt_style": "base"}
    scale = config(
        pairs=str(write_rows(tmp_path / "r.jsonl", requests)),
        where=where,
        gold=str(write_rows(tmp_path / "g.jsonl", judged)),
    )
    work = Work("sorrybench", "paper", scale, tmp_path / "out", quiet=True)
    assert data.write_requests(work) == {"found": 30, "usable": 29, "train": 25, "test": 4}
    for row in data.read_lines(data.requests_file(work)):
        (message,) = row["prompt"]
        number = message["content"].removeprefix("request ")
        assert number != "7"
        assert row["gold"] == {"chosen": f"answer {number} 0.0", "rejected": f"answer {number} 1.0"}


def test_requests_longer_than_the_scale_takes_are_left_out(tmp_path):
    requests = write_rows(tmp_path / "r.jsonl", [{"prompt": f"p{i} " + "and " * (i % 3 * 20)} for i in range(60)])
    scale = dataclasses.replace(config(pairs=str(requests)), request_tokens=40)
    work = Work("sorrybench", "paper", scale, tmp_path / "out", quiet=True)
    assert data.write_requests(work) == {"found": 60, "usable": 40, "train": 34, "test": 6}
    assert all(len(row["prompt"][0]["content"]) < 90 for row in data.read_lines(data.requests_file(work)))


def test_gold_responses_of_another_shape_are_named(tmp_path):
    requests = write_rows(tmp_path / "r.jsonl", [{"prompt": f"p{i}"} for i in range(30)])
    gold = write_rows(tmp_path / "g.jsonl", [{"prompt": "p1", "text": "x"}])
    work = Work("sorrybench", "paper", config(pairs=str(requests), gold=str(gold)), tmp_path / "out", quiet=True)
    with pytest.raises(DataError, match="without question_id or prompt, response or choices, human_score or score"):
        data.write_requests(work)
    few = write_rows(tmp_path / "few.jsonl", [{"prompt": "p"}] * 30)
    work = Work("sorrybench", "paper", config(pairs=str(few)), tmp_path / "out", quiet=True)
    with pytest.raises(DataError, match="1 usable requests of 1; expected at least 20"):
        data.write_requests(work)


def test_the_refusal_is_preferred_and_ties_are_broken_by_chance():
    assert [data.preferred(p, 0.1) for p in ([True, False], [False, True])] == [0, 1]
    for tie in ([True, True], [False, False], [None, True]):
        assert {data.preferred(tie, draw) for draw in (0.1, 0.9)} == {0, 1}


def test_pairs_are_the_sampled_tokens(work, monkeypatch):
    """Test requests and equal responses make no pair; which response is chosen follows from the judgments."""
    from ches_jax.generate.run import FILE_NAME

    requests = [
        {"prompt": f"p{i}", "request": i, "test": i == 1, "gold": {"chosen": "n", "rejected": "y"}} for i in range(4)
    ]
    write_rows(data.requests_file(work), requests)
    tokens = [[5, 2], [6, 2], [5, 2], [6, 2], [7, 2], [7, 2], [8, 2], [9, 9]]
    judgments = [False, True, True, True, True, True, False, False]
    write_rows(
        work.folder("responses") / FILE_NAME,
        [{"prompt_ids": [1, i // 2], "token_ids": t, "text": str(t)} for i, t in enumerate(tokens)],
    )
    monkeypatch.setattr(data, "judged", lambda work, name: judgments)
    assert data.write_pairs(work) == {"pairs": 2, "same": 1, "types": {"two_compliances": 1, "mixed": 1}, "gold": 3}
    first, last = data.read_lines(data.pairs_file(work, "generated"))
    assert (first["prompt_ids"], first["chosen_ids"], first["rejected_ids"]) == ([1, 0], [6, 2], [5, 2])
    assert (first["category"], last["category"], last["request"]) == ("mixed", "two_compliances", 3)
    assert {tuple(last[f"{s}_ids"]) for s in ("chosen", "rejected")} == {(8, 2), (9, 9)}
    assert data.read_lines(data.pairs_file(work, "gold"))[0] == {
        "prompt": "p0",
        "chosen": "n",
        "rejected": "y",
        "request": 0,
    }


def test_requests_that_leave_no_room_for_a_response_are_passed_over(tmp_path):
    requests = [{"prompt": f"request {i}" + " again" * (120 if i % 3 == 0 else 0)} for i in range(60)]
    scale = config(pairs=str(write_rows(tmp_path / "r.jsonl", requests)))
    work = Work("sorrybench", "paper", scale, tmp_path / "out", quiet=True)
    assert data.write_requests(work) == {"found": 60, "usable": 40, "train": 34, "test": 6}


def test_gold_responses_take_the_shape_of_their_prompt():
    pair = {"chosen": "n", "rejected": "y"}
    talk = data._as_responses({"prompt": [{"role": "user", "content": "p"}], "gold": pair})
    assert talk["chosen"] == [{"role": "assistant", "content": "n"}]
    assert data._as_responses({"prompt": "p", "gold": pair}) == pair


def test_every_filter_keeps_the_same_number_and_the_random_one_differs_by_seed(work, monkeypatch):
    rng = np.random.default_rng(0)
    types = [TYPES[i % 3] for i in range(100)]
    write_rows(data.pairs_file(work, "generated"), [{"category": t} for t in types])
    scores = {name: rng.normal(size=100) for name in ("ches", "ln_ches", "head_score", "length")}
    scores["ln_ches"][:3] = np.nan
    monkeypatch.setattr(runs, "columns", lambda work: scores)
    kept = runs.subsets(work)
    assert {len(kept[name]) for name in ("ln_ches", "head_score", "length")} == {5}
    assert set(kept["random"]) == {"0", "1", "2"} and {len(v) for v in kept["random"].values()} == {5}
    assert len({tuple(v) for v in kept["random"].values()}) == 3
    assert not {0, 1, 2} & {i for v in kept["random"].values() for i in v}, "without a score, with no filter"
    order = np.argsort(np.where(np.isnan(scores["ln_ches"]), np.inf, scores["ln_ches"]))[:5]
    assert kept["ln_ches"] == sorted(order.tolist())
    assert kept["mixed"] == list(range(2, 100, 3)) and kept["undecided"] == []


@pytest.mark.parametrize("objective", ["dpo", "ipo"])
def test_the_loss_is_the_librarys(objective: Objective):
    import jax.numpy as jnp

    from ches_jax.losses import LossInputs, get_loss
    from ches_jax.losses import mean_loss as mean

    name, arguments = LOSSES[objective]
    loss, margins, zero = get_loss(name, **arguments), np.array([0.5, -2.0, 30.0]), jnp.zeros(3)
    inputs: Any = {
        "logp_chosen": jnp.asarray(margins, jnp.float32),
        "logp_rejected": zero,
        "ref_logp_chosen": zero,
        "ref_logp_rejected": zero,
    }
    expected = mean(loss, LossInputs(**{k: v for k, v in inputs.items() if k in loss.needs}))[0]
    assert mean_loss(objective, margins) == pytest.approx(float(expected), rel=1e-5)


def test_no_rate_that_lowers_the_loss_is_an_error():
    with pytest.raises(DataError, match=r"no learning rate of 1e-05, 0\.1 lowers the loss"):
        largest_rate({"1e-05": [0.1], "0.1": [-1.0, 0.2]}, {"1e-05": [0.0], "0.1": [0.0]}, 100)


@pytest.mark.parametrize("start, more, lr", [(0.0, 0.03, 1e-5), (0.1, 0.05, 1e-4), (0.1, 0.07, 1e-5)])
def test_a_rate_that_leaves_responses_endless_is_not_taken_but_chance_is_allowed_for(start, more, lr):
    """435 responses of which a tenth are cut: a difference of 0.04 is two standard errors."""
    losses = {"1e-05": [-0.1], "0.0001": [-0.2]}
    assert largest_rate(losses, {"1e-05": [start], "0.0001": [start + more]}, 435) == lr


def run_of(train: float, refusals: str) -> dict[str, Any]:
    numbers = dict.fromkeys(("dlogp_chosen", "dlogp_rejected", "margin", "loss_change", "tokens", "cut"), -1.0)
    return {
        "pairs": 5,
        "updates": 1,
        "lr": 1e-3,
        "train": train,
        "test": 0.5,
        "refusals": refusals,
        "by_type": {"mixed": [5, -2.0, -3.0]},
        **numbers,
    }


def test_changes_are_against_the_same_seed():
    initial = {0: run_of(0.75, "1110"), 1: run_of(0.25, "1000")}
    summary = method_summary({0: run_of(0.5, "1100"), 1: run_of(0.5, "0011")}, initial)
    assert summary["train"]["mean"] == 0.5 and summary["train_change"]["mean"] == 0.0
    assert (summary["train_change"]["min"], summary["train_change"]["max"]) == (-0.25, 0.25)
    assert (
        summary["turned"]["refusal_to_compliance"]["mean"] == 1.0
        and summary["turned"]["compliance_to_refusal"]["mean"] == 1.0
    )
    assert summary["by_type"]["mixed"]["dlogp_chosen"]["mean"] == -2.0
    assert method_summary({0: {"pairs": 0}}, initial) == {"pairs": 0}


def test_scores_by_type_of_pair():
    scores: dict[str, dict[str, list[float]]] = {
        t: {n: list(v) for n in ("ln_ches", "head_score", "ches", "length")}
        for t, v in {"two_refusals": [1.0, 3.0], "mixed": [0.0, 2.0]}.items()
    }
    summary = score_summary(scores)
    assert summary["ches"]["above"] == {"two_refusals > mixed": 0.75}
    assert summary["ches"]["by_type"]["mixed"] == {"pairs": 2, "quartiles": [0.0, 0.5, 1.0, 1.5, 2.0]}
    subsets = {
        "two_refusals": [0, 1],
        "mixed": [2, 3],
        "two_compliances": [],
        "undecided": [],
        "ln_ches": [0, 2],
        "head_score": [2, 3],
        "length": [0, 1],
        "random": {"0": [0, 1], "1": [0, 2]},
    }
    kept = kept_types(scores, subsets)
    assert kept["all"] == {"two_refusals": 2, "mixed": 2} and kept["random"] == {"two_refusals": 1.5, "mixed": 0.5}


def test_the_grammar_knows_every_reply_of_the_world_and_nothing_else():
    rng = np.random.default_rng(1)
    for request in build_world(0).train.mischief[:150]:
        assert kind(f" {replies.refusal(rng, request)}") == "refusal"
        assert kind(f" {replies.compliance(rng, request)}") == "compliance"
    for text in (
        "",
        "Sure!",
        "I will but",
        "I can help, but measure the crown.",
        "I won't do that. Sure! Just melt the hat.",
    ):
        assert kind(text) == "broken"


def test_an_undecided_judge_stops_the_experiment(work, monkeypatch):
    from ches_jax.judges import run as judge_run
    from ches_jax.runs import chunks

    monkeypatch.setattr(judge_run, "judge", lambda *a, **k: work.folder("none"))
    monkeypatch.setattr(chunks, "read_lines", lambda path: [{"refusal": None}] * 3)
    with pytest.raises(DataError, match="decided none of 3 responses"):
        data.judged(work, "responses")


def spread_of(mean, half):
    return {"mean": mean, "low": mean - half, "high": mean + half, "min": mean - half, "max": mean + half, "n": 3}


def test_verdicts_follow_the_intervals():
    up, down, none = spread_of(0.2, 0.1), spread_of(-0.2, 0.1), spread_of(0.0, 0.1)
    assert report.verdict({"train_change": down, "dlogp_chosen": down}) == "refusals fall; ln pi(y+) fall"
    words = report.verdict({"train_change": up, "dlogp_chosen": none, "kinds": {"broken": spread_of(0.9, 0.0)}})
    assert (
        words
        == "refusals rise; ln pi(y+) indistinguishable from unchanged; what is left is broken text, not compliance"
    )


@pytest.mark.parametrize(
    "refusals, compliances, said",
    [
        (0.73, 0.84, "as in the paper"),
        (0.73, 0.50, "in part as in the paper"),
        (0.53, 0.51, "indistinguishable"),
        (0.30, 0.51, "not as in the paper"),
    ],
)
def test_types_of_pairs_are_told_apart_beyond_chance_only(refusals, compliances, said):
    """217, 23 and 128 pairs: twice the standard error under chance is 0.064 and 0.13."""
    above = {"two_refusals > mixed": refusals, "two_compliances > mixed": compliances, "undecided > mixed": 0.0}
    pairs = {"two_refusals": 217, "two_compliances": 23, "mixed": 128, "undecided": 3}
    assert report._types(above, pairs) == said
    assert report._types({}, pairs) == "no mixed pairs"


def test_pairs_whose_chosen_response_refuses(tmp_path, capsys):
    prompt = [{"role": "user", "content": "How?"}]
    messages = {
        "prompt": prompt,
        **{
            s: [{"role": "assistant", "content": t}]
            for s, t in (("chosen", "I cannot help with that."), ("rejected", "Sure."))
        },
    }
    texts = {"prompt": "How?", "chosen": "Like this.", "rejected": "Sorry, no."}
    pairs = write_rows(tmp_path / "pairs.jsonl", [messages, texts])
    words = ["--pairs", str(pairs), "--out", str(tmp_path / "refusals.jsonl")]
    assert refusals.main(words) == 0
    assert data.read_lines(tmp_path / "refusals.jsonl") == [messages]
    write_rows(pairs, [texts])
    assert refusals.main(words) == 2
    assert "no chosen response refuses" in capsys.readouterr().err
    assert data.read_lines(tmp_path / "refusals.jsonl") == [messages]


def test_items_of_the_paper_are_counted_by_the_direction_it_gives():
    def change(mean: float) -> dict[str, float]:
        return {"mean": mean, "low": mean - 1, "high": mean + 1, "n": 3}

    def method(refusals: float, chosen: float) -> dict[str, Any]:
        return {"pairs": 9, "train_change": change(refusals), "dlogp_chosen": change(chosen)}

    methods = {
        "dpo": method(-2, 2),  # refusals drop as in the paper; ln pi(y+) rises where the paper's falls
        "dpo+sft": method(2, 2),  # no drop, ln pi(y+) rises: both as in the paper
        "ipo": method(0, -2),
        "dpo-random": method(-2, -2),  # not in the paper
        "dpo-two_refusals": {"pairs": 0},
    }
    assert report.agreements({"methods": methods}) == ["agree", "opposite", "agree", "agree", "undecided", "agree"]
    assert report._count({"mean": 2.0, "low": -2.0, "high": 6.0, "n": 3}, 5) == "2 [0, 5]"
