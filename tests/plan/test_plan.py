"""What a run would need: collectives from the compiled text, bytes and FLOPs by arithmetic, and the compiler's word."""

import json
import math
from importlib.util import find_spec
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ches_jax.cli import main
from ches_jax.distributed.mesh import ROW_AXES, make_mesh, parse_mesh
from ches_jax.errors import ChesError
from ches_jax.models.attention.dense import dense
from ches_jax.models.decoder import abstract_parameters
from ches_jax.models.families.registry import decoder_config
from ches_jax.models.sharding import partition_spec
from ches_jax.models.unembedding_pieces import PIECE
from ches_jax.plan import arithmetic, programs
from ches_jax.plan.compiled_text import Collective, collectives, totals
from ches_jax.plan.config import PlanConfig
from ches_jax.plan.run import plan, table
from ches_jax.plan.topologies import parse_topology

LLAMA_8B = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 4096, "intermediate_size": 14336,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256,
    "max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "hidden_act": "silu",
    "tie_word_embeddings": False,
}  # fmt: skip

TEXT = """\
%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%inner_condition (p: (u32[], bf16[8,64])) -> pred[] {
  %eight = u32[]{:T(128)} constant(8)
  %p = (u32[], bf16[8,64]) parameter(0)
  %n = u32[]{:T(128)} get-tuple-element(%p), index=0
  ROOT %less = pred[]{:T(512)} compare(%n, %eight), direction=LT
}

%inner (p: (u32[], bf16[8,64])) -> (u32[], bf16[8,64]) {
  %p = (u32[], bf16[8,64]) parameter(0)
  %w = bf16[8,64]{1,0} get-tuple-element(%p), index=1
  %ring = (bf16[8,64]{1,0}, bf16[8,64]{1,0}, u32[], u32[]) collective-permute-start(%w), metadata={op_name="ring"}
  %done = bf16[8,64]{1,0} collective-permute-done(%ring)
  %two = u32[]{:T(128)} constant(2)
  %i = u32[]{:T(128)} get-tuple-element(%p), index=0
  %next = u32[]{:T(128)} add(%i, %two), metadata={op_name="ring"}
  ROOT %t = (u32[], /*index=1*/bf16[8,64]) tuple(%next, /*index=1*/%done)
}

%condition (p: (s32[], bf16[8,64])) -> pred[] {
  %layers = s32[] constant(32)
  %p = (s32[], bf16[8,64]) parameter(0)
  %n = s32[] get-tuple-element(%p), index=0
  ROOT %less = pred[] compare(%n, %layers), direction=LT
}

%body (p: (s32[], bf16[8,64])) -> (s32[], bf16[8,64]) {
  %p = (s32[], bf16[8,64]) parameter(0)
  %loop = (u32[], bf16[8,64]) while(%p), condition=%inner_condition, body=%inner
  ROOT %t = (s32[], bf16[8,64]) tuple(%p, %loop)
}

ENTRY %main (x: bf16[8,64]) -> f32[16] {
  %x = bf16[8,64]{1,0} parameter(0)
  %loop = (s32[], bf16[8,64]) while(%x), condition=%condition, body=%body
  %reduced = f32[16]{0} all-reduce(%loop), to_apply=%add, metadata={op_name="sum"}
  ROOT %out = f32[16]{0} copy(%reduced)
}
"""


def test_collectives_in_loops_count_as_often_as_they_run():
    """Each layer of a scan, every second piece of a ring; what starts and is done later counts once."""
    assert collectives(TEXT) == [
        Collective("collective-permute", 8 * 64 * 2, 32 * 4, "ring"), Collective("all-reduce", 64, 1, "sum"),
    ]  # fmt: skip
    expected = {"runs": 128, "bytes": 128 * 1024, "largest": 1024}
    assert totals(collectives(TEXT))["collective-permute"] == expected


def test_how_often_a_loop_runs_may_be_written_beside_it():
    """Where what compares the counter is a fusion, as newer compilers have it on a CPU, nothing else says it."""
    bound = "  ROOT %less = pred[] compare(%n, %layers), direction=LT\n"
    fused = TEXT.replace(bound, "  ROOT %less = pred[] fusion(%n, %layers), kind=kLoop, calls=%compared\n")
    assert [c.times for c in collectives(fused)] == [4, 1]
    place = "while(%x), condition=%condition, body=%body"
    counted = fused.replace(place, place + ', backend_config={"known_init_step":{},"known_trip_count":{"n":"32"}}')
    assert collectives(counted) == collectives(TEXT)


