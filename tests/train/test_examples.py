"""What each kind of objective is computed on, against the plain loss of plain log-probabilities."""

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

from ches_jax import bundled
from ches_jax.cli import main
from ches_jax.data.unpaired import ONE_RESPONSE
from ches_jax.distributed.mesh import make_mesh
from ches_jax.errors import ChesError, DataError
from ches_jax.inputs import Opener
from ches_jax.losses import LossInputs, get_loss, kto_baseline
from ches_jax.losses.inputs import REWARDS
from ches_jax.models.attention.mask import Visibility
from ches_jax.models.checkpoint.load import load_model
from ches_jax.models.decoder import Decoder
from ches_jax.runs.directory import read_json
from ches_jax.runs.work import Positions
from ches_jax.train.batch_loss import batch_loss, update_metrics
from ches_jax.train.config import TrainConfig
from ches_jax.train.data.batches import Layout, make_batch, standard_row
from ches_jax.train.data.examples import NOTHING, make_examples, other_prompts
from ches_jax.train.data.loader import Loader
from ches_jax.train.data.rows import (
    _open,
    _require_an_order,
    _require_both_kinds,
    _require_weights,
    pair_by_prompt,
)
from ches_jax.train.data.split import Plan
from ches_jax.train.loop import train
from ches_jax.train.objective import reads_tokens
from ches_jax.train.observe.pair_logprobs import Evaluator
from ches_jax.types import Response, TokenPair
from tests.helpers import starts_at_the_reference, write_lines

PAIRS = [
    # both responses begin with the same token; a response of one token; a response that was cut
    TokenPair(row_id="a", index=0, prompt=(5, 6, 7), chosen=Response((8, 9, 10, 11), 2), rejected=Response((8, 4), 2)),
    TokenPair(row_id="b", index=1, prompt=(12, 13), chosen=Response((14,), 2), rejected=Response((15, 16, 17), None)),
    TokenPair(row_id="c", index=2, prompt=(5, 5), chosen=Response((20, 21, 22), 2), rejected=Response((23, 24), 2)),
]
WIDTH = 8
REWARD_VALUES = {"rewards_chosen": np.array([2.0, 0.5, 1.0]), "rewards_rejected": np.array([0.5, 0.25, 1.5])}
LOSSES = {
    "confpo": {"beta": 1.5},
    "ld_dpo": {"alpha": 0.3},
    "rebel": {"eta": 2.0},
    "odpo": {"alpha": 0.7},
    "kto": {"beta": 0.2, "weight_undesirable": 1.5},
    "d2o": {"beta": 0.3},
    "dove": {"beta": 0.3},
    "ipo_mean": {"tau": 0.5},
}
TWO_PROMPTS = [PAIRS[0], *(replace(pair, rejected_prompt=(30, 31, 32)) for pair in PAIRS[1:])]
"""One pair of one prompt, two of two."""
SAMPLED = [
    TokenPair(
        row_id=f"{i}{k}",
        index=i,
        prompt=prompt,
        chosen=Response(sample, 2),
        rejected=Response((9, 4), 2),
        candidates=(k, 3),
    )
    for i, prompt in enumerate([(5, 6), (7,)])
    for k, sample in enumerate([(9, 8), (9, 4, 4), (9,)])
]


@pytest.fixture(scope="module")
def models(tiny_model):
    """Policy and reference in double precision."""
    with jax.enable_x64(True):
        policy = load_model(tiny_model, dtype="float64", param_dtype="float64")
        reference = load_model(tiny_model, dtype="float64", param_dtype="float64")
        nnx.update(reference, jax.tree.map(lambda w: w * 1.05, nnx.state(reference)))
        yield policy, reference


