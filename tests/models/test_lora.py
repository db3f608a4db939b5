"""Adapters: gradients by the chain rule, merging, and PEFT's directories in both directions."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from ches_jax.errors import ChesError
from ches_jax.hf.directory import read_config
from ches_jax.hf.tensors import open_tensors
from ches_jax.models.adapters.lora import adapted, adapter_shapes, initial_adapters, make_spec, merged
from ches_jax.models.adapters.peft import (
    CONFIG,
    WEIGHTS,
    adapter_directory,
    adapter_fingerprint,
    load_adapted,
    load_merged,
    read_adapter,
    write_adapter,
)
from ches_jax.models.checkpoint.load import load_model, with_parameters
from ches_jax.models.checkpoint.save import save_pretrained
from ches_jax.models.decoder import Decoder, abstract_decoder, named_parameters
from ches_jax.models.families.registry import decoder_config
from ches_jax.train.policy import marked_trained

COMMON = {"vocab_size": 31, "num_hidden_layers": 2, "hidden_size": 24, "num_attention_heads": 4}
EXPERTS = {"num_local_experts": 3, "num_experts_per_tok": 2}
MODELS = {
    "llama": {**COMMON, "intermediate_size": 20, "num_key_value_heads": 2, "max_position_embeddings": 64},
    "gpt_neox": {**COMMON, "intermediate_size": 20, "max_position_embeddings": 64, "rotary_pct": 1.0},
    "phi3": {**COMMON, "intermediate_size": 20, "num_key_value_heads": 2, "pad_token_id": 0},
    "gpt2": {"vocab_size": 31, "n_layer": 2, "n_embd": 24, "n_head": 4, "n_positions": 64},
    "gpt_oss": {**COMMON, "intermediate_size": 10, "num_key_value_heads": 2, "head_dim": 6, **EXPERTS},
    "llama4_text": {
        **COMMON, "intermediate_size": 10, "intermediate_size_mlp": 20, "num_key_value_heads": 2, "head_dim": 6,
        **EXPERTS,
    },
    "gemma4_text": {
        **COMMON, "intermediate_size": 20, "num_key_value_heads": 2, "head_dim": 6, "global_head_dim": 6,
        "hidden_size_per_layer_input": 0, "enable_moe_block": True, "num_experts": 3, "top_k_experts": 2,
        "moe_intermediate_size": 10,
    },
    "qwen3_5_moe_text": {
        **COMMON, "num_key_value_heads": 2, "head_dim": 8, "num_experts": 3, "num_experts_per_tok": 2,
        "moe_intermediate_size": 10, "shared_expert_intermediate_size": 6, "linear_num_key_heads": 2,
        "linear_num_value_heads": 4, "linear_key_head_dim": 4, "linear_value_head_dim": 6,
        "layer_types": ["linear_attention", "full_attention"],
    },
    "mixtral": {**COMMON, "intermediate_size": 10, "num_key_value_heads": 2, **EXPERTS},
    "qwen3_moe": {
        **COMMON, "intermediate_size": 20, "num_key_value_heads": 2, "head_dim": 6, "num_experts": 3,
        "num_experts_per_tok": 2, "moe_intermediate_size": 10, "mlp_only_layers": [0],
    },
}  # fmt: skip
EACH = "q,expert_gate,expert_up,expert_down"
TOKENS = np.arange(2 * 9).reshape(2, 9) % 31


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A random model directory of a family, made once."""
    made: dict[str, Path] = {}

    def make(family: str) -> Path:
        if family not in made:
            raw = {"model_type": family, **MODELS[family]}
            model = Decoder(decoder_config(raw), rngs=nnx.Rngs(3))
            nnx.update(model, jax.tree.map(lambda w: w * 8 if w.ndim > 2 else w, nnx.state(model)))
            made[family] = tmp_path_factory.mktemp("base") / family
            save_pretrained(model, made[family], config=raw)
            if family == "qwen3_5_moe_text":
                put_together(made[family])
        return made[family]

    return make


def put_together(directory: Path) -> None:
    """Each expert's matrices become one tensor, as the hub has them: ``gate_up_proj`` and ``down_proj``."""
    apart = load_file(directory / "model.safetensors")
    tensors = {name: value for name, value in apart.items() if ".experts." not in name}
    for name in sorted({name.partition(".experts.")[0] for name in apart if ".experts." in name}):
        experts = range(EXPERTS["num_local_experts"])
        gate, up, down = (
            [apart[f"{name}.experts.{e}.{p}_proj.weight"] for e in experts] for p in ("gate", "up", "down")
        )
        tensors[f"{name}.experts.gate_up_proj"] = np.stack([np.concatenate(two) for two in zip(gate, up, strict=True)])
        tensors[f"{name}.experts.down_proj"] = np.stack(down)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def random_adapters(shapes, seed=1):
    rng = np.random.default_rng(seed)
    return {name: (0.2 * rng.normal(size=leaf.shape)).astype(leaf.dtype) for name, leaf in shapes.items()}


