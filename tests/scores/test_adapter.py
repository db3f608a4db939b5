"""Scores of a model with an adapter are those of the merged model."""

import numpy as np
import pytest

from ches_jax.cli import main
from ches_jax.hf.directory import read_config
from ches_jax.models.adapters.lora import adapted, adapter_shapes, make_spec
from ches_jax.models.adapters.peft import write_adapter
from ches_jax.models.decoder import abstract_decoder
from ches_jax.models.families.registry import decoder_config
from ches_jax.runs.directory import read_json
from ches_jax.scores.config import ScoreConfig
from ches_jax.scores.run import score
from ches_jax.scores.table import read_table


@pytest.fixture(scope="module")
def adapter(tiny_model, tmp_path_factory):
    config = decoder_config(read_config(tiny_model))
    spec = make_spec(2, 4.0, "all-linear", config)
    rng = np.random.default_rng(0)
    shapes = adapter_shapes(adapted(abstract_decoder(config), spec))
    arrays = {n: (0.2 * rng.normal(size=s.shape)).astype(np.float32) for n, s in shapes.items()}
    out = tmp_path_factory.mktemp("peft") / "adapter"
    write_adapter(out, arrays, spec, tiny_model)
    return out


def test_an_adapter_is_scored_as_the_merged_model(tiny_model, adapter, tmp_path, capsys):
    merged = tmp_path / "model"
    words = ["--model", str(tiny_model), "--adapter", str(adapter), "--dtype", "float64", "--out", str(merged)]
    assert main(["convert", *words]) == 0 and capsys.readouterr().out == f"{merged}\n"
    runs = {}
    for name, model, peft, mesh in [
        ("beside", tiny_model, str(adapter), "data=1,fsdp=2"),
        ("merged", merged, None, "data=1"),
        ("base", tiny_model, None, "data=1"),
    ]:
        config = ScoreConfig(
            model=str(model), adapter=peft, mesh=mesh, limit=12, logps=True, dtype="float64", out=str(tmp_path / name)
        )
        runs[name] = score(config, quiet=True)
    tables = {name: read_table(out)[0].to_pydict() for name, out in runs.items()}
    for column in ("inner", "sqnorm_chosen", "logp_chosen", "logp_rejected"):
        beside, joined, plain = (np.array(tables[n][column]) for n in ("beside", "merged", "base"))
        np.testing.assert_allclose(beside, joined, rtol=1e-9, err_msg=column)
        assert np.abs(plain / joined - 1).max() > 0.01, column
    assert read_json(runs["beside"] / "config.json")["adapter_fingerprint"]
