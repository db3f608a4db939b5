"""The reference beside the policy: divergences and masks of tokens, against sequences computed one by one."""

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from ches_jax.errors import ChesError
from ches_jax.losses import get_loss, parse_loss
from ches_jax.models.attention.mask import causal
from ches_jax.models.checkpoint.load import load_model, with_parameters
from ches_jax.models.config import LayerKind
from ches_jax.models.decoder import abstract_decoder, named_parameters
from ches_jax.models.logprobs import Head, token_divergences
from ches_jax.models.stacks import layer_groups, layers_of
from ches_jax.train.assemble import assemble
from ches_jax.train.batch_loss import batch_loss
from ches_jax.train.beside import Beside
from ches_jax.train.data.batches import Layout, make_batch, standard_row
from ches_jax.train.loop import train
from ches_jax.train.setup import prepare
from ches_jax.train.token_masks import TOKEN_MASKS, activation_masks, initial_masks, is_mask, learned_kinds
from ches_jax.types import Response, TokenPair

PAIRS = [
    TokenPair(row_id="a", index=0, prompt=(5, 6, 7), chosen=Response((8, 9, 10), 2), rejected=Response((8, 11), 2)),
    TokenPair(
        row_id="b", index=1, prompt=(12, 13), chosen=Response((14,), 2), rejected=Response((15, 16, 17, 18), None)
    ),
]
BOTH = "sparsepo(l1_reward=0.01) + 0.5*mapo"


def test_divergences_are_of_the_reference_from_the_policy(x64):
    rng = np.random.default_rng(0)
    h, r, w, v = (jnp.asarray(rng.normal(size=s)) for s in ((2, 5, 3), (2, 5, 4), (7, 3), (7, 4)))
    head, ref_head = Head(chunk=2, softcap=3.0), Head(chunk=5, scale=0.5)

    def direct(h, w):
        p, ref = jax.nn.log_softmax(3 * jnp.tanh(h @ w.T / 3)), jax.nn.log_softmax(0.5 * r @ v.T)
        return jnp.sum(jnp.exp(ref) * (ref - p), -1)

    weights = jnp.asarray(rng.normal(size=(2, 5)))

    @jax.jit
    def both(h, w):
        own = jax.value_and_grad(lambda h, w: jnp.sum(weights * token_divergences(h, w, head, r, v, ref_head)), (0, 1))
        return own(h, w), jax.value_and_grad(lambda *a: jnp.sum(weights * direct(*a)), (0, 1))(h, w)

    (own, slopes), (expected, expected_slopes) = both(h, w)
    np.testing.assert_allclose(own, expected, rtol=1e-12)
    for a, b in zip(slopes, expected_slopes, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12)


def test_the_stream_is_tapped_behind_each_layer_in_order(tiny_model):
    """Only one layer does anything: the stream changes there and nowhere else, whatever the stacks."""
    wide, narrow = LayerKind(), LayerKind(mlp_width=8)
    kinds = (wide, narrow, narrow, wide, narrow, narrow, wide)
    config = replace(load_model(tiny_model).config, num_layers=7, layer_kinds=kinds, windows=(None,) * 7)
    assert max(group.repeats for group in layer_groups(config)) > 1 and len(layer_groups(config)) > 1
    abstract, rng = abstract_decoder(config), np.random.default_rng(0)
    params = {k: rng.normal(size=v.shape).astype("float32") for k, v in named_parameters(abstract).items()}
    tokens = jnp.array([[5, 6, 7, 8]])
    places = jnp.arange(4)[None]

    @jax.jit
    def run(params):
        one = with_parameters(abstract, params)
        seen = causal(jnp.ones((1, 4), bool))
        return one.hidden_and_layers(tokens, places, seen, jnp.full((1, 4), 4), lambda x: x)

    for active in (1, 3, 5):
        only = {}
        for name, value in params.items():
            layers = layers_of(config, name)
            keep = np.array([layer == active for layer in layers]).reshape(-1, *[1] * (value.ndim - 1))
            only[name] = np.where(keep, value, 0) if layers and "norm" not in name else value
        hidden, layers = map(np.asarray, run(only))
        changed = [bool(np.any(layers[i] != layers[i - 1])) for i in range(1, 7)]
        assert changed == [i == active for i in range(1, 7)]
        rms = layers[-1] / np.sqrt(np.mean(layers[-1] ** 2, -1, keepdims=True) + config.norm_eps) * only["norm.weight"]
        np.testing.assert_allclose(rms, hidden, rtol=2e-5)