class Plain:
    """Log-probability of each response token: one sequence a row, nothing shared, nothing packed, logits whole."""

    ROWS, LENGTH = 6, 16

    def __init__(self, model: Decoder):
        graph, _ = nnx.split(model)

        def logps(state, tokens, at):
            decoder = nnx.merge(graph, state)
            positions = jnp.broadcast_to(jnp.arange(self.LENGTH, dtype=jnp.int32), tokens.shape)
            none = jnp.zeros_like(tokens)
            hidden = decoder.hidden(tokens, positions, Visibility(none, none, none), none + self.LENGTH)
            every = jax.nn.log_softmax(jnp.einsum("btd,vd->btv", hidden, decoder.unembedding, precision="highest"))
            predicted = jnp.take_along_axis(every[:, :-1], tokens[:, 1:, None], axis=-1)[..., 0]
            return jnp.take_along_axis(predicted, at, axis=1)

        self.logps = jax.jit(logps)
        self.pull = jax.jit(
            lambda state, tokens, at, slope: jax.vjp(lambda s: logps(s, tokens, at), state)[1](slope)[0]
        )

    def parts(self, pairs: list[TokenPair]):
        """Tokens and places of both sides of a few pairs at a time; whole parts only."""
        step = self.ROWS // 2
        assert len(pairs) % step == 0
        for i in range(0, len(pairs), step):
            some = [both for p in pairs[i : i + step] for both in zip(p.prompts, (p.chosen, p.rejected), strict=True)]
            rows = [(*prompt, *response.targets("include")) for prompt, response in some]
            tokens = np.array([[*row, *[0] * (self.LENGTH - len(row))] for row in rows], np.int32)
            yield tokens, np.array([[len(p) - 1 + k for k in range(WIDTH)] for p, _ in some], np.int32)

    def __call__(self, model: Decoder, pairs: list[TokenPair]) -> tuple[jax.Array, jax.Array]:
        """[P, WIDTH] of the chosen and of the rejected responses; what lies beyond their ends means nothing."""
        rows = jnp.concatenate([self.logps(nnx.state(model), *part) for part in self.parts(pairs)])
        return rows[0::2], rows[1::2]

    def gradient(self, model: Decoder, pairs: list[TokenPair], slopes: tuple[jax.Array, jax.Array]):
        """Gradient of a function of these log-probabilities, from its slopes."""
        by_row = jnp.stack(slopes, 1).reshape(-1, self.ROWS, WIDTH)
        parts = zip(self.parts(pairs), by_row, strict=True)
        return jax.tree.map(lambda *g: sum(g), *(self.pull(nnx.state(model), *part, slope) for part, slope in parts))


def mask(responses) -> np.ndarray:
    return np.array([[float(k < len(r.targets("include"))) for k in range(WIDTH)] for r in responses])


@pytest.fixture(scope="module")
def plain(models):
    return Plain(models[0])


QUICK = ("ld_dpo", "kto", "d2o")


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in LOSSES])
def test_a_packed_batch_has_the_value_and_gradient_of_the_plain_loss(models, plain, x64, name):
    policy, reference = models
    loss = get_loss(name, **LOSSES[name])
    numbers = REWARD_VALUES if loss.needs >= REWARDS else {}
    pairs = {"d2o": SAMPLED, "dove": TWO_PROMPTS, "ipo_mean": TWO_PROMPTS}.get(name, PAIRS)
    examples = make_examples(loss, pairs, numbers, seed=0, max_length=16, eos="include")
    everyone = range(len(examples))
    layout = Layout(standard_row(examples.items()), 1, "include", response_tokens=5 if reads_tokens(loss) else 0)
    evaluate = Evaluator(policy, make_mesh("data=1"), layout)
    ref_params = {".".join(map(str, path)): leaf[...] for path, leaf in nnx.to_flat_state(nnx.state(reference))}
    ref = (evaluate.tokens if reads_tokens(loss) else evaluate)(ref_params, examples.pairs)
    batch = make_batch(examples.items(), layout, examples.by_response(ref, everyone), examples.extra, np.float64)
    batch = jax.tree.map(jnp.asarray, batch)
    graph, state = nnx.split(policy)

    @jax.jit
    def packed(state):
        return jax.value_and_grad(lambda s: batch_loss(nnx.merge(graph, s), loss, batch, {}), has_aux=True)(state)

    (value, (metrics, _)), grads = packed(state)

    masks = [mask(side) for side in zip(*((p.chosen, p.rejected) for p in examples.pairs), strict=True)]
    ref_tokens = plain(reference, examples.pairs)
    pure = jax.jit(jax.value_and_grad(lambda t: pure_loss(loss, t, ref_tokens, masks, examples.extra)))
    expected, slopes = pure(plain(policy, examples.pairs))
    assert float(value) == pytest.approx(float(expected), rel=1e-11)
    total = plain.gradient(policy, examples.pairs, slopes)
    scale = max(np.abs(leaf).max() for leaf in jax.tree.leaves(total))
    assert scale > 1e-4
    for actual, want in zip(jax.tree.leaves(grads), jax.tree.leaves(total), strict=True):
        np.testing.assert_allclose(actual, want, rtol=0, atol=1e-10 * scale)
    logps = "logps_joint/chosen" if name == "dove" else "logps/chosen"
    assert update_metrics({k: float(v) for k, v in metrics.items()}).keys() >= {logps, "rewards/chosen"}