def with_adapters(directory: Path, spec, arrays=None, dtype="float32"):
    """The base model with random (or given) adapters; and all of its parameters."""
    model = load_model(directory, dtype=dtype, param_dtype=dtype)
    both = adapted(abstract_decoder(model.config, dtype=jnp.dtype(dtype)), spec, dtype)
    arrays = random_adapters(adapter_shapes(both)) if arrays is None else arrays
    params = {**named_parameters(model), **{n: jnp.asarray(a) for n, a in arrays.items()}}
    return with_parameters(both, params), params


compiled = nnx.jit(lambda model, tokens: model.logits(model.hidden(tokens)))


def logits(model) -> np.ndarray:
    return np.asarray(compiled(model, jnp.asarray(TOKENS, jnp.int32)))


def test_the_adapted_model_starts_as_the_base_exactly(base):
    spec = make_spec(3, 6.0, "all-linear", decoder_config(read_config(base("llama"))))
    shapes = adapter_shapes(adapted(abstract_decoder(decoder_config(read_config(base("llama")))), spec))
    model, _ = with_adapters(base("llama"), spec, initial_adapters(shapes, 0))
    np.testing.assert_array_equal(logits(model), logits(load_model(base("llama"))))
    for name, value in initial_adapters(shapes, 0).items():
        if name.endswith("lora_a"):
            bound = value.shape[-1] ** -0.5
            assert np.abs(value).max() <= bound and np.std(value) == pytest.approx(bound / 3**0.5, rel=0.15), name


@pytest.mark.parametrize("marked", [False, True], ids=["derived", "as_trained"])
def test_gradients_of_adapters_follow_from_the_full_gradient(base, x64, marked):
    """dA = s B^T dW and dB = s dW A^T, with dW the gradient of the merged matrix."""
    directory = base("llama")
    config = decoder_config(read_config(directory))
    spec = make_spec(3, 6.0, "all-linear", config)
    _, params = with_adapters(directory, spec, dtype="float64")
    plain = abstract_decoder(config, dtype=jnp.float64)
    both = adapted(abstract_decoder(config, dtype=jnp.float64), spec, "float64")
    weights = jnp.asarray(np.random.default_rng(0).normal(size=logits(with_parameters(both, params)).shape))
    tokens = jnp.asarray(TOKENS, jnp.int32)

    def loss(abstract):
        def value(params):
            model = with_parameters(abstract, params)
            return jnp.sum(weights * model.logits(model.hidden(tokens)))

        return jax.jit(jax.grad(value))

    full = loss(plain)(merged(params, spec))
    actual = loss(marked_trained(both, adapters=True) if marked else both)(params)
    for name, (_, scale) in spec.items():
        dw, a, b = full[f"{name}.weight"], params[f"{name}.lora_a"], params[f"{name}.lora_b"]
        for part, expected in (("a", jnp.matrix_transpose(b) @ dw), ("b", dw @ jnp.matrix_transpose(a))):
            size = float(jnp.abs(expected).max())
            np.testing.assert_allclose(
                actual[f"{name}.lora_{part}"] * 1, scale * expected, atol=1e-12 * size, rtol=1e-9
            )


def test_merged_is_adapted(base, x64):
    spec = make_spec(3, 6.0, "q,v_proj,down", decoder_config(read_config(base("llama"))))
    model, params = with_adapters(base("llama"), spec, dtype="float64")
    plain = with_parameters(abstract_decoder(model.config, dtype=jnp.float64), merged(params, spec))
    np.testing.assert_allclose(logits(plain), logits(model), rtol=1e-11, atol=1e-11)
    assert np.abs(logits(load_model(base("llama"), dtype="float64")) - logits(model)).max() > 0.1


def test_half_precision_multiplies_what_float32_holds(base):
    """In bfloat16 the adapters are rounded when they are used, scale included, and stay float32."""
    spec = make_spec(3, 4.0, "all-linear", decoder_config(read_config(base("llama"))))
    model, params = with_adapters(base("llama"), spec)
    exact = logits(model)
    half = adapted(abstract_decoder(model.config, dtype=jnp.bfloat16), spec)
    actual = logits(with_parameters(half, params))
    assert all(v.dtype == np.float32 for n, v in params.items() if "lora" in n)
    np.testing.assert_allclose(actual, exact, atol=0.05 * np.abs(exact).max())  # bfloat16 has 8 bits


