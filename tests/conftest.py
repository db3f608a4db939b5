"""What all tests share: compiled programs, strict arithmetic, the tiny model."""

import gc
from pathlib import Path

import jax
import pytest

from ches_jax import bundled
from tests.timings import Timings

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

SHARED = Path(__file__).parents[2] / "shared"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--timings", nargs="?", const="-", metavar="FILE", help="CPU seconds by file, and by test in FILE")


def pytest_configure(config: pytest.Config) -> None:
    if path := config.getoption("timings"):
        config.pluginmanager.register(Timings(config, str(path)))
    # a program half written by another worker is compiled again
    config.addinivalue_line("filterwarnings", "ignore:Error reading persistent compilation cache:UserWarning")
    for module in ("torch", "transformers", "huggingface_hub"):
        for kind in ("DeprecationWarning", "FutureWarning", "UserWarning"):
            config.addinivalue_line("filterwarnings", f"ignore::{kind}:{module}")


def pytest_collection_finish() -> None:
    gc.freeze()  # what is imported stays; it is not searched again


@pytest.fixture(scope="session")
def shared() -> Path:
    if not SHARED.is_dir():
        pytest.skip("needs the reference material in ../shared, which is not part of the checkout")
    return SHARED


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> Path:
    """A random two-layer Llama with the bundled tokenizer, as a Hugging Face directory."""
    import shutil

    from flax import nnx

    from ches_jax.models.checkpoint.save import save_pretrained
    from ches_jax.models.decoder import Decoder
    from ches_jax.models.families.registry import decoder_config

    raw = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": 1291,
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
    }
    model = Decoder(decoder_config(raw), rngs=nnx.Rngs(7))
    # small weights make a random model near linear; larger ones let attention matter
    nnx.update(model, jax.tree.map(lambda w: w * 5 if w.ndim > 1 else w, nnx.state(model)))
    out = tmp_path_factory.mktemp("models") / "tiny"
    save_pretrained(model, out, config=raw)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(bundled.model_dir() / name, out / name)
    return out


@pytest.fixture
def x64():
    """Double precision for one test."""
    with jax.enable_x64(True):
        yield
