"""What prompts begin with is computed once for all rows, and no score moves beyond rounding."""

from dataclasses import replace

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import ches_jax.data.prefix as prefix_module
from ches_jax.data.packing import Candidates, group_by_prompt, pack, packed_length
from ches_jax.data.prefix import behind, best_prefix, by_prefix, most_copies, without
from ches_jax.distributed.mesh import make_mesh
from ches_jax.models.attention.block_sparse import blocks
from ches_jax.models.attention.dense import dense, query_chunked
from ches_jax.models.decoder import Decoder
from ches_jax.models.families.registry import decoder_config
from ches_jax.scores.forward import ForwardPass, Outputs, _may_share_prefix
from ches_jax.scores.scorer import Batching, PairScorer
from ches_jax.types import Response, TokenPair
from tests.models.rows import ROPES, ROWS
from tests.models.test_packed_families import random_model

SYSTEM = tuple(range(3, 30))
"""27 tokens: cut to 24, a multiple of the tests' 8."""


@pytest.fixture
def small_steps(monkeypatch):
    """Prefixes of tests are shorter than those that pay."""
    monkeypatch.setattr(prefix_module, "STEP", 8)
    monkeypatch.setattr(prefix_module, "LEAST_POSITIONS", 1)


def some_pairs(count: int = 7, system: tuple[int, ...] = SYSTEM) -> list[TokenPair]:
    """Pairs behind one system prompt, with responses that share nothing, something, and all but a token."""
    rng = np.random.default_rng(0)

    def drawn(n: int) -> tuple[int, ...]:
        return tuple(rng.integers(3, 100, n).tolist())

    pairs = []
    for i in range(count):
        both = drawn(i % 3)
        chosen, rejected = Response((*both, *drawn(1 + i)), 2), Response((*both, *drawn(3)), 2)
        pairs.append(
            TokenPair(row_id=str(i), index=i, prompt=(*system, *drawn(1 + i % 4)), chosen=chosen, rejected=rejected)
        )
    return pairs


def strangers() -> list[TokenPair]:
    """Pairs that begin otherwise, and one whose responses have prompts of their own."""
    a, b = Response((7, 8), 2), Response((9,), None)
    alone = TokenPair(row_id="s", index=90, prompt=(50, 51, 52), chosen=a, rejected=b)
    two = TokenPair(row_id="t", index=91, prompt=(*SYSTEM, 5), chosen=a, rejected=b, rejected_prompt=(*SYSTEM, 6))
    return [alone, two]


def model_of(family: str) -> Decoder:
    return random_model(next(row for row in ROWS if row.family == family))


def scorer_of(model: Decoder, attend, share: bool) -> PairScorer:
    run = ForwardPass(model, make_mesh("data=1"), Outputs(logps=True, token_scores=True), attend)
    run.shares_prefix &= share
    return PairScorer(run, Batching.of(128, 128, run, None), "include")


# ---- which prefix ----


def test_the_prefix_is_the_one_that_saves_most(small_steps):
    def saved(prefix) -> int:
        return len(prefix.tokens) * (len(prefix.members) - 1)

    rng = np.random.default_rng(1)
    for _ in range(30):
        prompts = [(*rng.integers(0, 2, rng.integers(1, 5)).repeat(8).tolist(), 5) for _ in range(6)]
        items = [Candidates((*p, 9), (Response((4,), 2), Response((6,), 2)), 1) for p in prompts]
        every = [sum(q[:n] == p[:n] for q in prompts if len(q) >= n) for p in prompts for n in range(0, len(p), 8)]
        lengths = [n for p in prompts for n in range(0, len(p), 8)]
        most = max((n - 1) * length for n, length in zip(every, lengths, strict=True))
        found = best_prefix(items)
        begin_so = {p[:n]: [q for q in prompts if q[:n] == p[:n]] for p in prompts for n in range(0, len(p), 8)}
        own = [sum(len(q) + 3 for q in group) for p, group in begin_so.items() if (len(group) - 1) * len(p) == most]
        if found is not None:
            assert saved(found) == most >= prefix_module.LEAST_SHARE * min(own)
            assert found.members == {i for i, p in enumerate(prompts) if p[: len(found.tokens)] == found.tokens}
        else:
            assert most < max(1, prefix_module.LEAST_SHARE * max(own))


