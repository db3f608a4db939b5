"""Configs in Python: a word that a field does not know is one message, in every config."""

import dataclasses
from pathlib import Path
from typing import Any, get_type_hints

import numpy as np
import pytest

from ches_jax.cli import commands
from ches_jax.errors import ChesError
from ches_jax.options import Options, _renamed, _words
from ches_jax.train.config import TrainConfig

CONFIGS = sorted(
    {
        base
        for command in vars(commands).values()
        if isinstance(command, type) and dataclasses.is_dataclass(command)
        for base in command.__mro__
        if base.__name__.endswith("Config")
    },
    key=lambda config: config.__name__,
)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.__name__)
def test_every_config_checks_its_words(config: type):
    assert issubclass(config, Options) and config.__post_init__ is Options.__post_init__
    required = {
        f.name: "x" for f in dataclasses.fields(config) if f.default is f.default_factory is dataclasses.MISSING
    }
    words = {name: hint for name, hint in get_type_hints(config).items() if _words(hint)}
    right = required | {name: _words(hint)[0] for name, hint in words.items() if name in required}
    config(**right)
    for name in words:
        with pytest.raises(ChesError, match=rf"{config.__name__}: {name} is one of .*, not 'no such word'"):
            config(**right | {name: "no such word"})


def test_the_nearest_word_is_named_and_others_of_a_union_are_taken():
    assert len(CONFIGS) >= 12
    with pytest.raises(ChesError, match=r"TrainConfig: schedule is one of .*, not 'cosin'; did you mean cosine\?"):
        TrainConfig(schedule="cosin")  # type: ignore[arg-type]
    with pytest.raises(ChesError, match="tracker is one of"):
        TrainConfig(tracker=("wandb", "mlflow"))  # type: ignore[arg-type]
    assert TrainConfig(tracker=["wandb"]).tracker == ["wandb"]  # type: ignore[arg-type, comparison-overlap]
    with pytest.raises(ChesError, match="eos is one of"):
        dataclasses.replace(TrainConfig(), eos="drop")


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.__name__)
def test_every_field_refuses_what_it_cannot_be(config: type):
    """A model, rows, a text where a number belongs: refused by name, not somewhere in the run."""
    right = {
        f.name: _words(hint)[0] if _words(hint) else "x"
        for f, hint in ((f, get_type_hints(config)[f.name]) for f in dataclasses.fields(config))
        if f.default is f.default_factory is dataclasses.MISSING
    }
    for name, hint in get_type_hints(config).items():
        for wrong in (object(), [{"prompt": "a"}], *(["8"] if hint in (int, float, bool, int | None) else [])):
            with pytest.raises(ChesError, match=rf"^{config.__name__}: {name} is .*, not ('8'|a object|a list)"):
                config(**right | {name: wrong})


def test_paths_and_numbers_of_numpy_are_taken():
    given = TrainConfig(
        pairs=Path("a/pairs.jsonl"),  # type: ignore[arg-type]
        out=Path("runs/t"),  # type: ignore[arg-type]
        batch_size=np.int64(4),  # type: ignore[arg-type]
        steps=1e3,  # type: ignore[arg-type]
        lr=np.float64(0.25),
        remat=np.bool_(True),  # type: ignore[arg-type]
        loss_args={"beta": np.float32(0.5)},  # type: ignore[dict-item]
    )
    assert given == TrainConfig(
        pairs="a/pairs.jsonl", out="runs/t", batch_size=4, steps=1000, lr=0.25, remat=True, loss_args={"beta": 0.5}
    )
    assert [type(v) for v in (given.batch_size, given.steps, given.lr, given.remat)] == [int, int, float, bool]
    wrong: Any
    for wrong in ({"batch_size": 2.5}, {"batch_size": True}, {"remat": 1}, {"loss_args": {"beta": "0.1"}}):
        with pytest.raises(ChesError, match=rf"{next(iter(wrong))} is"):
            TrainConfig(**wrong)


def test_a_column_is_hidden_by_an_empty_name():
    """What many messages advise: ``--columns prompt=``."""
    assert _renamed(["prompt=", "chosen=yea"]) == {"prompt": "", "chosen": "yea"}
    for word in ("prompt", "=yea"):
        with pytest.raises(ChesError, match=r"expected ours=theirs, such as prompt=instruction \(prompt= hides"):
            _renamed([word])