@pytest.mark.parametrize(
    ("family", "targets"),
    [
        ("llama", "q,v,down"),
        ("gpt2", "all-linear"),
        ("gpt_neox", "q,v,o"),
        ("phi3", "k,up"),
        ("qwen3_moe", "q,up,down,router"),
    ],
)
def test_an_adapter_goes_through_pefts_format(base, tmp_path, family, targets):
    """The files mean ``W + alpha / r B A`` for each stored module, here worked out from the files alone."""
    directory = base(family)
    spec = make_spec(3, 5.0, targets, decoder_config(read_config(directory)), rslora=True)
    model, params = with_adapters(directory, spec)
    written = write_adapter(tmp_path / "adapter", params, spec, directory)
    assert written == adapter_fingerprint(tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / CONFIG).read_text())
    files, stored = load_file(tmp_path / "adapter" / WEIGHTS), open_tensors(directory)
    expected = {name: tensor.read() for name, tensor in stored.items()}
    for name in [n for n in files if ".lora_A." in n]:
        module = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        by_parameter = family == "qwen3_moe" and "mlp" in module  # PEFT takes these names for those of experts
        known, targets = f"{module}.weight" if by_parameter else module, config["target_modules"]
        targets = config["target_parameters"] if by_parameter else targets
        assert any(known.endswith(f".{t}") for t in targets)
        a, b = files[name], files[name.replace("lora_A", "lora_B")]
        key = next((k for k in config["rank_pattern"] if known.endswith(k)), None)
        rank = config["rank_pattern"][key] if key else config["r"]
        key = next((k for k in config["alpha_pattern"] if known.endswith(k)), None)
        alpha = config["alpha_pattern"][key] if key else config["lora_alpha"]
        assert a.shape[0] == b.shape[1] == rank
        change = alpha / rank * b @ a
        expected[f"{module}.weight"] += change.T if config["fan_in_fan_out"] else change
    save_pretrained(
        with_parameters(abstract_decoder(model.config), merged(params, spec)), tmp_path / "merged", like=directory
    )
    for name, tensor in open_tensors(tmp_path / "merged").items():
        np.testing.assert_allclose(tensor.read(), expected[name], atol=2e-6, err_msg=name)
    again = read_adapter(tmp_path / "adapter", directory)
    back = merged({**params, **again.arrays}, again.spec)
    for name, value in merged(params, spec).items():
        np.testing.assert_allclose(back[name], value, atol=2e-6, err_msg=name)


TOGETHER = ("gpt_oss", "llama4_text", "gemma4_text", "qwen3_5_moe_text")
"""Families whose experts lie in one tensor; PEFT takes the inputs of Llama 4's for outputs."""
APART = ("mixtral", "qwen3_moe")
"""Families whose files have a tensor for each expert; transformers, and PEFT with it, has them in one."""


def all_experts(directory: Path) -> dict[str, np.ndarray]:
    """The stored tensors, those of experts as they are in memory."""
    tensors = {name: tensor.read() for name, tensor in open_tensors(directory).items()}
    for start in {name.partition(".experts.")[0] for name in tensors if ".experts.0." in name}:
        words = ("w1", "w3", "w2") if "block_sparse" in start else ("gate_proj", "up_proj", "down_proj")
        gate, up, down = ([tensors[f"{start}.experts.{e}.{w}.weight"] for e in range(3)] for w in words)
        after = f"{start.replace('block_sparse_moe', 'mlp')}.experts"
        tensors[f"{after}.gate_up_proj"] = np.stack([np.concatenate(two) for two in zip(gate, up, strict=True)])
        tensors[f"{after}.down_proj"] = np.stack(down)
    return tensors


@pytest.mark.parametrize("family", [*TOGETHER, *APART])
def test_experts_in_one_tensor_go_through_pefts_format(base, tmp_path, family):
    """The files mean what PEFT's ``ParamWrapper`` makes of them, here worked out expert by expert."""
    directory = base(family)
    spec = make_spec(3, 5.0, EACH, decoder_config(read_config(directory)))
    model, params = with_adapters(directory, spec)
    write_adapter(tmp_path / "adapter", params, spec, directory)
    config = json.loads((tmp_path / "adapter" / CONFIG).read_text())
    below = {"llama4_text": "feed_forward.", "gemma4_text": ""}.get(family, "mlp.")
    assert set(config["target_parameters"]) == {f"{below}experts.{p}" for p in ("gate_up_proj", "down_proj")}
    assert config["target_modules"] == ["q_proj"]
    files = load_file(tmp_path / "adapter" / WEIGHTS)
    expected = all_experts(directory)
    for name, rank, inside in (("gate_up_proj", 6, ".base_layer"), ("down_proj", 3, "")):
        module = f"model.layers.1.{below}experts"
        a, b = (files[f"base_model.model.{module}{inside}.lora_{part}.weight"] for part in "AB")
        for e in range(3):
            # alpha / rank is 5 / 3 for every map
            change = 5 / 3 * b[:, e::3] @ a[rank * e : rank * (e + 1)]
            expected[f"{module}.{name}"][e] += change.T if family == "gpt_oss" else change
    whole = with_parameters(abstract_decoder(model.config), merged(params, spec))
    save_pretrained(whole, tmp_path / "merged", like=directory)
    after = all_experts(tmp_path / "merged")
    for name in ("gate_up_proj", "down_proj"):
        name = f"model.layers.1.{below}experts.{name}"
        np.testing.assert_allclose(after[name], expected[name], atol=2e-6, err_msg=name)
    again = read_adapter(tmp_path / "adapter", directory)
    back = merged({**params, **again.arrays}, again.spec)
    for name, value in merged(params, spec).items():
        np.testing.assert_allclose(back[name], value, atol=2e-6, err_msg=name)


def test_mixtral_is_read_and_written_as_transformers_has_it_in_memory(base, tmp_path):
    """Some programs write it so; ``save_pretrained(save_original_format=False)`` of transformers does."""
    apart = base("mixtral")
    given = {
        name.replace("block_sparse_moe", "mlp"): np.ascontiguousarray(value)
        for name, value in all_experts(apart).items()
        if not any(f".experts.{e}." in name for e in range(3))
    }
    directory = tmp_path / "together"
    directory.mkdir()
    (directory / "config.json").write_text((apart / "config.json").read_text())
    save_file(given, directory / "model.safetensors", metadata={"format": "pt"})
    model = load_model(directory)
    for name, value in named_parameters(load_model(apart)).items():
        np.testing.assert_array_equal(named_parameters(model)[name], value, err_msg=name)
    save_pretrained(model, tmp_path / "again", like=directory)
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert again.keys() == given.keys()
    for name, value in given.items():
        np.testing.assert_array_equal(again[name], value, err_msg=name)