def test_few_positions_are_not_worth_a_prefix():
    assert best_prefix(some_pairs()) is None and best_prefix(some_pairs(1)) is None and best_prefix([]) is None
    long = some_pairs(9, tuple(range(3, 403)))
    found = best_prefix(long)
    assert found is not None and len(found.tokens) == 384 and len(found.members) == 9
    assert best_prefix(long[:3]) is None, "2 x 384 positions are fewer than 1,024"


def test_a_prompt_that_is_all_prefix_keeps_its_last_token(small_steps):
    pairs = [
        p
        for p in some_pairs()
        for p in [TokenPair(row_id="", index=0, prompt=SYSTEM[:24], chosen=p.chosen, rejected=p.rejected)]
    ]
    found = best_prefix(pairs)
    assert found is not None and len(found.tokens) == 16
    assert all(len(item.prompt) == 8 for item in without(pairs, found))


def systems(count: int = 3, each: int = 6) -> list[TokenPair]:
    """Pairs behind one of several system prompts, in turns."""
    behind_each = [some_pairs(each, tuple(range(3 + k, 30 + k))) for k in range(count)]
    pairs = [pair for turn in zip(*behind_each, strict=True) for pair in turn]
    return [replace(p, row_id=str(i), index=i) for i, p in enumerate(pairs)]


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 20)), max_size=40), st.integers(0, 200))
def test_every_item_is_in_one_group_behind_what_it_begins_with(drawn, batch):
    prompts = [(*range(100 * kind, 100 * kind + 80), *range(1000, 1000 + n)) for kind, n in drawn]
    items = [Candidates(p, (Response((4,), 2), Response((6,), 2)), 1) for p in prompts]
    groups = by_prefix(items, batch)
    assert sorted(n for g in groups for n in g.numbers) == list(range(len(items)))
    assert all(g.prefix is not None and len(g.prefix.members) == len(g.items) for g in groups[:-1])
    for g in groups:
        assert g.items == [items[n] for n in g.numbers]
        if g.prefix is not None:
            size, members = len(g.prefix.tokens), [g.items[i] for i in g.prefix.members]
            assert size % prefix_module.STEP == 0
            assert all(item.prompt[:size] == g.prefix.tokens and len(item.prompt) > size for item in members)
            # batches of its own pay for themselves
            least = prefix_module.LEAST_BATCHES * batch if len(groups) > 1 and len(members) == len(g.items) else 0
            assert size * (len(members) - 1) >= max(prefix_module.LEAST_POSITIONS, least)
            assert 4 * size * (len(members) - 1) >= sum(packed_length(item) for item in g.items)


def test_each_of_several_beginnings_has_its_batches(small_steps):
    groups = by_prefix([*systems(), *strangers()], 8)
    assert [g.prefix and len(g.items) for g in groups] == [6, 6, 6, None]
    assert {n % 3 for g in groups[:1] for n in g.numbers} == {groups[0].numbers[0] % 3}
    one = by_prefix([*systems(), *strangers()], 1000)
    assert [g.prefix for g in one] == [None], "padding of batches of their own would be more"


def test_a_few_strangers_stay_among_those_that_begin_alike(small_steps):
    (group,) = by_prefix([*systems(1), *strangers()], 1000)
    assert group.prefix is not None and group.prefix.members == set(range(6)) and len(group.items) > 6


# ---- where keys lie ----