def beside_of(tiny_model):
    """A policy some way from its reference, random masks, one packed batch."""
    reference = load_model(tiny_model, dtype="float64", param_dtype="float64")
    rng = np.random.default_rng(1)
    params = {k: v + 0.05 * rng.normal(size=v.shape) for k, v in named_parameters(reference).items()}
    abstract = abstract_decoder(reference.config, dtype=jnp.float64, param_dtype=jnp.float64)
    masks = initial_masks(("reward", "kl"), 2, 24, [0, 5])
    layout = Layout(standard_row(PAIRS, None), 1, "include", None, response_tokens=4)
    batch = make_batch(PAIRS, layout, [[np.zeros(4), np.zeros(2)], [np.zeros(3), np.zeros(4)]], dtype=np.float64)
    return reference, abstract, params, masks, jax.tree.map(jnp.asarray, batch)


def mask_by_hand(masks, kind, states):
    """One token at a time, in numpy; states [layers, T, D]."""
    at = {k.removeprefix(f"token_masks.{kind}."): np.asarray(v) for k, v in masks.items()}
    total = 0.0
    for i, h in enumerate(states):
        z = (h - h.mean(-1, keepdims=True)) / np.sqrt(h.var(-1, keepdims=True) + 1e-5)
        value = (z * at["norm.weight"] + at["norm.bias"]) @ at["probe.weight"][i] + at["probe.bias"][i]
        total = total + at["mixer.weight"][i] * np.maximum(value, 0)
    return np.maximum(total, 0)


def test_packed_rows_give_the_loss_of_sequences_one_by_one(tiny_model, x64):
    reference, abstract, params, masks, batch = beside_of(tiny_model)
    policy = with_parameters(abstract, params)
    loss = parse_loss(BOTH)
    value, (metrics, _) = jax.jit(
        lambda at: batch_loss(with_parameters(abstract, at), loss, batch, {}, beside=Beside(reference, masks))
    )(params)

    @jax.jit
    def states_of(model, tokens):
        """Log-probabilities of all tokens, and the stream behind each layer, of sequences padded behind."""
        places = jnp.arange(tokens.shape[1])[None]
        seen = causal(jnp.ones(tokens.shape, bool))
        hidden, layers = model.hidden_and_layers(tokens, places, seen, places * 0 + tokens.shape[1], lambda x: x)
        return jax.nn.log_softmax(model.logits(hidden)), layers

    expected = []
    for pair in PAIRS:
        sides = {}
        for side, response in (("chosen", pair.chosen), ("rejected", pair.rejected)):
            targets, prompt = response.targets("include"), len(pair.prompt)
            whole = (*pair.prompt, *response.content)
            tokens = jnp.array([[*whole, *[0] * (8 - len(whole))]])
            at = slice(prompt - 1, prompt - 1 + len(targets))
            (now, _), (ref, layers) = states_of(policy, tokens), states_of(reference, tokens)
            now, ref, states = np.asarray(now)[0, at], np.asarray(ref)[0, at], np.asarray(layers)[:, 0, at]
            activation = states.mean(-1)
            span = np.ptp(activation, axis=-1, keepdims=True)
            sides[side] = {
                # the reference's own log-probabilities are zeros of the batch here
                "ratio": now[np.arange(len(targets)), list(targets)],
                "kl": np.sum(np.exp(ref) * (ref - now), -1),
                "reward": mask_by_hand({k: v for k, v in masks.items() if ".reward." in k}, "reward", states),
                "mask_kl": mask_by_hand({k: v for k, v in masks.items() if ".kl." in k}, "kl", states),
                "activation": np.mean((activation - activation.min(-1, keepdims=True)) / span, axis=0),
            }
        w, r = sides["chosen"], sides["rejected"]
        u = np.sum(w["reward"] * w["ratio"]) - np.sum(r["reward"] * r["ratio"])
        d = np.sum(r["mask_kl"] * r["kl"]) - np.sum(w["mask_kl"] * w["kl"])
        sparse = np.log1p(np.exp(-0.1 * (u - d))) + 0.01 * (w["reward"].sum() + r["reward"].sum())
        of_both = [np.sum(s["activation"] * (s["ratio"] + s["kl"])) for s in (w, r)]
        expected.append(sparse + 0.5 * np.log1p(np.exp(-0.1 * (of_both[0] - of_both[1]))))
    np.testing.assert_allclose(value, np.mean(expected), rtol=1e-9)
    assert 0 <= float(metrics["sparsity/reward_chosen"]) <= 1


@pytest.mark.slow
def test_gradients_reach_policy_and_masks(tiny_model, x64):
    reference, abstract, params, masks, batch = beside_of(tiny_model)
    loss = get_loss("sparsepo", beta=0.3, l1_reward=0.01, l1_kl=0.02)
    every = {**params, **{k: jnp.asarray(v) for k, v in masks.items()}}

    @jax.jit
    def total(at):
        return batch_loss(with_parameters(abstract, at), loss, batch, {}, beside=Beside(reference, at))[0]

    slopes = jax.jit(jax.grad(total))(every)
    rng = np.random.default_rng(2)
    for part in (is_mask, lambda name: not is_mask(name)):
        along = {k: jnp.asarray(rng.normal(size=v.shape) * float(part(k))) for k, v in every.items()}
        moved = [total({k: v + sign * 1e-6 * along[k] for k, v in every.items()}) for sign in (1, -1)]
        slope = sum(float(jnp.sum(slopes[k] * along[k])) for k in every)
        np.testing.assert_allclose(slope, float(moved[0] - moved[1]) / 2e-6, rtol=1e-5)
    assert all(np.any(np.asarray(slopes[k])) for k in masks)