def test_a_collective_in_the_parts_of_a_chain_counts_once():
    """Beside other work it is in the fusion that starts it and in each that carries it on, under one channel."""
    part = """
%part.{n} (a: f32[4]) -> f32[16] {{
  %a = f32[4]{{0}} parameter(0)
  ROOT %g.{n} = f32[16]{{0}} all-gather(%a), channel_id={channel}, dimensions={{0}}
}}
"""
    calls = "".join(f"  %f.{n} = f32[16]{{0}} fusion(%a), kind=kCustom, calls=%part.{n}\n" for n in range(3))
    entry = f"ENTRY %main (a: f32[4]) -> f32[16] {{\n  %a = f32[4]{{0}} parameter(0)\n{calls}}}\n"
    for channels, runs in ((7, 7, 7), 1), ((7, 7, 8), 2):
        text = "".join(part.format(n=n, channel=channel) for n, channel in enumerate(channels)) + entry
        assert totals(collectives(text))["all-gather"]["runs"] == runs


def test_collectives_of_one_channel_count_each():
    """All those that a program writes itself have the same one; only in fusions does it name the collective."""
    mesh = make_mesh("data=8")

    def both(a):
        first, second = (jax.lax.all_gather(a * n, "data") for n in (2, 3))
        return first @ second.swapaxes(-1, -2), jax.lax.all_gather(a[:1] + 1, "data")

    run = jax.shard_map(both, mesh=mesh, in_specs=PartitionSpec("data"), out_specs=PartitionSpec(), check_vma=False)
    text = str(jax.jit(run).lower(jnp.ones((16, 4))).compile().as_text())
    assert text.count("channel_id=1,") == 3 and "channel_id=2" not in text
    assert sorted(c.bytes for c in collectives(text)) == [8 * 4 * 4, 16 * 4 * 4, 16 * 4 * 4]


def test_the_text_of_this_machine_s_compiler_is_read():
    devices = jax.devices()
    if len(devices) < 2:
        pytest.skip("needs two devices, as the CPU backend of the tests has them with XLA_FLAGS")
    mesh = Mesh(np.array(devices[:2]), ("x",))
    whole, parts = (NamedSharding(mesh, PartitionSpec(*s)) for s in ((), ("x",)))
    run = jax.jit(lambda a: a * 2, in_shardings=parts, out_shardings=whole)
    text = run.lower(jax.ShapeDtypeStruct((8, 4), jnp.float32)).compile().as_text()
    found = collectives(str(text))
    assert [(c.kind, c.bytes) for c in found] == [("all-gather", 8 * 4 * 4)]