def pure_loss(loss, tokens, ref_tokens, masks, extra):
    """The pure loss, from token log-probabilities by sums that are written out."""
    sums, ref = ([jnp.sum(t * m, 1) for t, m in zip(some, masks, strict=True)] for some in (tokens, ref_tokens))
    every = {
        "logp_chosen": sums[0],
        "logp_rejected": sums[1],
        "ref_logp_chosen": ref[0],
        "ref_logp_rejected": ref[1],
        "chosen_tokens": masks[0].sum(1).astype(int),
        "rejected_tokens": masks[1].sum(1).astype(int),
        "token_logps_chosen": tokens[0],
        "token_logps_rejected": tokens[1],
        "ref_token_logps_chosen": ref_tokens[0],
        "ref_token_logps_rejected": ref_tokens[1],
        "token_mask_chosen": masks[0],
        "token_mask_rejected": masks[1],
        "logp_joint_chosen": sums[0],
        "logp_joint_rejected": sums[1],
        "ref_logp_joint_chosen": ref[0],
        "ref_logp_joint_rejected": ref[1],
        "logp": sums[0],
        "ref_logp": ref[0],
        "kl_baseline": kto_baseline(sums[1], ref[1]),
        **{k: jnp.asarray(v) for k, v in extra.items()},
    }
    if loss.name == "d2o":  # two prompts with three samples each, one pair for every sample
        for prefix, (chosen, rejected) in (("", sums), ("ref_", ref)):
            every[f"{prefix}logp_candidates"] = chosen.reshape(2, 3)
            every[f"{prefix}logp_rejected"] = rejected.reshape(2, 3)[:, 0]
    inputs = LossInputs(**{k: v for k, v in every.items() if k in loss.needs})
    return jnp.mean(loss(inputs)[0])


@pytest.mark.parametrize(
    ("loss", "pairs", "used", "apart", "rows"),
    [
        # prompt + what both begin with + the rest of each, against two sequences
        ("dpo", PAIRS, [3 + 1 + 3 + 1, 2 + 1 + 3, 2 + 3 + 2], [7 + 5, 3 + 5, 5 + 4], 1),
        # of the second and the third pair each response has its own prompt: nothing is shared
        ("dpo", TWO_PROMPTS, [3 + 1 + 3 + 1, 3 + 6, 5 + 5], [7 + 5, 3 + 6, 5 + 5], 1),
        # one prompt and its token 9 for three samples and the rejected response; each fills the room of a row
        ("d2o", SAMPLED, [2 + 1 + 4, 1 + 1 + 4], [4 + 5 + 3 + 4, 3 + 4 + 2 + 3], 2),
    ],
)
@pytest.mark.parametrize("local", [None, (1,)])
def test_positions_of_updates_are_counted_with_the_rows_of_all_processes(loss, pairs, used, apart, rows, local):
    examples = make_examples(get_loss(loss), pairs, {}, seed=0, max_length=16, eos="include")
    plan = Plan(pairs=len(examples), batch_size=2, accumulate=1, total=2, seed=0)
    layout = Layout(row_tokens=64, row_multiple=1 if local is None else 2, eos="include", local_shards=local)
    loader, counted = Loader(get_loss(loss), examples, plan, layout, None, "float32"), Positions()
    seen = [j for update in range(2) for group in plan.update(update) for j in group]
    for update in range(2):
        loader.count(update, loader(update), counted)
    assert counted == Positions(
        computed=2 * max(rows, layout.row_multiple) * 64,
        used=sum(used[j] for j in seen),
        apart=sum(apart[j] for j in seen),
    )