def test_a_response_with_one_activation_counts_whole():
    means = jnp.array([[[2.0, 0.0]], [[5.0, 0.0]]])
    assert activation_masks(means, jnp.array([[1, 0]])).tolist() == [[1.0, 0.0]]


def test_what_a_loss_learns():
    kinds = {name: learned_kinds(get_loss(name)) for name in ("dpo", "tdpo", "mapo", "sparsepo", "sparsepo_common")}
    assert kinds == {"dpo": (), "tdpo": (), "mapo": (), "sparsepo": ("reward", "kl"), "sparsepo_common": ("reward",)}


@pytest.mark.slow
def test_under_lora_the_base_is_shared_and_the_run_learns_its_masks(small, tmp_path):
    config = small(tmp_path / "run", loss=BOTH, lora_rank=2, steps=2, lr=1e-2, probes="none")
    (tmp_path / "parts").mkdir()
    run = prepare(replace(config, out=str(tmp_path / "parts")))
    parts = assemble(run, tmp_path / "parts")
    frozen = parts.update._frozen
    assert all(frozen.reference[name] is array for name, array in frozen.policy.items())
    train(config, quiet=True)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    updates = [line for line in lines if "grad_norm" in line]
    # the policy starts as the reference
    assert abs(updates[0]["token_kl/chosen"]) < 1e-5 < updates[1]["token_kl/chosen"]
    assert {"sparsity/reward_chosen", "sparsity/kl_rejected", "mask/reward_rejected"} <= updates[1].keys()
    assert any("eval_loss" in line and "eval_token_kl/chosen" in line for line in lines)
    masks = load_file(tmp_path / "run" / TOKEN_MASKS)
    start = initial_masks(("reward", "kl"), 2, 24, [config.seed, 5])
    assert {f"token_masks.{name}" for name in masks} == start.keys()
    assert all(np.any(value != start[f"token_masks.{name}"].astype(np.float32)) for name, value in masks.items())


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["sparsepo", "sparsepo_common", "mapo", "tdpo2"])
def test_a_run_in_micro_batches_or_resumed_is_the_same_run(small, tiny_model, tmp_path, loss):
    """In full training, from another reference, cut and resumed."""
    # RMSprop's first update is a sign: where a gradient is 0 up to rounding, 0.0004 nats were seen to differ
    options = {
        "loss": loss,
        "steps": 2,
        "reference": str(tiny_model),
        "export": False,
        "probes": "none",
        "optimizer": "sgd",
        "lr": 1e-2,
    }
    whole = train(small(tmp_path / "whole", save_every=1, **options), quiet=True)
    parts = train(small(tmp_path / "parts", accumulate=2, **options), quiet=True)
    logs = [[json.loads(x) for x in (p / "metrics.jsonl").read_text().splitlines()] for p in (whole, parts)]
    for a, b in zip(*logs, strict=True):
        assert a.keys() == b.keys()
        # before the first update the policy is the reference: rewards are 0 up to 1e-8, which is larger is rounding
        names = [k for k in a if not (a["step"] < 2 and k.endswith("rewards/accuracies"))]
        np.testing.assert_allclose([a[k] for k in names], [b[k] for k in names], rtol=2e-3, atol=2e-4)


def test_a_reference_without_states_is_refused(small, tmp_path):
    with pytest.raises(ChesError, match="reads the states of the reference model too"):
        prepare(small(tmp_path / "run", loss="mapo", reference="cache.parquet"))


@pytest.mark.slow
def test_one_program_whatever_the_expression(small, tmp_path):
    """Nine terms of wrappers, rules, masks and a state are one gradient and one update in one program."""
    (tmp_path / "run").mkdir()
    terms = "wpo(dpo) + gate(ipo_sum) + smooth(simpo) + confpo + ld_dpo + tdpo + sparsepo + bco_pair + 0.1*sft"
    run = prepare(
        small(tmp_path / "run", loss=terms, lora_rank=1, steps=2, limit=10, holdout=0, watch=2, probes="none")
    )
    parts = assemble(run, tmp_path / "run")
    state, _ = parts.update(parts.take_state(), parts.loader(0))
    state, metrics = parts.update(state, parts.loader(1))
    assert {"terms/wpo", "terms/sparsepo", "terms/sft"} <= metrics.keys()
    programs = {name: one for name, one in vars(parts.update).items() if hasattr(one, "_cache_size")}
    assert {name: one._cache_size() for name, one in programs.items() if one._cache_size()} == {"_whole": 1}
