"""Scores and log-probabilities against exact float64 arithmetic on real text, from every spelling of the config."""

import json
import shutil
from collections import defaultdict
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ches_jax.models.checkpoint.load import load_model
from ches_jax.models.decoder import Decoder
from ches_jax.models.families.registry import decoder_config
from tests.golden import EARLIER, GOLDEN, MULTIMODAL, WITH_A_STATE

FAMILIES = (*EARLIER, *WITH_A_STATE, *MULTIMODAL)
"""The newer ones are compared on all pairs only, when the slow tests run; a row in ``rows.py`` compares each with
transformers."""
FLOAT32 = {"qwen3_5": 1e-4, "qwen3_5_multimodal": 1e-4, "gemma4": 1e-4}
"""Families whose float32 in transformers is further from float64 than that of the others."""
FLOAT32_SUMS: dict[str, float] = dict.fromkeys(("qwen3_5", "qwen3_5_multimodal"), 2e-4)
"""Of the largest component of a sum of states: 1.2e-4 over all pairs, and 1.4e-4 in the float32 of transformers (eager,
one sequence at a time; its worst pair is 8, the rejected response). Scores are 1.6e-5 here, and 1.4e-5 there."""
SPELLINGS = ("config.v4.json", "config.min.json")
LENGTH = 512
"""Every sequence is padded to this, so that a model compiles once."""


@cache
def reference(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "golden.json").read_text())


@nnx.jit
def states_and_log_probs(model: Decoder, ids: Any, n: Any) -> tuple[Any, Any]:
    """Hidden states, and at each position the log-probability of the next token."""
    mask = (jnp.arange(LENGTH, dtype=jnp.int32) < n)[None]
    hidden = model.hidden(ids[None], mask=mask)[0]
    log_probs = jax.nn.log_softmax(model.logits(hidden))
    return hidden, jnp.take_along_axis(log_probs[:-1], ids[1:, None], axis=1)[:, 0]


class Read(NamedTuple):
    """Of one response: sums of the states that predict it, without and with its terminator, and its log-probability."""

    sums: np.ndarray
    closed: np.ndarray
    log_prob: float


def read(model: Decoder, prompt: list[int], response: list[int]) -> Read:
    """A response after its prompt, alone in a row. Whatever ends it is predicted by the state of its last token."""
    ids = np.zeros(LENGTH, np.int32)
    first, last = len(prompt) - 1, len(prompt) + len(response) - 1
    ids[: last + 1] = prompt + response
    hidden, log_probs = states_and_log_probs(model, jnp.asarray(ids), jnp.int32(last + 1))
    states = np.asarray(hidden[first : last + 1], np.float64)
    return Read(states[:-1].sum(0), states.sum(0), float(np.asarray(log_probs[first:last], np.float64).sum()))


def scores(sums: dict[str, np.ndarray], sizes: dict[str, int]) -> tuple[float, float]:
    """CHES and its length-normalised form, from their definitions."""
    chosen, rejected = sums["chosen"], sums["rejected"]
    n, m = sizes["chosen"], sizes["rejected"]
    return float(chosen @ rejected - chosen @ chosen), float(chosen @ rejected / (n * m) - chosen @ chosen / n**2)


def compare(folder: Path, dtype: str, pairs: range) -> dict[str, float]:
    """Largest error of each quantity: scores by |S+|^2 (they are differences that can vanish), the rest relative."""
    golden = reference(folder)
    truth = golden["fp64"]["policy"]
    model = load_model(folder / "policy", dtype=dtype)
    worst: dict[str, float] = defaultdict(float)

    def note(name: str, actual: Any, expected: Any, unit: Any = None) -> None:
        error = np.abs(np.asarray(actual) - expected).max() / np.abs(expected if unit is None else unit).max()
        worst[name] = max(worst[name], float(error))

    for i in pairs:
        pair = golden["pairs"][i]
        sizes = {side: len(pair[f"{side}_ids"]) for side in ("chosen", "rejected")}
        made = {side: read(model, pair["prompt_ids"], pair[f"{side}_ids"]) for side in sizes}
        for side, one in made.items():
            note("sum_hidden", one.sums, np.asarray(truth[f"sum_hidden_{side}"][i]))
            note("logp", one.log_prob, truth[f"logp_{side}"][i])
            note("sqnorm", one.sums @ one.sums, truth[f"sqnorm_{side}"][i])
        # the script appends the terminator to each response
        for eos, name, more in ((False, "", 0), (True, "script_", 1)):
            sums = {side: one.closed if eos else one.sums for side, one in made.items()}
            ches, ln_ches = scores(sums, {side: n + more for side, n in sizes.items()})
            norm = sums["chosen"] @ sums["chosen"]
            note(f"{name}ches", ches, truth[f"{name}ches"][i], norm)
            note(f"{name}ln_ches", ln_ches, truth[f"{name}ln_ches"][i], norm / (sizes["chosen"] + more) ** 2)
    return dict(worst)


def compare_reference(folder: Path, dtype: str, pairs: range) -> float:
    """Largest relative error of the log-probabilities of the reference model."""
    golden = reference(folder)
    model = load_model(folder / "ref", dtype=dtype)
    worst = 0.0
    for i in pairs:
        for side in ("chosen", "rejected"):
            pair, expected = golden["pairs"][i], golden["fp64"]["ref"][f"logp_{side}"][i]
            actual = read(model, pair["prompt_ids"], pair[f"{side}_ids"]).log_prob
            worst = max(worst, abs(actual - expected) / abs(expected))
    return worst


@pytest.mark.parametrize("family", FAMILIES)
def test_float64_is_exact(golden: Path, family: str):
    with jax.enable_x64(True):
        errors = compare(golden / family, "float64", range(3))
    assert max(errors.values()) < 1e-12, errors


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_float32_is_close(golden: Path, family: str):
    errors = compare(golden / family, "float32", range(3))
    assert max(errors.values()) < FLOAT32.get(family, 2e-6), errors


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-12), ("float32", 5e-6)])
@pytest.mark.parametrize("family", GOLDEN)
def test_all_pairs(golden: Path, family: str, dtype: str, tolerance: float):
    with jax.enable_x64(dtype == "float64"):
        errors = compare(golden / family, dtype, range(24))
        errors["reference"] = compare_reference(golden / family, dtype, range(24))
    print(family, dtype, {k: f"{v:.1e}" for k, v in errors.items()})
    bound = FLOAT32.get(family, tolerance) if dtype == "float32" else tolerance
    sums = errors.pop("sum_hidden")
    assert sums < (FLOAT32_SUMS.get(family, bound) if dtype == "float32" else bound), sums
    assert max(errors.values()) < bound, errors


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_spelling_of_the_config_says_the_same(golden: Path, family: str, spelling: str):
    policy = golden / family / "policy"
    if not (policy / spelling).exists():
        pytest.skip(f"{family} has no {spelling}")
    written = [json.loads((policy / name).read_text()) for name in ("config.json", spelling)]
    assert decoder_config(written[0]) == decoder_config(written[1])


def test_an_older_spelling_loads(golden: Path, tmp_path: Path):
    """The spellings describe equal decoders (above), so one directory stands for all."""
    policy = golden / "gpt_neox" / "policy"
    shutil.copy(policy / "model.safetensors", tmp_path)
    shutil.copy(policy / "config.v4.json", tmp_path / "config.json")
    assert load_model(tmp_path).config == load_model(policy).config
