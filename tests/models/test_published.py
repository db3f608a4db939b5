"""Published configs, keys and all, build decoders with exactly the published number of parameters, without weights."""

import json
from pathlib import Path

import pytest

from ches_jax.models.decoder import parameter_count
from ches_jax.models.families.registry import FAMILIES, decoder_config

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
    "olmo-3-7b": 7_298_011_136,
    "smollm3-3b": 3_075_098_624,
    "glm-4-9b": 9_400_279_040,
    "granite-3.1-2b": 2_533_531_648,
    "command-r7b": 8_028_033_024,
    "ministral-3-8b": 8_489_553_920,
    "mixtral-8x7b": 46_702_792_704,
    "qwen3-30b-a3b": 30_532_122_624,
    "olmoe-1b-7b": 6_919_161_856,
    "gpt-oss-20b": 20_914_757_184,
    "deepseek-v3": 671_026_419_200,
    "llama-4-scout": 107_769_861_120,
    "gemma-4-e2b": 4_628_569_379,
    "lfm2-1.2b": 1_170_340_608,
    "qwen3-8b": 8_190_735_360,
    "olmo-2-7b": 7_298_617_344,
    "gemma-3-1b": 999_885_952,
    "starcoder2-3b": 3_030_371_328,
    "qwen3.5-27b": 26_895_998_464,
    "qwen3.5-35b-a3b": 34_660_610_688,
    "qwen3-next-80b-a3b": 79_674_391_296,
    "qwen1.5-moe-a2.7b": 14_315_784_192,
    "glm-4.5-air": 106_852_251_264,
}


@pytest.mark.parametrize("name", COUNTS)
def test_parameter_counts(name: str):
    raw = json.loads((PUBLISHED / f"{name}.json").read_text())
    assert parameter_count(decoder_config(raw, name)) == COUNTS[name]


@pytest.mark.slow
@pytest.mark.parametrize("name", COUNTS)
def test_transformers_counts_the_same(name: str):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    raw = json.loads((PUBLISHED / f"{name}.json").read_text())
    # the published Llama 4 writes the switch as 4, which transformers 5.24 no longer reads
    raw |= {key: bool(value) for key, value in raw.items() if key == "attn_temperature_tuning"}
    config = transformers.AutoConfig.for_model(**raw)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    stored = {buffer for buffer, _ in model.named_buffers()} & model.state_dict().keys()
    assert model.num_parameters() + sum(model.get_buffer(b).numel() for b in stored) == COUNTS[name]


def test_every_config_is_counted_and_every_family_has_one():
    configs = {p.stem: json.loads(p.read_text()) for p in PUBLISHED.glob("*.json")}
    assert configs.keys() == COUNTS.keys()
    assert {raw["model_type"] for raw in configs.values()} == FAMILIES.keys()
