"""The likelihood term of another set beside the pairs of an update."""

import json

import numpy as np
import pytest

from ches_jax import bundled
from ches_jax.errors import ChesError
from ches_jax.runs.work import Positions
from ches_jax.train.assemble import assemble
from ches_jax.train.loop import train
from ches_jax.train.setup import prepare


@pytest.fixture
def rows(tmp_path):
    lines = bundled.pairs_file().read_text().splitlines()[30:33]
    path = tmp_path / "sft.jsonl"
    texts = [json.loads(line) for line in lines]
    path.write_text("".join(json.dumps({"prompt": t["prompt"], "completion": t["chosen"]}) + "\n" for t in texts))
    return str(path)


def test_each_update_takes_rows_of_the_other_set(small, rows, tmp_path):
    (tmp_path / "run").mkdir()
    run = prepare(small(tmp_path / "run", limit=8, holdout=0, sft=0.5, sft_pairs=rows, probes="none"))
    assert repr(run.loss) == "dpo(beta=0.1)" and run.sft is not None and len(run.sft) == 3
    loader = assemble(run, tmp_path / "run").loader
    for update in range(2):
        (batch,) = loader(update)
        assert batch.sft is not None and batch.sft.counts.shape == (3, 2) and not batch.sft.counts[:, 1].any()
        assert batch.sft.counts[:, 0].sum() == sum(len(p.chosen.targets("include")) for p in run.sft.pairs)
    both, apart, sft = Positions(), Positions(), loader.sft
    loader.count(0, loader(0), both)
    assert sft is not None
    loader.sft = None
    for one in (loader, sft):
        one.count(0, one(0), apart)
    assert both == apart and both.used > sum(len(p.prompt) + len(p.chosen.content) for p in run.sft.pairs)


@pytest.mark.slow
def test_the_gradient_is_that_of_both_terms(small, rows, tmp_path):
    """With plain SGD: one step on the sum is a step on the pairs and one on the other set, from the same start."""
    options = {"limit": 8, "holdout": 0, "batch_size": 8, "steps": 1, "optimizer": "sgd", "lr": 1e-2, "probes": "none"}
    options |= {"dtype": "float64", "watch": 8}
    both = train(small(tmp_path / "both", sft=0.5, sft_per="sum", sft_pairs=rows, **options), quiet=True)
    alone = train(small(tmp_path / "alone", **options), quiet=True)
    sft = {**options, "pairs": rows, "loss": "sft_sum", "lr": 0.5e-2, "limit": None}
    other = train(small(tmp_path / "other", **sft), quiet=True)
    from safetensors.numpy import load_file

    from ches_jax.hf.directory import resolve

    model = small(tmp_path / "none").model
    start, a, b, c = (
        load_file(next(resolve(d).glob("*.safetensors")))
        for d in (model, both / "model", alone / "model", other / "model")
    )
    moved = 0.0
    for name, value in start.items():
        sum_of_steps = (b[name] - value) + (c[name] - value)
        # the weights are written in float32, so that a step is known to their rounding
        rounding = 4 * np.finfo(np.float32).eps * np.abs(value).max()
        np.testing.assert_allclose(a[name] - value, sum_of_steps, rtol=1e-4, atol=rounding)
        moved = max(moved, np.abs(c[name] - value).max() / rounding)
    assert moved > 1e3


@pytest.mark.parametrize(
    ("options", "message"),
    [({"sft": 0.0}, "give the coefficient"), ({"sft": 0.1, "accumulate": 2}, "would be cut apart")],
)
def test_what_does_not_go_together_is_refused(small, tmp_path, options, message):
    with pytest.raises(ChesError, match=message):
        prepare(small(tmp_path / "run", sft_pairs="s.jsonl", **options))