def test_a_joint_example_has_the_prompt_in_its_responses():
    """What follows the first token is predicted; the terminators stay, and equal first tokens are one prompt."""
    one, two, _ = make_examples(get_loss("dove"), TWO_PROMPTS, {}, seed=0, max_length=16, eos="include").pairs
    assert (one.prompt, one.rejected_prompt, one.rejected) == ((5,), None, Response((6, 7, 8, 4), 2))
    assert (two.prompts, two.chosen) == (((12,), (30,)), Response((13, 14), 2))
    assert two.rejected == Response((31, 32, 15, 16, 17), None)
    assert len({p.row_id for p in (one, two, *TWO_PROMPTS)}) == 5


def test_an_unpaired_example_of_two_prompts_is_each_response_with_its_own():
    examples = make_examples(get_loss("kto"), TWO_PROMPTS, {}, seed=3, max_length=16, eos="include")
    assert [p.prompt for p in examples.pairs] == [(5, 6, 7)] * 2 + [(12, 13), (30, 31, 32), (5, 5), (30, 31, 32)]
    assert all(p.rejected_prompt is None for p in examples.pairs)


def test_an_unpaired_example_is_one_response_beside_that_of_another_prompt():
    examples = make_examples(
        get_loss("kto"), PAIRS, {"weights": np.array([1.0, 2.0, 3.0])}, seed=3, max_length=5, eos="include"
    )
    assert [(p.prompt, p.chosen) for p in examples.pairs] == [
        (pair.prompt, side) for pair in PAIRS for side in (pair.chosen, pair.rejected)
    ]
    assert examples.extra["desirable"].tolist() == [True, False] * 3
    assert examples.extra["weights"].tolist() == [1, 1, 2, 2, 3, 3]
    own = {p.prompt: (p.chosen.content, p.rejected.content) for p in PAIRS}
    for pair in examples.pairs:
        room = 5 - len(pair.prompt)
        assert len(pair.rejected.targets("include")) <= room
        assert pair.rejected.content[:room] not in [c[:room] for c in own[pair.prompt]]
    assert len({p.row_id for p in examples.pairs}) == 6


@given(st.lists(st.integers(0, 5), min_size=2, max_size=30), st.integers(0, 3))
def test_every_row_gets_another_prompt_and_no_row_is_used_twice_without_need(prompts, seed):
    keys = [(p,) for p in prompts]
    if len(set(keys)) == 1:
        with pytest.raises(ChesError, match="there is only one prompt"):
            other_prompts(keys, seed)
        return
    partners = other_prompts(keys, seed)
    assert all(keys[i] != keys[j] for i, j in enumerate(partners))
    if 2 * max(map(keys.count, keys)) <= len(keys):
        assert sorted(partners) == list(range(len(keys)))
    assert partners == other_prompts(keys, seed)


def test_single_responses_of_one_prompt_make_pairs():
    def row(i, prompt, token):
        return TokenPair(row_id=str(i), index=i, prompt=prompt, chosen=Response((token,), 2), rejected=NOTHING)

    rows = [row(0, (1,), 10), row(1, (1,), 11), row(2, (1,), 12), row(3, (3,), 13)]
    pairs, members = pair_by_prompt(rows, np.array([False, True, True, False]))
    assert members["chosen"].tolist() == [1, 2, 3] and members["rejected"].tolist() == [0, 2, 3]
    weights = {f"weights_{side}": 10.0 + which for side, which in members.items()}
    examples = make_examples(get_loss("bco"), pairs, weights, seed=0, max_length=9, eos="include")
    assert examples.extra["desirable"].tolist() == [True, False, True, False]
    assert examples.extra["weights"].tolist() == [11, 10, 12, 13] and examples.extra.keys() == {"desirable", "weights"}
    contents = [(p.prompt, p.chosen.content, p.rejected.content) for p in pairs]
    assert contents == [((1,), (11,), (10,)), ((1,), (12,), ()), ((3,), (), (13,))]