def test_adapters_of_each_expert_are_read(base, tmp_path):
    """As PEFT wrote them over transformers 4: a module for each expert, here of layer 1, and of two experts alone."""
    rng, sizes = np.random.default_rng(4), {"w1": (24, 10), "w2": (10, 24)}
    name = "base_model.model.model.layers.1.block_sparse_moe.experts.{}.{}.lora_{}.weight"
    halves = {
        (e, w): (rng.normal(size=(2, inputs)), rng.normal(size=(outputs, 2)))
        for w, (inputs, outputs) in sizes.items()
        for e in (0, 2)
    }
    tensors = {name.format(*at, part): half for at, two in halves.items() for part, half in zip("AB", two, strict=True)}
    write_files(tmp_path / "a", {**GOOD, "target_modules": ["w1", "w2"]}, tensors)
    adapter = read_adapter(tmp_path / "a", base("mixtral"))
    for w, param in (("w1", "gate_proj"), ("w2", "down_proj")):
        a, b = (adapter.arrays[f"layers.mlp.experts.{param}.lora_{part}"] for part in "ab")
        assert not b[0].any() and not b[1, 1].any() and adapter.spec[f"layers.mlp.experts.{param}"].scale == 2.0
        for e in (0, 2):
            down, up = halves[e, w]
            np.testing.assert_allclose(b[1, e] @ a[1, e], up @ down, atol=1e-5)


def of_transformers(directory: Path):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    return transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
    )


def check_logits(actual: np.ndarray, theirs) -> None:
    torch = pytest.importorskip("torch")
    with torch.no_grad():
        expected = theirs.eval()(torch.tensor(TOKENS)).logits.numpy()
    np.testing.assert_allclose(actual, expected, atol=2e-5 * np.abs(expected).max())