def test_bytes_are_those_of_the_partition_table():
    decoder = decoder_config(LLAMA_8B)
    count = sum(int(np.prod(p.shape)) for p in abstract_parameters(decoder).values())
    score = PlanConfig(what="score", topology="v5e:4x4")
    one, sixteen = ({"data": 16 // n, "fsdp": n, "tensor": 1} for n in (1, 16))
    assert arithmetic.bytes_of(decoder, score, one).weights == 2 * count
    assert arithmetic.bytes_of(decoder, score, sixteen).weights == 2 * count / 16
    train = PlanConfig(what="train", topology="v5e:4x4")
    assert arithmetic.bytes_of(decoder, train, sixteen)[:2] == (4 * count / 16, 8 * count / 16)
    lora = PlanConfig(what="train", topology="v5e:4x4", lora_rank=8)
    assert arithmetic.bytes_of(decoder, lora, sixteen)[:2] == (2 * count / 16, 0)


def test_flops_are_two_for_each_weight_and_attention():
    decoder = decoder_config(LLAMA_8B)
    layer = 4096 * 4096 * 2 + 2 * 4096 * 1024 + 3 * 4096 * 14336
    assert arithmetic.flops_of_token(decoder, 1, logits=True) == 2 * (32 * layer + 4096 * 128256) + 4 * 4096 * 32
    double = arithmetic.flops_of_token(decoder, 2001, logits=False) - arithmetic.flops_of_token(
        decoder, 1, logits=False
    )
    assert double == 2 * 4096 * 2000 * 32


def test_a_token_goes_through_its_experts_and_no_others():
    """Mixtral's routed layer of 4 experts: each token through 2 of them, three matrices each."""
    mixtral = decoder_config({**LLAMA_8B, "model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2})
    attention, expert = 4096 * 4096 * 2 + 2 * 4096 * 1024, 3 * 4096 * 14336
    per_layer = attention + 2 * expert + 4 * 4096  # and the router
    assert arithmetic.flops_of_token(mixtral, 1, logits=False) == 32 * (2 * per_layer + 4 * 4096)


def test_a_gradient_costs_two_forward_passes_and_one_of_adapters_alone():
    decoder = decoder_config(LLAMA_8B)
    forward = arithmetic.flops_of_pair(decoder, PlanConfig(what="score", topology="h100:8", logps=True))
    for rank, times in ((None, 3), (8, 2)):
        config = PlanConfig(what="train", topology="h100:8", lora_rank=rank, epochs=2)
        assert arithmetic.flops_of_pair(decoder, config) == 2 * times * forward


def test_a_matrix_is_sharded_over_both_axes_and_a_norm_over_one():
    decoder = decoder_config(LLAMA_8B)
    norms = (2 * 32 + 1) * 4096
    matrices = sum(int(np.prod(p.shape)) for p in abstract_parameters(decoder).values()) - norms
    assert arithmetic.held(decoder, {"data": 1, "fsdp": 4, "tensor": 2}) == matrices // 8 + norms // 4


def test_auto_takes_the_mesh_that_moves_least_of_those_that_fit():
    found = plan(PlanConfig(what="score", topology="h100:8"), quiet=True)
    assert found["mesh"] == "data=8" and found["estimate"]["says"].startswith("a roofline")
    assert "DOES NOT FIT" not in table(found)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"optimizer": "adam"}, "no optimiser is named 'adam'"), ({"loss": "dpoo"}, "dpoo")],
)
def test_what_is_not_there_is_not_planned(options, message):
    with pytest.raises(ChesError, match=message):
        plan(PlanConfig(what="train", topology="h100:8", **options), quiet=True)


QWEN3_MOE = {
    "model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], "hidden_size": 2048,
    "moe_intermediate_size": 768, "intermediate_size": 6144, "num_hidden_layers": 48, "num_attention_heads": 32,
    "num_key_value_heads": 4, "head_dim": 128, "num_experts": 128, "num_experts_per_tok": 8, "norm_topk_prob": True,
    "vocab_size": 151936, "max_position_embeddings": 40960, "rms_norm_eps": 1e-6, "rope_theta": 1000000.0,
    "hidden_act": "silu", "tie_word_embeddings": False, "decoder_sparse_step": 1, "mlp_only_layers": [],
}  # fmt: skip