def test_every_position_sees_the_tokens_that_come_before_it(small_steps):
    pairs = [*some_pairs(), *strangers()]
    items, _ = group_by_prompt(pairs)
    found = best_prefix(items)
    assert found is not None and found.members == set(range(7))
    short = without(items, found)
    batches = list(pack(short, length=64, rows_per_batch=2, eos="include"))
    copies = most_copies(batches, found)
    seen = 0
    for rows, places in batches:
        rows = behind(rows, places, short, found, copies)
        tokens = np.concatenate([np.broadcast_to(found.tokens, (2, len(found.tokens))), rows.tokens], axis=1)
        assert rows.keys is not None and rows.own_end is not None
        key_tokens = np.take_along_axis(tokens, rows.keys, axis=1)
        whole = {
            (*prompt, *r.content) for p in pairs for prompt, r in zip(p.prompts, (p.chosen, p.rejected), strict=True)
        }
        for row, at in np.argwhere(rows.lengths > 0):
            ranges = (rows.context_start, rows.context_end), (rows.own_start, rows.own_end)
            sees = [t for a, b in ranges for t in key_tokens[row, a[row, at] : b[row, at]].tolist()]
            assert len(sees) == rows.positions[row, at] + 1 and sees[-1] == rows.tokens[row, at]
            assert any(list(w[: len(sees)]) == sees for w in whole)
            seen += 1
        padding = rows.lengths == 0
        assert ((rows.own_end - rows.own_start)[padding] == 1).all()
    assert seen == sum(int((rows.lengths > 0).sum()) for rows, _ in batches)


# ---- scores ----


@pytest.mark.parametrize(
    ("family", "attend", "kinds", "batches"), [("llama", blocks, 1, 10**6), ("mistral", dense, 3, 0)]
)
def test_scores_are_those_of_whole_rows(family, attend, kinds, batches, small_steps, monkeypatch, x64):
    """With strangers in the same batches, and with batches for each of three beginnings."""
    monkeypatch.setattr(prefix_module, "LEAST_BATCHES", batches)
    model, pairs = model_of(family), [*systems(kinds, 7), *strangers()]
    (a, tokens_a), (b, tokens_b) = (
        (scorer := scorer_of(model, attend, True))(pairs),
        scorer_of(model, attend, False)(pairs),
    )
    assert any(len(shape) == 5 for shape in scorer.run.shapes), "a prefix was used"
    for name, values in a.items():
        if isinstance(values[0], float):
            np.testing.assert_allclose(
                np.array(values, float), np.array(b[name], float), rtol=1e-9, atol=1e-9, err_msg=name
            )
    assert tokens_a is not None and tokens_b is not None and tokens_a["position"] == tokens_b["position"]
    np.testing.assert_allclose(tokens_a["ches"], tokens_b["ches"], rtol=1e-8, atol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("row", [pytest.param(row, id=row.family) for row in ROWS])
def test_scores_of_every_family_are_those_of_whole_rows(row, small_steps, monkeypatch, x64):
    monkeypatch.setattr(prefix_module, "LEAST_BATCHES", 0)
    model, pairs = random_model(row), [*systems(2, 5), *strangers()]
    a, b = (scorer_of(model, blocks, share)(pairs)[0] for share in (True, False))
    for name in ("inner", "sqnorm_chosen", "sqnorm_rejected", "last_hidden_inner", "logp_chosen", "logp_rejected"):
        np.testing.assert_allclose(a[name], b[name], rtol=1e-9, atol=1e-9, err_msg=name)


def test_where_layers_keep_more_than_keys_nothing_is_shared():
    def config(family, **changes):
        row = next(row for row in ROWS if row.family == family)
        return decoder_config({"model_type": family, **row.base, **changes})

    assert _may_share_prefix(config("llama"), blocks) and _may_share_prefix(config("deepseek_v3"), dense)
    assert not _may_share_prefix(config("lfm2"), blocks) and not _may_share_prefix(config("qwen3_5_text"), blocks)
    assert not _may_share_prefix(config("llama", **ROPES["dynamic"]), blocks), "keys depend on the sequence's length"
    assert not _may_share_prefix(config("llama"), query_chunked), "it takes as many queries as keys"


def test_positions_fall_and_are_counted(small_steps, x64):
    model, pairs = model_of("llama"), some_pairs(10)
    shared, whole = (scorer_of(model, blocks, share) for share in (True, False))
    for scorer in (shared, whole):
        scorer(pairs)
    a, b = shared.facts(), whole.facts()
    assert a["shared_positions"] - b["shared_positions"] == 9 * 24
    assert a["positions"] < b["positions"]
    assert jax.config.read("jax_enable_x64")