MADE_BY_PEFT: dict[str, tuple[str, dict]] = {
    "rsLoRA with patterns": (
        "llama",
        {
            "target_modules": ["q_proj", "v_proj", "down_proj"],
            "use_rslora": True,
            "rank_pattern": {"layers.0.self_attn.q_proj": 5, "down_proj": 2},
            "alpha_pattern": {r".*1\.self_attn\..*": 9, "down_proj": 1},
        },
    ),
    "pattern of modules, some layers": (
        "llama",
        {"target_modules": r".*\.mlp\.(up|gate)_proj", "layers_to_transform": None},
    ),
    "turned and fused": ("gpt2", {"target_modules": "all-linear"}),
    "whole modules": ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens", "norm"]}),
    "biases": ("gpt_neox", {"target_modules": ["dense", "query_key_value"], "bias": "all"}),
    "biases beside adapters": ("gpt_neox", {"target_modules": ["dense_h_to_4h"], "bias": "lora_only"}),
    "fused": ("phi3", {"target_modules": ["qkv_proj", "gate_up_proj"]}),
    "a weight by name": ("phi3", {"target_modules": [], "target_parameters": ["mlp.gate_up_proj.weight"]}),
    "experts and routers": ("mixtral", {"target_modules": "all-linear"}),
    "experts by name": (
        "qwen3_moe",
        {
            "target_modules": ["q_proj"],
            "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
            "rank_pattern": {"mlp.experts.gate_up_proj": 2},
            "alpha_pattern": {r".*\.down_proj": 3},
        },
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize(("family", "settings"), MADE_BY_PEFT.values(), ids=MADE_BY_PEFT)
@pytest.mark.filterwarnings("ignore:The following .*_pattern keys:RuntimeWarning")  # of parameters; it uses them
@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning")
def test_what_peft_makes_is_read(base, tmp_path, family, settings):
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    torch.manual_seed(6)
    config = peft.LoraConfig(r=3, lora_alpha=5, init_lora_weights=False, **settings)
    theirs = peft.get_peft_model(of_transformers(base(family)), config)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if parameter.requires_grad and "lora_" not in name:
                parameter += 0.3 * torch.randn_like(parameter)
    theirs.save_pretrained(tmp_path / "adapter")
    theirs = peft.PeftModel.from_pretrained(of_transformers(base(family)), tmp_path / "adapter")
    adapted_model = load_adapted(base(family), tmp_path / "adapter")
    check_logits(logits(adapted_model), theirs)
    assert np.abs(logits(adapted_model) - logits(load_model(base(family)))).max() > 0.01


def check_against_peft(directory: Path, targets: str, out: Path) -> None:
    """PEFT computes with the adapter that is written what we compute with the one in memory, and we with it."""
    peft = pytest.importorskip("peft")
    spec = make_spec(3, 5.0, targets, decoder_config(read_config(directory)))
    model, params = with_adapters(directory, spec)
    write_adapter(out, params, spec, directory)
    check_logits(logits(model), peft.PeftModel.from_pretrained(of_transformers(directory), out))
    np.testing.assert_allclose(logits(load_adapted(directory, out)), logits(model), atol=1e-5)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The following .*_pattern keys:RuntimeWarning")  # it uses them all the same
@pytest.mark.parametrize("family", TOGETHER)
@pytest.mark.parametrize("targets", [EACH, "expert_down", "expert_up"])
def test_peft_reads_adapters_of_experts_in_one_tensor(base, tmp_path, family, targets):
    check_against_peft(base(family), targets, tmp_path / "adapter")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The following .*_pattern keys:RuntimeWarning")
@pytest.mark.parametrize("targets", [EACH, "expert_up,router", "all-linear", "down,q"])
def test_peft_reads_adapters_beside_experts_that_are_stored_one_by_one(base, tmp_path, targets):
    """It takes names of modules that experts had once, such as ``down_proj`` of a dense layer, for those of experts."""
    check_against_peft(base("qwen3_moe"), targets, tmp_path / "adapter")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The following .*_pattern keys:RuntimeWarning")
@pytest.mark.parametrize("targets", [EACH, "expert_down,router"])
def test_peft_reads_adapters_of_mixtral(base, tmp_path, targets):
    check_against_peft(base("mixtral"), targets, tmp_path / "adapter")


def test_target_parameters_that_are_none_are_named(base, tmp_path):
    tensor = {"base_model.model.model.layers.0.mlp.experts.lora_A.weight": np.ones((6, 10), np.float32)}
    write_files(tmp_path / "a", {**GOOD, "target_parameters": ["experts.up_proj"]}, tensor)
    names = r"mlp\.experts\.down_proj, mlp\.experts\.gate_up_proj, mlp\.router\.weight"
    with pytest.raises(ChesError, match=rf"names 'experts\.up_proj'; expected some of {names}"):
        read_adapter(tmp_path / "a", base("gpt_oss"))
    with pytest.raises(
        ChesError, match=r"expected some of mlp\.experts\.down_proj, mlp\.experts\.gate_up_proj, mlp\.gate\.weight"
    ):
        read_adapter(tmp_path / "a", base("mixtral"))
    with pytest.raises(ChesError, match="expected some of none"):
        read_adapter(tmp_path / "a", base("llama"))


def test_layers_and_ranks_that_differ_are_filled_with_zeros(base, tmp_path):
    rng = np.random.default_rng(2)
    name = "base_model.model.model.layers.{}.self_attn.q_proj.lora_{}.weight"
    tensors = {
        name.format(0, "A"): rng.normal(size=(2, 24)),
        name.format(0, "B"): rng.normal(size=(24, 2)),
        name.format(1, "A"): rng.normal(size=(3, 24)),
        name.format(1, "B"): rng.normal(size=(24, 3)),
    }
    config = {
        "peft_type": "LORA",
        "r": 3,
        "lora_alpha": 3,
        "rank_pattern": {"layers.0.self_attn.q_proj": 2},
        "alpha_pattern": {r"layers\.0\.self_attn\.q_proj": 2},
        "target_modules": ["q_proj"],
    }
    write_files(tmp_path / "a", config, tensors)
    actual = read_adapter(tmp_path / "a", base("llama"))
    assert actual.spec == {"layers.self_attn.q_proj": (3, 1.0)}
    a, b = (actual.arrays[f"layers.self_attn.q_proj.lora_{part}"] for part in "ab")
    for layer in range(2):
        left, right = (tensors[name.format(layer, part)].astype(np.float32) for part in "AB")
        np.testing.assert_allclose(b[layer] @ a[layer], right @ left, atol=1e-5)
    assert not a[0, 2:].any() and not b[0, :, 2:].any()


def test_each_layer_has_its_own_scale_as_peft_computes_it(base, tmp_path):
    """W + alpha_l / r_l B_l A_l (rsLoRA: alpha_l / sqrt(r_l)), with the first pattern that the name's end matches."""
    rng = np.random.default_rng(3)
    name = "base_model.model.model.layers.{}.{}.lora_{}.weight"
    sizes = {"self_attn.q_proj": (24, 24), "mlp.down_proj": (20, 24)}
    ranks = {(0, "self_attn.q_proj"): 2, (1, "self_attn.q_proj"): 4, (0, "mlp.down_proj"): 4, (1, "mlp.down_proj"): 4}
    tensors = {}
    for (layer, module), rank in ranks.items():
        inputs, outputs = sizes[module]
        tensors[name.format(layer, module, "A")] = rng.normal(size=(rank, inputs))
        tensors[name.format(layer, module, "B")] = rng.normal(size=(outputs, rank))
    config = {
        "peft_type": "LORA",
        "r": 4,
        "lora_alpha": 8,
        "rank_pattern": {r"layers\.0\.self_attn\..*": 2},
        # 'proj' alone ends no name at a dot, 'q_proj' stands behind the pattern that already matches in layer 1
        "alpha_pattern": {"proj": 99, "layers.1.(self_attn|mlp).[a-z]+_proj": 12, "q_proj": 10},
    }
    alphas = {
        (0, "self_attn.q_proj"): 10,
        (1, "self_attn.q_proj"): 12,
        (0, "mlp.down_proj"): 8,
        (1, "mlp.down_proj"): 12,
    }
    for rslora in (False, True):
        write_files(tmp_path / f"a{rslora}", config | {"use_rslora": rslora}, tensors)
        adapter = read_adapter(tmp_path / f"a{rslora}", base("llama"))
        for (layer, module), rank in ranks.items():
            scale = alphas[layer, module] / (rank**0.5 if rslora else rank)
            a, b = (tensors[name.format(layer, module, part)].astype(np.float32).astype(np.float64) for part in "AB")
            key = f"layers.{module}"
            ours = [adapter.arrays[f"{key}.lora_{part}"][layer].astype(np.float64) for part in "ab"]
            expected = scale * b @ a
            np.testing.assert_allclose(
                adapter.spec[key].scale * ours[1] @ ours[0], expected, atol=1e-6 * np.abs(expected).max()
            )


def write_files(directory: Path, config, tensors) -> None:
    directory.mkdir()
    (directory / CONFIG).write_text(json.dumps(config))
    save_file({n: v.astype(np.float32) for n, v in tensors.items()}, directory / WEIGHTS)


GOOD = {"peft_type": "LORA", "r": 2, "lora_alpha": 4}
MODULE = "base_model.model.model.layers.0.mlp.up_proj"


@pytest.mark.parametrize(
    ("config", "tensors", "message"),
    [
        ({**GOOD, "peft_type": "IA3"}, {}, "'peft_type' is 'IA3'; expected 'LORA'"),
        ({**GOOD, "target_modules": 3}, {}, "'target_modules' is 3; expected names of modules"),
        ({**GOOD, "exclude_modules": [1]}, {}, r"'exclude_modules' is \[1\]; expected names of modules"),
        ({**GOOD, "layers_to_transform": ["a"]}, {}, r"'layers_to_transform' is \['a'\]; expected numbers of layers"),
        ({**GOOD, "layers_pattern": 3}, {}, "'layers_pattern' is 3; expected names of lists of layers"),
        ({**GOOD, "target_modules": "("}, {}, "'target_modules' has '\\(', which is no regular expression"),
        ({**GOOD, "use_dora": True}, {}, "'use_dora' = True is not supported"),
        ({**GOOD, "bias": "some"}, {}, "'bias' = 'some' is not known; expected 'none', 'all' or 'lora_only'"),
        ({**GOOD, "init_lora_weights": "pissa_niter_4"}, {}, "changes the base weights too"),
        ({**GOOD, "init_lora_weights": "OLoRA"}, {}, "changes the base weights too"),
        ({**GOOD, "r": None}, {}, "'r' is None; expected a positive number"),
        ({**GOOD, "use_newdora": True}, {}, "'use_newdora' = True is not known; expected it to be off"),
        ({**GOOD, "modules_to_save": "lm_head"}, {}, "'modules_to_save' is 'lm_head'; expected a list of names"),
        ({**GOOD, "modules_to_save": ["lm_head"]}, {}, "'modules_to_save' names 'lm_head', of which .* holds nothing"),
        (
            {**GOOD, "rank_pattern": {"q_proj": "x"}},
            {},
            "'rank_pattern' of 'q_proj' is 'x'; expected a positive number",
        ),
        ({**GOOD, "rank_pattern": {"q_proj": 0}}, {}, "'rank_pattern' of 'q_proj' is 0"),
        ({**GOOD, "rank_pattern": {"q_proj": 1.5}}, {}, "'rank_pattern' of 'q_proj' is 1.5"),
        ({**GOOD, "rank_pattern": {"q_proj": 10**9}}, {}, "at most 65536"),
        ({**GOOD, "rank_pattern": ["q_proj"]}, {}, "'rank_pattern' is .* expected an object"),
        ({**GOOD, "alpha_pattern": {"q_proj": True}}, {}, "'alpha_pattern' of 'q_proj' is True"),
        ({**GOOD, "alpha_pattern": {"q_proj": float("nan")}}, {}, "'alpha_pattern' of 'q_proj' is nan"),
        ({**GOOD, "r": True}, {}, "'r' is True; expected a positive number"),
        ({**GOOD, "rank_pattern": {"(": 2}}, {}, "'rank_pattern' has '\\(', which is no regular expression"),
        (GOOD, {}, "holds no adapter"),
        (GOOD, {f"{MODULE}.lora_A.weight": (2, 24)}, "has lora_A alone"),
        (GOOD, {f"{MODULE}.lora_A.weight": (2, 20), f"{MODULE}.lora_B.weight": (20, 2)}, r"expected \(2, 24\)"),
        (GOOD, {"base_model.model.lm_head.lora_A.weight": (2, 24)}, "belongs to none of the modules mlp.down_proj,"),
        (GOOD, {f"{MODULE}.lora_magnitude_vector": (20,)}, "belongs to none of the modules"),
    ],
)
def test_what_is_no_plain_lora_is_refused_by_name(base, tmp_path, config, tensors, message):
    write_files(tmp_path / "a", config, {name: np.ones(shape) for name, shape in tensors.items()})
    with pytest.raises(ChesError, match=message):
        read_adapter(tmp_path / "a", base("llama"))


def q_of_both_layers(seed=5):
    rng = np.random.default_rng(seed)
    name = "base_model.model.model.layers.{}.self_attn.q_proj.lora_{}.weight"
    sizes = {"A": (2, 24), "B": (24, 2)}
    return {name.format(layer, part): rng.normal(size=sizes[part]) for layer in range(2) for part in "AB"}


READ = {
    "end of a name": {"target_modules": ["q_proj", "v_proj"]},
    "with its parent": {"target_modules": ["self_attn.q_proj"]},
    "whole names": {"target_modules": [f"model.layers.{i}.self_attn.q_proj" for i in range(2)]},
    "whole names, whatever the layers": {
        "target_modules": [f"model.layers.{i}.self_attn.q_proj" for i in range(2)],
        "layers_to_transform": [0],
    },
    "pattern": {"target_modules": r"model\.layers\.\d+\.self_attn\.(q|k)_proj"},
    "all": {"target_modules": "all-linear"},
    "layers": {"target_modules": ["q_proj"], "layers_to_transform": [0, 1], "layers_pattern": "layers"},
    "layers, list of patterns": {
        "target_modules": ["q_proj"],
        "layers_to_transform": [0, 1],
        "layers_pattern": ["h", "layers"],
    },
    "no layers": {"target_modules": ["q_proj"], "layers_to_transform": []},
    "others are left out": {"target_modules": ["q_proj"], "exclude_modules": ["proj", "layers.1.self_attn.v_proj"]},
    "nothing is said": {"target_modules": None, "exclude_modules": None},
}
UNREAD = {
    "parameters alone": ({"target_modules": None, "target_parameters": ["up_proj.weight"]}, "target_modules", 2),
    "another module": ({"target_modules": ["v_proj"]}, "target_modules", 2),
    "the end of a word": ({"target_modules": ["proj"]}, "target_modules", 2),
    "part of a name": ({"target_modules": "q_proj"}, "target_modules", 2),
    "one whole name": ({"target_modules": ["model.layers.0.self_attn.q_proj"]}, "target_modules", 1),
    "one layer": ({"target_modules": ["q_proj"], "layers_to_transform": 1}, "layers_to_transform", 1),
    "layers of another name": (
        {"target_modules": ["q_proj"], "layers_to_transform": [0, 1], "layers_pattern": "h"},
        "layers_to_transform",
        2,
    ),
    "left out": (
        {"target_modules": "all-linear", "exclude_modules": ["layers.1.self_attn.q_proj"]},
        "exclude_modules",
        1,
    ),
    "left out by a pattern": ({"target_modules": ["q_proj"], "exclude_modules": r".*\.0\..*"}, "exclude_modules", 1),
}


@pytest.mark.parametrize("said", READ.values(), ids=READ)
def test_modules_that_the_settings_name_are_read(base, tmp_path, said):
    tensors = q_of_both_layers()
    write_files(tmp_path / "a", GOOD | said, tensors)
    b = read_adapter(tmp_path / "a", base("llama")).arrays["layers.self_attn.q_proj.lora_b"]
    for layer in range(2):
        stored = tensors[f"base_model.model.model.layers.{layer}.self_attn.q_proj.lora_B.weight"]
        np.testing.assert_array_equal(b[layer], stored.astype(np.float32))


@pytest.mark.parametrize(("said", "setting", "count"), UNREAD.values(), ids=UNREAD)
def test_modules_that_the_settings_leave_out_are_refused(base, tmp_path, said, setting, count):
    """PEFT passes over what the file holds for them."""
    write_files(tmp_path / "a", GOOD | said, q_of_both_layers())
    with pytest.raises(ChesError, match=f"'{setting}' leaves out {count} modules of which .*PEFT does not read those"):
        read_adapter(tmp_path / "a", base("llama"))


SAID = READ | {said: config for said, (config, _, _) in UNREAD.items()}


@pytest.mark.parametrize("said", [s for s in SAID if SAID[s]["target_modules"] not in (None, "all-linear")])
def test_peft_reads_what_is_read(said):
    """The rule itself, beside PEFT's own, but for words that PEFT writes out before it applies the rule."""
    peft_utils = pytest.importorskip("peft.tuners.tuners_utils")
    config = SAID[said]
    of_peft = pytest.importorskip("peft").LoraConfig(**config)
    names = [f"model.layers.{i}.self_attn.q_proj" for i in range(2)]
    left_out = [name for name in names if not peft_utils.check_target_module_exists(of_peft, name)]
    assert len(left_out) == (0 if said in READ else UNREAD[said][2])


def test_whole_matrices_beside_an_adapter_change_nothing_or_are_refused(base, tmp_path, caplog):
    """PEFT stores embedding and head with the adapter where it saw them change, and loads them over the model's."""
    directory = base("llama")
    stored = {name: tensor.read() for name, tensor in open_tensors(directory).items()}
    whole = {
        "base_model.model.lm_head.weight": stored["lm_head.weight"],
        "base_model.model.model.embed_tokens.base_layer.weight": stored["model.embed_tokens.weight"],
    }
    write_files(tmp_path / "a", GOOD, q_of_both_layers() | whole)
    assert list(read_adapter(tmp_path / "a", directory).spec) == ["layers.self_attn.q_proj"]
    assert "lm_head.weight, base_model.model.model.embed_tokens.base_layer.weight repeat the values" in caplog.text
    changed = {name: value + 1 for name, value in whole.items()}
    write_files(tmp_path / "b", GOOD, q_of_both_layers() | changed)
    with pytest.raises(ChesError, match=r"place of the model's 'lm_head.weight', with other values: only adapters are"):
        read_adapter(tmp_path / "b", directory)
    # the embedding is no adapted module, which alone has a base_layer
    with pytest.raises(ChesError, match=r"'model.embed_tokens.weight', with other values: PEFT does not read it under"):
        read_adapter(tmp_path / "b", directory, whole=True)
    saved = {"base_model.model.lm_head.weight": stored["lm_head.weight"] + 1}
    write_files(tmp_path / "c", {**GOOD, "modules_to_save": ["lm_head"]}, q_of_both_layers() | saved)
    write_files(tmp_path / "plain", GOOD, q_of_both_layers())
    for load in (load_adapted, load_merged):
        actual, before = (named_parameters(load(directory, tmp_path / name)) for name in ("c", "plain"))
        np.testing.assert_array_equal(actual.pop("lm_head.weight"), stored["lm_head.weight"] + 1)
        for name, value in actual.items():
            np.testing.assert_array_equal(value, before[name], err_msg=name)


def test_a_head_in_place_of_a_tied_one_is_refused(base, tmp_path):
    """PEFT may keep the embedding as it was, or replace it too."""
    raw = json.loads((base("llama") / "config.json").read_text()) | {"tie_word_embeddings": True}
    stored = {name: tensor.read() for name, tensor in open_tensors(base("llama")).items() if "lm_head" not in name}
    directory = tmp_path / "tied"
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(raw))
    save_file(stored, directory / "model.safetensors", metadata={"format": "pt"})
    saved = {"base_model.model.lm_head.weight": stored["model.embed_tokens.weight"] + 1}
    write_files(tmp_path / "a", {**GOOD, "modules_to_save": ["lm_head"]}, q_of_both_layers() | saved)
    with pytest.raises(ChesError, match="ties its head to its embedding: which of the two PEFT replaces"):
        load_adapted(directory, tmp_path / "a")


def test_a_directory_of_adapters_names_them(tmp_path):
    for name in ("policy", "reference"):
        write_files(tmp_path / name, GOOD, q_of_both_layers())
    with pytest.raises(ChesError, match="it holds 2 adapters, policy, reference: give the folder of one"):
        adapter_directory(tmp_path)


def test_a_pattern_that_would_take_for_ever_is_refused(base, tmp_path, monkeypatch):
    monkeypatch.setattr("ches_jax.models.adapters.settings.PATTERN_SECONDS", 0.1)
    tensors = {f"{MODULE}.lora_A.weight": np.ones((2, 24)), f"{MODULE}.lora_B.weight": np.ones((20, 2))}
    for i, pattern in enumerate(("(?:a|a|.|..|...)*[A-Z]", "(?:.|..|...|.?.?.?)*[A-Z]")):
        write_files(tmp_path / f"a{i}", {**GOOD, "alpha_pattern": {pattern: 2}}, tensors)
        with pytest.raises(ChesError, match=r"'alpha_pattern' takes longer than 0\.1 seconds to match module names"):
            read_adapter(tmp_path / f"a{i}", base("llama"))


def test_targets_are_checked(base):
    config = decoder_config(read_config(base("gpt2")))
    assert sorted(make_spec(1, 1.0, "all-linear", config)) == [
        "layers.mlp.down_proj",
        "layers.mlp.up_proj",
        *(f"layers.self_attn.{p}_proj" for p in "koqv"),
    ]
    moe = decoder_config(read_config(base("qwen3_moe")))
    dense = set(make_spec(1, 1.0, "all-linear", moe))
    named = {"layers.1.mlp.router", "layers.1.mlp.experts.up_proj"}
    assert not dense & named and set(make_spec(1, 1.0, "all-linear, expert_up, router", moe)) == dense | named
    with pytest.raises(ChesError, match="this model has no ''; expected all-linear"):
        make_spec(1, 1.0, "", config)
    with pytest.raises(ChesError, match="this model has no 'gate', 'lm_head'; expected all-linear or names of q, k"):
        make_spec(1, 1.0, "q,gate,lm_head", config)
    with pytest.raises(ChesError, match=r"rank 0 and alpha 1\.0: expected positive numbers"):
        make_spec(0, 1.0, "q", config)


def test_an_adapter_loads_beside_the_model_or_into_it(base, tmp_path):
    directory = base("llama")
    spec = make_spec(3, 6.0, "all-linear", decoder_config(read_config(directory)))
    model, params = with_adapters(directory, spec)
    write_adapter(tmp_path / "adapter", params, spec, directory)
    expected = logits(model)
    np.testing.assert_array_equal(logits(load_adapted(directory, tmp_path / "adapter")), expected)
    actual = logits(load_merged(directory, tmp_path / "adapter"))
    np.testing.assert_allclose(actual, expected, atol=1e-5 * np.abs(expected).max())
    with pytest.raises(ChesError, match=r"no adapter_model\.safetensors; expected a PEFT adapter directory"):
        load_adapted(directory, directory)