@pytest.fixture(scope="module")
def rows():
    return [json.loads(line) for line in bundled.pairs_file().read_text().splitlines()[:10]]


def lines(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def kto(small, tmp_path_factory, rows):
    """A run of two updates on ten pairs, in double precision."""
    folder = tmp_path_factory.mktemp("kto")

    def run(name, data=rows, **more):
        options = {
            "loss": "kto",
            "optimizer": "sgd",
            "lr": 1e-2,
            "steps": 2,
            "holdout": 2,
            "limit": None,
            "export": False,
            "dtype": "float64",
            "pairs": write_lines(folder / f"{name}.jsonl", data),
        }
        return train(small(folder / name, **{**options, **more}), quiet=True)

    return run


@pytest.fixture(scope="module")
def kto_on_pairs(kto):
    return kto("pairs")


def equal_logs(a, b):
    for one, other in zip(lines(a), lines(b), strict=True):
        assert one.keys() == other.keys()
        for name in one:
            assert one[name] == pytest.approx(other[name], rel=1e-9, abs=1e-11), name


@pytest.mark.slow
def test_accumulation_changes_nothing_of_a_kto_run(kto, kto_on_pairs):
    equal_logs(kto_on_pairs, kto("cut", accumulate=2))


def test_kto_trains_on_pairs(kto, kto_on_pairs):
    _, first, second, last = lines(kto_on_pairs)
    # policy and reference agree: every surplus and the divergence are 0, and the loss is one half
    assert first["loss"] == pytest.approx(0.5) and first["kl"] == pytest.approx(0, abs=1e-12) and second["kl"] > 0
    assert {"logps/chosen", "rewards/chosen", "grad_norm"} <= first.keys()
    assert {"eval_loss", "eval_kl", "eval_rewards/margins", "eval_displacement/dlogp_chosen"} <= last.keys()
    assert read_json(kto_on_pairs / "run.json")["counts"]["train"] == 16


def test_kto_trains_on_single_responses(kto, kto_on_pairs, rows, capsys):
    """Rows of one response give the run of the pairs they came from; where no two make a pair, each is watched."""
    singles = [
        {"prompt": r["prompt"], "answer": r[side], "label": side == "chosen"}
        for r in rows
        for side in ("chosen", "rejected")
    ]
    columns = {"completion": "answer"}
    equal_logs(kto_on_pairs, kto("singles", singles, columns=columns))
    good = kto("good", [r for r in singles if r["label"]], columns=columns, holdout=0)
    last = lines(good)[-1]
    assert last["displacement/dlogp_chosen"] > 0 and "displacement/margin" not in last
    assert "NaN" not in (good / "metrics.jsonl").read_text()
    assert main(["diagnose", str(good)]) == 2
    assert "of which no two make a pair" in capsys.readouterr().err


def test_labels_of_single_responses_are_words_or_flags_and_no_ratings(kto, kto_on_pairs, rows):
    """A rating of 2 of 5 is no good response because it is above 0; a row without a label is one that is not fit."""
    words = {True: "True", False: "false"}
    singles = [
        {"prompt": r["prompt"], "completion": r[side], "label": words[side == "chosen"]}
        for r in rows
        for side in ("chosen", "rejected")
    ]
    equal_logs(kto_on_pairs, kto("words", singles))
    with pytest.raises(DataError, match=r"'label' is int 2; .*a rating needs a threshold first"):
        kto("ratings", [{**row, "label": 2} for row in singles])
    unknown = {**singles[0], "label": None}
    with pytest.raises(DataError, match=r"1 of \d+ rows .*'label' is NoneType None"):
        kto("unknown", [*singles, unknown])
    dropped = kto("dropped", [*singles, unknown], on_bad_row="drop")
    equal_logs(kto_on_pairs, dropped)


def test_rows_of_one_response_are_opened_once(tmp_path, monkeypatch):
    opened, opener = [], Opener()
    monkeypatch.setattr(Opener, "rows", lambda *a, of=Opener.rows: opened.append(a[-2]) or of(*a))

    def source_of(rows, loss="kto"):
        spec = write_lines(tmp_path / "rows.jsonl", rows)
        return _open(TrainConfig(pairs=spec, loss=loss), get_loss(loss), spec, None, opener, "pairs")

    row = {"prompt": "p", "completion": " c"}
    source, one_response = source_of([{**row, "label": True}, row])
    assert one_response and opened == [ONE_RESPONSE]
    assert [bool(record.fault) for record in source] == [False, True]  # which has no label
    with pytest.raises(DataError, match=r"rows\.jsonl, line 1: no column 'label'"):
        source_of([row, row])
    assert source_of([row, row], "sft")[1] and not source_of([{"prompt": "p", "chosen": "a", "rejected": "b"}])[1]


@pytest.mark.slow
def test_d2o_trains_on_samples_of_the_policy(small, tmp_path, rows):
    """Three samples a prompt, the rejected response computed once; K equal samples are one sample."""
    one = [{"prompt": r["prompt"], "responses": [r["chosen"]], "rejected": r["rejected"]} for r in rows]
    three = [{**r, "responses": r["responses"] * 3} for r in one]
    options = {"loss": "d2o", "optimizer": "sgd", "lr": 1e-2, "steps": 2, "holdout": 2, "limit": None, "export": False}
    a, b = (
        train(small(tmp_path / n, pairs=write_lines(tmp_path / f"{n}.jsonl", data), **options), quiet=True)
        for n, data in (("one", one), ("three", three))
    )
    assert starts_at_the_reference(lines(a)[1])
    for one_sample, three_samples in zip(lines(a)[1:3], lines(b)[1:3], strict=True):
        # at the reference both rewards are 0, and rounding decides which is larger
        ties = {"rewards/accuracies"} if starts_at_the_reference(one_sample) else set()
        for name in one_sample.keys() - ties:
            assert one_sample[name] == pytest.approx(three_samples[name], rel=1e-4, abs=1e-5), name
    assert lines(b)[-1]["eval_loss"] == pytest.approx(lines(a)[-1]["eval_loss"], rel=1e-4)
    assert read_json(b / "run.json")["counts"]["train"] == 8
    unequal = write_lines(tmp_path / "unequal.jsonl", [one[0], three[1]])
    with pytest.raises(ChesError, match=r"row 1 has other samples \(3\) than the first \(1\)"):
        train(small(tmp_path / "c", pairs=unequal, **{**options, "holdout": 0}), quiet=True)
    with pytest.raises(ChesError, match="no list of samples in 'responses'; found: prompt"):
        train(small(tmp_path / "d", pairs=write_lines(tmp_path / "d.jsonl", rows), **options), quiet=True)


@pytest.mark.slow
def test_rewards_are_read_under_the_names_in_use(small, tmp_path, rows):
    named_rows = [{**r, "score_chosen": 2.0 + i, "score_rejected": 1.0} for i, r in enumerate(rows)]
    own = [{**r, "good": r["score_chosen"], "bad": r["score_rejected"]} for r in named_rows]
    options = {"loss": "rebel", "steps": 1, "holdout": 0, "limit": None, "export": False, "batch_size": 10}
    a = train(small(tmp_path / "a", pairs=write_lines(tmp_path / "a.jsonl", named_rows), **options), quiet=True)
    b = train(
        small(tmp_path / "b", pairs=write_lines(tmp_path / "b.jsonl", own), rewards="good,bad", **options), quiet=True
    )
    expected = np.mean([(1.0 + i) ** 2 for i in range(10)])
    assert lines(a)[1]["loss"] == pytest.approx(expected, rel=1e-5) == lines(b)[1]["loss"]
    with pytest.raises(ChesError, match=r"line 1: --loss rebel needs numbers in chosen_reward and rejected_reward, or"):
        train(small(tmp_path / "c", pairs=write_lines(tmp_path / "c.jsonl", rows), **options), quiet=True)


@pytest.mark.slow
def test_a_pair_of_several_responses_takes_their_own_numbers(small, tmp_path, rows):
    several = [
        {"prompt": r["prompt"], "responses": [r["rejected"], r["chosen"], r["chosen"] + "!"], "scores": [1.0, 3.0, 0.0]}
        for r in rows[:5]
    ]
    pairs = write_lines(tmp_path / "several.jsonl", several)
    options = {"loss": "rebel", "steps": 1, "holdout": 0, "limit": None, "export": False, "batch_size": 10}
    run = train(small(tmp_path / "a", pairs=pairs, **options), quiet=True)
    assert lines(run)[1]["loss"] == pytest.approx((2.0**2 + 3.0**2) / 2, rel=1e-5)
    one_for_all = write_lines(tmp_path / "b.jsonl", [{**r, "good": 1.0, "bad": 0.5} for r in several])
    with pytest.raises(ChesError, match=r"needs numbers in good and bad .*lists, a number for each response"):
        train(small(tmp_path / "b", pairs=one_for_all, rewards="good,bad", **options), quiet=True)


def test_lists_have_an_order_and_a_classifier_two_kinds():
    numbers = {"rewards_chosen": np.array([1.0, 2.0]), "rewards_rejected": np.array([1.0, 1.0])}
    _require_an_order("d", "pro", numbers)
    with pytest.raises(DataError, match="scores of each row are all equal"):
        _require_an_order("d", "pro", {name: np.ones(2) for name in numbers})
    for loss, good in (("bco", [True, False]), ("kto", [True, True])):
        _require_both_kinds("d", get_loss(loss), np.array(good))
    for good, word in (([True, True], "good"), ([False], "bad")):
        with pytest.raises(DataError, match=f"all {len(good)} rows are {word}, and bco"):
            _require_both_kinds("d", get_loss("bco"), np.array(good))


@pytest.mark.parametrize(
    ("weights", "message"),
    [([0.0, 1.0], None), ([1.0, -0.5], "row 7 has the weight -0.5 in w"), ([0.0, 0.0], "the weights in w are all 0")],
)
def test_weights_are_none_below_zero_and_not_all_zero(weights, message):
    pairs = [replace(PAIRS[0], index=i) for i in (3, 7)]
    if message is None:
        _require_weights("d", "w", pairs, {"weights": np.array(weights)})
        return
    with pytest.raises(DataError, match=message):
        _require_weights("d", "w", pairs, {"weights": np.array(weights)})


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--loss", "kto", "--reference", "columns"], "reads more of the reference"),
        (["--loss", "ld_dpo", "--reference", "columns"], "reads more of the reference"),
        (["--loss", "odpo"], "--loss odpo needs numbers in chosen_reward and rejected_reward"),
        (["--rewards", "a,b"], "reads no rewards"),
        (["--loss", "odpo", "--rewards", "a"], "expected the names of two columns"),
        (["--loss", "kto", "--columns", "completion=answer"], "no column 'answer'"),
        (["--loss", "d2o"], "no list of samples in 'responses'"),
        (["--loss", "list_mle"], "row 0 is a pair, and loss 'list_mle' reads lists"),
        (["--loss", "0.5*lipo_lambda+sft"], "row 0 is a pair, and loss '0.5*lipo_lambda+sft' reads lists"),
        (["--weights", "nope"], "--weights nope needs numbers in nope; the row has prompt, chosen, rejected"),
        (["--label-probabilities", "no"], "--label-probabilities no needs numbers in no; the row has"),
        (["--loss", "given_weights(dpo)", "--token-weights", "a,b"], "--token-weights a,b needs numbers in a and b"),
        (["--loss", "weighted(bco)"], "say in which column it is: --weights COLUMN"),
    ],
)
def test_bad_input_is_one_message(capsys, tiny_model, tmp_path, words, message):
    assert main(["train", "--model", str(tiny_model), "--limit", "20", "--out", str(tmp_path / "run"), *words]) == 2
    stderr = capsys.readouterr().err
    assert message in stderr and "Traceback" not in stderr
    assert not (tmp_path / "run").exists()
