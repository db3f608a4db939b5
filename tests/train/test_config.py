"""The config is plain data: fields that anyone may read without loading what they configure."""

import subprocess
import sys

import pytest

from ches_jax.errors import ChesError
from ches_jax.train import TrainConfig
from ches_jax.train.setup import prepare

HEAVY = ("jax", "jaxlib", "optax", "orbax", "flax", "transformers", "pyarrow", "datasets", "torch")


@pytest.mark.parametrize(
    "line", ["from ches_jax.train.config import TrainConfig", "from ches_jax.train import TrainConfig"]
)
def test_the_config_loads_nothing_heavy(line):
    code = f"import sys; {line}; print(*(m for m in {HEAVY} if m in sys.modules))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not loaded


def test_the_face_of_the_package_is_lazy():
    import ches_jax.train as face
    from ches_jax.train import loop, train

    assert train is loop.train and "train" in face.__all__
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = face.nothing


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "int8"}, "--dtype 'int8': expected one of float32, bfloat16"),
        ({"schedule": "step"}, "schedule is one of constant, linear, cosine, not 'step'"),
        ({"eval_every": 0}, "--eval-every 0: expected a positive number"),
        ({"watch": -1}, "--watch -1: expected 0 or more"),
        ({"seed": -1}, "--seed -1: expected 0 or more"),
        ({"lora_alpha": 8.0}, "--lora-alpha: belongs to --lora-rank"),
        ({"adapter": "somewhere", "lora_rank": 4}, "an adapter brings its own rank"),
        ({"rewards": "one", "loss": "rebel"}, "expected the names of two columns"),
        ({"rewards": "a,b"}, "loss 'dpo' reads no rewards"),
        ({"keep_best": "eval_loss"}, "no pairs are held out"),
        ({"eval_pairs": "file.jsonl", "holdout": 2}, "give one of them"),
    ],
)
def test_options_that_no_run_could_have_are_refused_before_anything_is_read(options, message):
    with pytest.raises(ChesError, match=message):
        prepare(TrainConfig(model="/nowhere", out="/nowhere", **options))