def test_experts_lie_over_their_own_axis_where_gathering_them_would_move_more():
    """Tokens to experts, not 57 GB of experts to tokens; of a model without experts the axis is never proposed."""
    decoder = decoder_config(QWEN3_MOE)
    config, pod = PlanConfig(what="train", topology="v5e:16x16"), parse_topology("v5e:16x16")
    first = [found.sizes for found in arithmetic.layouts(decoder, config, pod)]
    assert first[0]["expert"] > 1 and all(math.prod(sizes.values()) == 256 for sizes in first)
    gathered, sent = ({"data": 1, "fsdp": 256 // n, "tensor": 1, "expert": n} for n in (1, 8))
    assert arithmetic.moved(decoder, config, sent) < arithmetic.moved(decoder, config, gathered) / 3
    assert arithmetic.held(decoder, gathered) == pytest.approx(30.5e9 / 256, rel=0.01)
    assert {f.sizes["expert"] for f in arithmetic.layouts(decoder_config(LLAMA_8B), config, pod)} == {1}


def test_a_model_that_a_host_holds_is_planned_for_processes_that_share_no_batch():
    """What is within a host is a mesh of a host; what is not, or is trained, takes all devices."""
    decoder, pod = decoder_config(LLAMA_8B), parse_topology("v5e:4x4")
    score = PlanConfig(what="score", topology=pod.name)
    found = {tuple(f.sizes.values()): f.meshes for f in arithmetic.layouts(decoder, score, pod)}
    assert found[4, 1, 1, 1] == found[2, 2, 1, 1] == found[1, 1, 4, 1] == 4
    assert found[2, 8, 1, 1] == found[1, 16, 1, 1] == found[2, 1, 8, 1] == 1
    assert all(math.prod(sizes) * meshes == 16 for sizes, meshes in found.items())
    train = PlanConfig(what="train", topology=pod.name)
    assert {f.meshes for f in arithmetic.layouts(decoder, train, pod)} == {1}
    plans = {
        mesh: plan(PlanConfig(what="score", topology=pod.name, mesh=mesh, arithmetic=True), quiet=True)
        for mesh in ("data=4", "data=16")
    }
    assert [p["processes_share"] for p in plans.values()] == ["chunks", "batches"]
    one, other = (p["estimate"]["pairs_a_step"] for p in plans.values())
    assert one == other
    with pytest.raises(ChesError, match="has 4 devices, v5e:4x4 has 16, a host of it 4"):
        plan(PlanConfig(what="train", topology=pod.name, mesh="data=4", arithmetic=True), quiet=True)


def test_what_the_pass_gives_lies_as_its_rows_do_and_no_statistic_is_gathered():
    """Whatever the number of processes, so that a plan compiles the program of the run."""
    decoder = decoder_config({**LLAMA_8B, "num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 128,
                              "num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": 4096})  # fmt: skip
    config = PlanConfig(what="score", topology="h100:8", row_tokens=128, dtype="float32", logps=True)
    for text in ("data=8", "data=2,fsdp=4", "data=2,fsdp=2,tensor=2"):
        (program,) = programs.score(decoder, config, make_mesh(text), dense)
        lowered = program.lower()
        compiled = lowered.compile()
        assert {result.spec[0] for result in jax.tree.leaves(compiled.output_shardings)} == {ROW_AXES}
        statistics = {math.prod(a.shape) for a in jax.tree.leaves(lowered.out_info)}
        gathered = {c.bytes // 4 for c in collectives(compiled.as_text()) if c.kind == "all-gather"}
        assert not gathered if text == "data=8" else gathered
        # matrices of a layer, and states of a piece of the rows: no table of the vocabulary, no sum of a segment
        assert not gathered & statistics and max(gathered, default=0) < decoder.vocab_size * decoder.width / 2


def test_generation_keeps_the_unembedding_where_it_lies():
    """Prefill and the loop over tokens: matrices of a layer are gathered, nothing as large as a table."""
    decoder = decoder_config({**LLAMA_8B, "num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 128,
                              "num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": 4096})  # fmt: skip
    config = PlanConfig(what="generate", topology="h100:8", prompt_tokens=32, new_tokens=4, dtype="float32")
    for program in programs.generate(decoder, config, make_mesh("data=2,fsdp=2,tensor=2")):
        found = collectives(str(program.lower().compile().as_text()))
        gathered = [c.bytes // 4 for c in found if c.kind == "all-gather"]
        assert gathered and max(gathered) < decoder.vocab_size * decoder.width / 4


def test_what_auto_orders_by_is_what_travels():
    decoder, score = decoder_config(LLAMA_8B), PlanConfig(what="score", topology="v5e:4x4", row_tokens=1000)
    sizes = {"data": 1, "fsdp": 1, "tensor": 1, "expert": 1}
    count = sum(int(np.prod(p.shape)) for p in abstract_parameters(decoder).values())
    assert arithmetic.moved(decoder, score, sizes) == 0
    assert arithmetic.moved(decoder, score, sizes | {"fsdp": 4}) == 2 * count * 3 / 4
    # two sums a layer that each send and receive, of half of the devices' states
    assert arithmetic.moved(decoder, score, sizes | {"tensor": 2}) == 2 * (4 * 32 * 1000 * 4096 * 2) / 2


def test_a_config_alone_is_enough_and_what_does_not_fit_is_reported(tmp_path, capsys):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(LLAMA_8B))
    words = ["plan", "train", "--model", str(path), "--topology", "h100:1", "--json", "--quiet"]
    assert main(words) == 1
    record = json.loads(capsys.readouterr().out)
    assert not record["fits"] and record["mesh"] == "data=1" and record["counted"] == "by arithmetic"
    assert main([*words[:-2], "--lora-rank", "8", "--json", "--quiet"]) == 0


def test_the_table_of_the_pods_is_that_of_the_plans():
    """Rendered anew from the files, each of which the compiler made."""
    from experiments.pods import __main__ as pods

    assert pods.render() in pods.PAGE.read_text(encoding="utf-8")
    for file in (pods.HERE / "plans").glob("*.json"):
        found = json.loads(file.read_text())
        assert found["versions"].get("libtpu") and found["bytes"]["total"] != 0
        if found["counted"] == "by arithmetic":
            assert (
                "not_compiled" in found
                or found["bytes"]["weights"] + found["bytes"]["optimiser"] > found["bytes"]["of"]
            )
        elif found["fits"]:
            assert found["bytes"]["weights"] < found["bytes"]["total"]
            assert found["bytes"]["total"] <= 0.92 * found["bytes"]["of"]
            nothing_sharded_is_gathered(pods.HERE / "configs" / f"{Path(found['model']).name}", found)


def axes_of(entry):
    return () if entry is None else (entry,) if isinstance(entry, str) else entry


def nothing_sharded_is_gathered(config, found):
    """A layer's matrix over ``fsdp`` is, or a piece of what the unembedding needs; tokens over ``expert``; no table.

    Over two slices a sum of gradients is scattered within each, added, and gathered: of adapters in one such sum each.
    """
    decoder, sizes, options = (
        decoder_config(json.loads(config.read_text())),
        parse_mesh(found["mesh"]),
        found["options"],
    )
    layers = {n: leaf for n, leaf in abstract_parameters(decoder).items() if n.startswith("layers.")}
    mesh = arithmetic.logical_mesh({**sizes, "fsdp": 1})
    of_layer = [
        math.prod(leaf.shape[1:])
        // math.prod(mesh.size(*axes) for axes in map(axes_of, partition_spec(n, leaf.shape, mesh)))
        for n, leaf in layers.items()
    ]
    trained = found["what"] in ("train", "forecast")
    numbers = max(max(of_layer), PIECE if trained else 0) if sizes["fsdp"] > 1 else 0
    tokens = options["rows"] * options["prompt_tokens" if found["what"] == "generate" else "row_tokens"]
    if sizes["expert"] > 1:  # the hidden states of the tokens that a group of experts shares
        numbers = max(numbers, sizes["expert"] * tokens * decoder.width)
    if found["slices"] > 1 and options["lora_rank"] is not None:
        numbers = max(numbers, options["lora_rank"] * max(max(leaf.shape[1:]) for leaf in layers.values()))
    largest = {kind: one["largest"] for kind, one in found["collectives"].items()}
    assert largest.get("all-gather", 0) <= 2 * numbers, (found["what"], found["mesh"])  # in bfloat16
    if trained and options["lora_rank"] is None and sizes["tensor"] * sizes["expert"] * sizes["data"] == 1:
        # a matrix and its gradient in bfloat16, a piece of the unembedding's gradient in float32; never the states
        allowed = max(2 * max(of_layer), 4 * PIECE)
        assert all(size <= allowed for size in largest.values()), largest


@pytest.mark.parametrize(
    ("topology", "said"),
    [
        ("v9:4x4", "expected a chip"),
        ("v5e:4", "has 2 dimensions"),
        ("v5p:4x4", "such as v5p:2x2x4"),
        ("v5e", "its grid"),
    ],
)
def test_a_topology_that_is_none_is_reported(topology, said):
    with pytest.raises(ChesError, match=said):
        parse_topology(topology)


def test_a_mesh_that_does_not_take_all_devices_is_reported():
    with pytest.raises(ChesError, match="has 4 devices, h100:8 has 8"):
        plan(PlanConfig(what="score", topology="h100:8", mesh="fsdp=4"), quiet=True)


@pytest.mark.skipif(find_spec("libtpu") is not None, reason="the TPU compiler is installed")
def test_without_the_tpu_s_compiler_one_message_names_the_extra():
    with pytest.raises(ChesError, match=r"pip install 'ches-jax\[tpu\]'; --arithmetic counts without it"):
        plan(PlanConfig(what="score", topology="v5e:4x4"), quiet=True)
    found = plan(PlanConfig(what="score", topology="v5e:4x4", arithmetic=True), quiet=True)
    assert found["counted"] == "by arithmetic" and found["devices"] == 16


@pytest.mark.slow
@pytest.mark.skipif(find_spec("libtpu") is None, reason="needs the TPU's compiler: pip install 'ches-jax[tpu]'")
def test_a_pass_compiled_for_a_slice_gathers_no_weight_of_a_layer_whole():
    found = plan(PlanConfig(what="score", topology="v5e:2x2", mesh="fsdp=4"), quiet=True)
    assert found["fits"] and found["counted"] == "by the compiler"
    assert found["bytes"]["weights"] < found["parameters"] * 2
