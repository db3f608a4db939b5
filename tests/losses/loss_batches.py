"""Random batches that any registered loss can read."""

from typing import Any

import jax.numpy as jnp
import numpy as np

from ches_jax.losses import LossInputs, RunningMean

PAIRS, WIDTH, CANDIDATES = 4, 5, 3


def make_batch(seed: int = 0, dtype: Any = np.float32, spread: float = 2.0) -> Any:
    """Every field filled. Log-probabilities are those of a policy ``spread`` nats from its reference."""
    rng = np.random.default_rng(seed)

    def near(base):
        return jnp.asarray(base + rng.normal(0, spread, base.shape), dtype)

    counts = [rng.integers(1, WIDTH + 1, PAIRS) for _ in range(2)]
    masks = [(np.arange(WIDTH) < n[:, None]).astype(np.int32) for n in counts]
    ref = -rng.uniform(15, 30, (2, PAIRS))
    ref_tokens = -rng.uniform(0.1, 3, (2, PAIRS, WIDTH))
    tokens = [jnp.asarray(-np.abs(t + rng.normal(0, 0.3, t.shape)) - 0.01, dtype) for t in ref_tokens]
    candidates = -rng.uniform(15, 30, (PAIRS, CANDIDATES))
    rewards = rng.uniform(0, 1, (2, PAIRS))
    own = np.random.default_rng(seed + 1000)  # apart, so that the fields above stay what they were
    chosen, rejected = near(ref[0]), near(ref[1])
    lists = -own.uniform(15, 30, (PAIRS, CANDIDATES))
    return LossInputs(
        logp_responses=jnp.asarray(lists + own.normal(0, spread, lists.shape), dtype),
        ref_logp_responses=jnp.asarray(lists, dtype),
        scores=jnp.asarray(-np.sort(-own.uniform(0, 1, lists.shape)), dtype),
        response_mask=jnp.ones(lists.shape, dtype),
        response_tokens=jnp.asarray(own.integers(1, WIDTH + 1, lists.shape), jnp.int32),
        logp_chosen=chosen,
        logp_rejected=rejected,
        ref_logp_chosen=jnp.asarray(ref[0], dtype),
        ref_logp_rejected=jnp.asarray(ref[1], dtype),
        chosen_tokens=jnp.asarray(counts[0], jnp.int32),
        rejected_tokens=jnp.asarray(counts[1], jnp.int32),
        rewards_chosen=jnp.asarray(rewards[0] + 1, dtype),
        rewards_rejected=jnp.asarray(rewards[1], dtype),
        reward_mean=RunningMean(jnp.zeros((), dtype), jnp.zeros((), dtype)),
        log_delta=jnp.asarray(0.3, dtype),
        label_prior=jnp.asarray(0.8, dtype),
        label_probability=jnp.asarray(own.uniform(0, 1, PAIRS), dtype),
        head_norm_chosen=jnp.asarray(4.0, dtype),
        head_norm_rejected=jnp.asarray(2.0, dtype),
        logp_joint_chosen=chosen - 7.0,
        logp_joint_rejected=rejected - 5.0,
        ref_logp_joint_chosen=jnp.asarray(ref[0] - 7.0, dtype),
        ref_logp_joint_rejected=jnp.asarray(ref[1] - 6.0, dtype),
        logp=chosen,
        ref_logp=jnp.asarray(ref[0], dtype),
        desirable=jnp.array([True, False, False, True]),
        kl_baseline=jnp.asarray(0.5, dtype),
        logp_candidates=near(candidates),
        ref_logp_candidates=jnp.asarray(candidates, dtype),
        token_logps_chosen=tokens[0],
        token_logps_rejected=tokens[1],
        ref_token_logps_chosen=jnp.asarray(ref_tokens[0], dtype),
        ref_token_logps_rejected=jnp.asarray(ref_tokens[1], dtype),
        token_mask_chosen=jnp.asarray(masks[0]),
        token_mask_rejected=jnp.asarray(masks[1]),
        span_mask_chosen=jnp.asarray(own.integers(0, 2, (PAIRS, WIDTH)), jnp.int32),
        span_mask_rejected=jnp.asarray(own.integers(0, 2, (PAIRS, WIDTH)), jnp.int32),
        token_weights_chosen=jnp.asarray(rng.uniform(0, 1, (PAIRS, WIDTH)), dtype),
        token_weights_rejected=jnp.asarray(rng.uniform(0, 1, (PAIRS, WIDTH)), dtype),
        token_kl_chosen=jnp.asarray(rng.uniform(0, 1, (PAIRS, WIDTH)), dtype),
        token_kl_rejected=jnp.asarray(rng.uniform(0, 1, (PAIRS, WIDTH)), dtype),
        **{
            f"{name}_mask_{side}": jnp.asarray(rng.uniform(0, 1, (PAIRS, WIDTH)), dtype)
            for name in ("reward", "kl", "activation")
            for side in ("chosen", "rejected")
        },
    )


def pair(logp_chosen, logp_rejected, ref_chosen=0.0, ref_rejected=0.0, **more) -> Any:
    """One pair from plain numbers."""
    columns: dict[str, Any] = {
        "logp_chosen": logp_chosen,
        "logp_rejected": logp_rejected,
        "ref_logp_chosen": ref_chosen,
        "ref_logp_rejected": ref_rejected,
        **more,
    }
    fields: dict[str, Any] = {k: jnp.asarray([v], jnp.result_type(float)) for k, v in columns.items()}
    return LossInputs(**fields)
