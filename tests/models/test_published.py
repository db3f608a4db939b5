"""Published configs, keys and all, build decoders with exactly the published number of parameters, without weights."""

import json
from pathlib import Path

import pytest

from ches_jax.models.decoder import parameter_count
from ches_jax.models.families.registry import decoder_config

PUBLISHED = Path(__file__).parent / "published"
COUNTS = {
    "olmo-1b": 1_176_764_416,
    "gemma-2b": 2_506_172_416,
    "llama-3-8b": 8_030_261_248,
    "llama-3-70b": 70_553_706_496,
    "qwen2.5-7b": 7_615_616_512,
    "pythia-1.4b": 1_414_647_808,
    "mistral-7b": 7_241_732_096,
    "phi-3-mini-4k": 3_821_079_552,
    "gemma-2-9b": 9_241_705_984,
    "gpt2": 124_439_808,
    "lfm2-1.2b": 1_170_340_608,
}


@pytest.mark.parametrize("name", COUNTS)
def test_parameter_counts(name: str):
    raw = json.loads((PUBLISHED / f"{name}.json").read_text())
    assert parameter_count(decoder_config(raw, name)) == COUNTS[name]


@pytest.mark.slow
@pytest.mark.parametrize("name", COUNTS)
def test_transformers_counts_the_same(name: str):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    config = transformers.AutoConfig.from_pretrained(PUBLISHED / f"{name}.json")
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    assert model.num_parameters() == COUNTS[name]


def test_every_config_is_counted():
    assert {p.stem for p in PUBLISHED.glob("*.json")} == COUNTS.keys()
