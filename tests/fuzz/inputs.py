"""What is fuzzed: for each reader, how a damaged input is made from a number, and how it is read.

A harness is a function of a source of randomness and an empty folder: it writes an input there, and returns the call
that reads it. Everything that reads files of others has one; ``REFUSED`` is the only error that it may raise.
"""

import bz2
import contextlib
import csv
import gzip
import hashlib
import io
import json
import lzma
import os
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq

from ches_jax import bundled
from ches_jax.errors import ChesError
from tests.displacement.test_log_variants import WANDB, journal
from tests.displacement.test_log_variants import messages_of as journal_messages
from tests.fuzz.mutate import as_json, in_bytes, in_table, in_text, in_value, odd

REFUSED = ChesError
LOGS = Path(__file__).parents[1] / "displacement" / "logs"
Read = Callable[[], Any]
Harness = Callable[[Random, Path], Read]
HARNESSES: dict[str, Harness] = {}


def harness(make: Harness) -> Harness:
    """Enter a harness under its name."""
    HARNESSES[make.__name__] = make
    return make


# rows of data

TALK = [{"role": "user", "content": "How are you?"}]
ROWS: list[list[dict[str, Any]]] = [
    [{"prompt": f"Q{i}", "chosen": f" yes {i}", "rejected": " no", "category": "c", "score": i} for i in range(4)],
    [
        {
            "prompt": TALK,
            "chosen": [{"role": "assistant", "content": f"Fine {i}."}],
            "rejected": [{"role": "assistant", "content": "No."}],
            "tools": [{"type": "function"}],
        }
        for i in range(3)
    ],
    [{"chosen": f"\n\nHuman: a{i}\n\nAssistant: b", "rejected": f"\n\nHuman: a{i}\n\nAssistant: c"} for i in range(3)],
    [{"prompt": "p", "responses": ["a", "b", "c"], "scores": [0.1, 2, -1], "chosen": 1} for _ in range(2)],
    [{"instruction": "p", "response_a": "x", "response_b": f"y{i}", "winner": "model_a"} for i in range(3)],
    [{"question": "p", "answers": [{"text": "x", "score": 4}, {"text": "y", "score": 1}]}] * 2,
    [
        {
            "conversations": [{"from": "human", "value": "a"}],
            "chosen": {"from": "gpt", "value": "b"},
            "rejected": {"from": "gpt", "value": "c"},
        }
    ]
    * 2,
    [{"prompt": "p", "completion": f"c{i}", "label": bool(i % 2)} for i in range(4)],
    [{"prompt_ids": [5, 6], "chosen_ids": [7, 2], "rejected_ids": [8, 2]}] * 2,
]
WORDS = (
    "prompt",
    "chosen",
    "rejected",
    "responses",
    "scores",
    "winner",
    "label",
    "messages",
    "role",
    "content",
    "category",
    "tools",
    "chat_template_kwargs",
    "prompt_ids",
    "text",
    "instruction",
    "response_a",
    "response_b",
    "model_a",
    "rank",
    "system",
    "input",
    "conversations",
    "from",
    "value",
    "completion",
    "score_chosen",
    "score_rejected",
)
LINES = (".jsonl", ".json", ".csv", ".tsv", ".txt")
TABLES = (".parquet", ".arrow", ".feather")


def rows_of(rng: Random) -> list[dict[str, Any]]:
    rows = in_value(rng, rng.choice(ROWS), WORDS) if rng.random() < 0.8 else rng.choice(ROWS)
    return rows if isinstance(rows, list) else [rows]


def text_file(rng: Random, rows: list[Any], suffix: str) -> bytes:
    if suffix == ".jsonl":
        return b"\n".join(as_json(rng, row) for row in rows) + rng.choice([b"", b"\n", b"\n\n", b"\r\n"])
    if suffix == ".json":
        document = rng.choice([rows, {"data": rows}, {"train": rows, "test": rows}, rows[0] if rows else None])
        return as_json(rng, document)
    if suffix == ".txt":
        return "\n".join(map(str, rows)).encode("utf-8", "surrogatepass")
    objects = [row for row in rows if isinstance(row, dict)] or [{}]
    out = io.StringIO()
    writer = csv.DictWriter(
        out, [str(k) for k in objects[0]], extrasaction="ignore", delimiter="\t" if suffix == ".tsv" else ","
    )
    writer.writeheader()
    writer.writerows(objects)
    return out.getvalue().encode("utf-8", "surrogatepass")


def table_of(rng: Random) -> pa.Table:
    return in_table(rng, pa.Table.from_pylist(rng.choice(ROWS)))


def table_file(table: pa.Table, suffix: str, path: Path, rng: Random) -> bytes:
    if suffix == ".parquet":
        pq.write_table(table, path, compression=rng.choice(["snappy", "none", "zstd"]), row_group_size=2)
    elif suffix == ".feather":
        pyarrow.feather.write_feather(table, str(path), compression=rng.choice(["uncompressed", "lz4", "zstd"]))
    else:
        kind = pa.ipc.new_file if rng.random() < 0.5 else pa.ipc.new_stream
        with pa.OSFile(str(path), "wb") as sink, kind(sink, table.schema) as writer:
            writer.write_table(table)
    return path.read_bytes()


def read_rows(path: Path, rng: Random) -> Read:
    """Everything that is done with rows before a model sees them."""
    from ches_jax.data.sources import open_pairs, open_prompts
    from ches_jax.health.examine import examine
    from ches_jax.inputs import Opener
    from ches_jax.judges.responses import asked_and_answered, open_responses, read_labels
    from ches_jax.runs.json_text import json_bytes

    def pairs() -> None:
        source = open_pairs(str(path), pairing=rng.choice([None, "all-pairs"]))
        for record in source.tolerant():
            json_bytes({**record.content, "extra": dict(record.extra), "category": record.category}).decode()
        source.fingerprint()
        list(source)

    def responses() -> None:
        source = open_responses(Opener(), str(path), None, {})
        for row in source:
            if not row.fault:
                asked_and_answered(row)

    ways = {
        "pairs": pairs,
        "prompts": lambda: list(open_prompts(str(path)).tolerant()),
        "responses": responses,
        "labels": lambda: read_labels(Opener(), str(path), {}),
        "health": lambda: str(examine(open_pairs(str(path))).to_json()),
    }
    return ways[rng.choice(["pairs", "pairs", *ways])]


@harness
def lines(rng: Random, folder: Path) -> Read:
    suffix = rng.choice(LINES)
    data = text_file(rng, rows_of(rng), suffix)
    path = folder / f"a{suffix}"
    path.write_bytes(in_bytes(rng, data) if rng.random() < 0.4 else data)
    return read_rows(path, rng)


@harness
def tables(rng: Random, folder: Path) -> Read:
    suffix = rng.choice(TABLES)
    path = folder / f"a{suffix}"
    data = table_file(table_of(rng), suffix, path, rng)
    path.write_bytes(in_bytes(rng, data) if rng.random() < 0.6 else data)
    return read_rows(path, rng)


@harness
def compressed(rng: Random, folder: Path) -> Read:
    inner = rng.choice((*LINES, ".parquet"))
    path = folder / f"a{inner}"
    data = table_file(table_of(rng), inner, path, rng) if inner == ".parquet" else text_file(rng, rows_of(rng), inner)
    path.unlink(missing_ok=True)
    outer = rng.choice([".gz", ".bz2", ".xz", ".zst"])
    squeeze = {
        ".gz": gzip.compress,
        ".bz2": bz2.compress,
        ".xz": lzma.compress,
        ".zst": lambda d: pa.compress(d, codec="zstd", asbytes=True),
    }[outer]
    data = squeeze(data)
    path = folder / f"a{inner}{outer}"
    path.write_bytes(in_bytes(rng, data) if rng.random() < 0.7 else data)
    return read_rows(path, rng)


@harness
def folders(rng: Random, folder: Path) -> Read:
    """Folders as the hub lays them out and as ``save_to_disk`` writes them."""
    place = folder / "d"
    place.mkdir()
    if rng.random() < 0.5:
        for name in rng.sample(["train.jsonl", "test.jsonl", "data/train-0.parquet", "dev.csv", "README.md"], 2):
            path = place / name
            path.parent.mkdir(exist_ok=True)
            if path.suffix == ".parquet":
                table_file(table_of(rng), ".parquet", path, rng)
            else:
                path.write_bytes(text_file(rng, rows_of(rng), path.suffix if path.suffix != ".md" else ".txt"))
    else:
        saved = place / rng.choice(["", "train"])
        saved.mkdir(exist_ok=True)
        table = pa.Table.from_pylist(ROWS[0])
        with pa.OSFile(str(saved / "data-00000-of-00001.arrow"), "wb") as f, pa.ipc.new_stream(f, table.schema) as w:
            w.write_table(table)
        state = {"_data_files": [{"filename": "data-00000-of-00001.arrow"}], "_fingerprint": "1", "_split": "train"}
        (saved / "state.json").write_bytes(as_json(rng, in_value(rng, state)))
        info = {"features": {"prompt": {"dtype": "string", "_type": "Value"}}}
        (saved / "dataset_info.json").write_bytes(as_json(rng, in_value(rng, info)))
        if rng.random() < 0.7:
            (place / "dataset_dict.json").write_bytes(as_json(rng, in_value(rng, {"splits": ["train"]})))
    return read_rows(place, rng)


@harness
def tokenised(rng: Random, folder: Path) -> Read:
    """Rows through the tokenizer, the template and the audit."""
    from ches_jax.data.audit import Audit
    from ches_jax.data.sources import rows_in_memory
    from ches_jax.data.tokenize import PairTokenizer

    rows = rows_of(rng)
    template = rng.choice(["auto", "always", "none"])

    def read() -> None:
        source = rows_in_memory(rows, pairing=rng.choice([None, "all-pairs"])).tolerant()
        tokenizer = PairTokenizer(
            bundled_tokenizer(), max_length=64, eos="include", vocab_size=1280, template=template, template_args={}
        )
        audit = Audit(1, 2)
        audit.extend(tokenizer(list(source)))
        audit.to_json()

    return read


@cache
def bundled_tokenizer() -> Any:
    from ches_jax.data.tokenize import load_tokenizer

    return load_tokenizer("bundled")


# what columns mean


@harness
def schemas(rng: Random, folder: Path) -> Read:
    from ches_jax.data.schema.mapping import WORDS as SCHEMA_WORDS
    from ches_jax.data.sources import open_pairs

    words = {
        rng.choice([*SCHEMA_WORDS, "x"]): rng.choice([*WORDS, "a,b", "response_a,response_b", "answers.text", "x.y.z"])
        for _ in range(rng.randrange(1, 5))
    }
    rows = [row for row in rows_of(rng) if isinstance(row, dict)] or [{}]
    path = folder / "a.jsonl"
    path.write_bytes(b"\n".join(json.dumps(row).encode() for row in rows))
    if rng.random() < 0.5:
        return lambda: list(open_pairs(str(path), columns=words))
    kind = rng.choice(["json", "toml"])
    declaration = folder / f"s.{kind}"
    text = (
        as_json(rng, in_value(rng, words))
        if kind == "json"
        else "\n".join(f"{k} = {json.dumps(v)}" for k, v in words.items()).encode()
    )
    declaration.write_bytes(in_bytes(rng, text) if text and rng.random() < 0.3 else text)
    return lambda: list(open_pairs(str(path), schema=str(declaration)))


# model directories


@cache
def configs() -> list[dict[str, Any]]:
    published = Path(__file__).parents[1] / "models" / "published"
    return [
        json.loads(path.read_text()) for path in sorted(published.rglob("*.json")) if "model_type" in path.read_text()
    ]


CONFIG_WORDS = (
    "rope_scaling",
    "rope_parameters",
    "rope_theta",
    "type",
    "factor",
    "yarn",
    "llama3",
    "longrope",
    "linear",
    "dynamic",
    "layer_types",
    "sliding_window",
    "sliding_attention",
    "full_attention",
    "head_dim",
    "hidden_act",
    "torch_dtype",
    "tie_word_embeddings",
    "quantization_config",
    "num_hidden_layers",
    "vocab_size",
    "model_type",
    "rms_norm_eps",
)


@harness
def model_configs(rng: Random, folder: Path) -> Read:
    from ches_jax.models.checkpoint.stored_names import effective_config
    from ches_jax.models.families.registry import decoder_config

    raw = in_value(rng, rng.choice(configs()), CONFIG_WORDS)
    if rng.random() < 0.5 and isinstance(raw, dict):
        return lambda: decoder_config(raw, "a model")
    (folder / "config.json").write_bytes(as_json(rng, raw))
    shutil.copy(bundled.model_dir() / "model.safetensors", folder / "model.safetensors")
    return lambda: decoder_config(effective_config(folder), str(folder))


@harness
def tokenizers(rng: Random, folder: Path) -> Read:
    """A tokenizer's files and the generation config, damaged; then a pair is tokenised and stop tokens are found."""
    from ches_jax.data.sources import rows_in_memory
    from ches_jax.data.tokenize import PairTokenizer, load_tokenizer, tokenizer_fingerprint
    from ches_jax.generate.stops import stop_ids

    model = bundled.model_dir()
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "config.json"):
        shutil.copy(model / name, folder / name)
    special = {"bos_token": "<bos>", "eos_token": {"content": "<eos>", "lstrip": False}}
    generation = {"eos_token_id": [2, 3], "bos_token_id": 1, "temperature": 0.5}
    for name, value in (("special_tokens_map.json", special), ("generation_config.json", generation)):
        if rng.random() < 0.5:
            (folder / name).write_bytes(as_json(rng, in_value(rng, value)))
    path = folder / rng.choice(["tokenizer.json", "tokenizer_config.json", "tokenizer_config.json", "config.json"])
    words = (
        "model",
        "type",
        "BPE",
        "WordPiece",
        "Unigram",
        "merges",
        "vocab",
        "added_tokens",
        "content",
        "chat_template",
        "normalizer",
        "pre_tokenizer",
        "ByteLevel",
        "decoder",
        "model_max_length",
        "tokenizer_class",
    )
    text = path.read_bytes()
    path.write_bytes(
        in_bytes(rng, text) if rng.random() < 0.3 else as_json(rng, in_value(rng, json.loads(text), words))
    )

    def read() -> None:
        tokenizer = load_tokenizer(folder)
        tokenizer_fingerprint(tokenizer)
        stop_ids(folder, tokenizer, ("<eos>",))
        PairTokenizer(tokenizer, max_length=64, eos="exclude", vocab_size=1280, template="auto", template_args={})(
            list(rows_in_memory(ROWS[rng.randrange(2)]))
        )

    return read


@cache
def weights() -> bytes:
    from safetensors.numpy import save

    return save(
        {"a.weight": np.ones((3, 4), np.float32), "b.weight": np.zeros(5, np.float16), "c": np.ones((), np.float64)}
    )


@harness
def tensors(rng: Random, folder: Path) -> Read:
    from ches_jax.hf.directory import fingerprint, model_files
    from ches_jax.hf.tensors import open_tensors

    data = weights()
    size = int.from_bytes(data[:8], "little")
    header, rest = json.loads(data[8 : 8 + size]), data[8 + size :]
    if rng.random() < 0.6:
        words = ("F32", "BF16", "I64", "F8_E4M3", "dtype", "shape", "data_offsets", "__metadata__", "a.weight")
        text = as_json(rng, in_value(rng, header, words))
        length = len(text) if rng.random() < 0.9 else rng.choice([0, 1, 2**62, 2**63, 10**8, len(text) - 1])
        data = length.to_bytes(8, "little") + text + rest
    else:
        data = in_bytes(rng, data)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    if rng.random() < 0.5:
        (folder / "model.safetensors").write_bytes(data)
    else:
        (folder / "m-1.safetensors").write_bytes(data)
        (folder / "m-2.safetensors").write_bytes(weights())
        index = {"metadata": {"total_size": 1}, "weight_map": {"a.weight": "m-1.safetensors", "c": "m-2.safetensors"}}
        (folder / "model.safetensors.index.json").write_bytes(as_json(rng, in_value(rng, index)))

    def read() -> None:
        model_files(folder)
        fingerprint(folder)
        for tensor in open_tensors(folder).values():
            tensor.read()

    return read


@harness
def adapters(rng: Random, folder: Path) -> Read:
    from safetensors.numpy import save

    from ches_jax.models.adapters.peft import adapter_fingerprint, read_adapter

    config = {
        "peft_type": "LORA",
        "r": 2,
        "lora_alpha": 4,
        "target_modules": ["q_proj"],
        "rank_pattern": {"q_proj": 2},
        "alpha_pattern": {"layers.0.*": 3.0},
        "use_rslora": False,
        "bias": "none",
    }
    arrays = {
        f"base_model.model.model.layers.{layer}.self_attn.q_proj.lora_{p}.weight": np.ones(
            (2, 128) if p == "A" else (128, 2), np.float32
        )
        for layer in range(5)
        for p in "AB"
    }
    if rng.random() < 0.4:
        name = rng.choice(list(arrays))
        values = arrays.pop(name)
        if rng.random() < 0.7:
            arrays[in_text(rng, name, ["layers", "7", "-1", "lm_head", "A", "."])] = values[: rng.choice([0, 1, 2])]
    words = (
        "q_proj",
        ".*",
        "(",
        "layers.0",
        "rank_pattern",
        "use_dora",
        "modules_to_save",
        "r",
        "lora_alpha",
        "(a+)+$",
    )
    if rng.random() < 0.8:
        config = in_value(rng, config, words)
    data = save(arrays) if arrays else weights()
    (folder / "adapter_config.json").write_bytes(as_json(rng, config))
    (folder / "adapter_model.safetensors").write_bytes(in_bytes(rng, data) if rng.random() < 0.3 else data)

    def read() -> None:
        adapter_fingerprint(folder)
        read_adapter(folder, bundled.model_dir())

    return read


# words of the command line

NUMBERS = ("0", "1", "-1", "0.5", "1e-3", "1e400", "9" * 400, "nan", "inf", ".5", "5.", "", "1_0", "٣", "½", "0x1")
PIECES = (
    *NUMBERS,
    "a",
    "b.c",
    "x",
    "+",
    "-",
    "*",
    "/",
    "**",
    "<",
    ">=",
    "==",
    "(",
    ")",
    "((((",
    ",",
    "abs(",
    "log(",
    "min(",
    "max(",
    ":",
    "=",
    "%",
    " ",
    "__class__",
    ".",
    "lambda: 0",
    "True",
    "None",
    "'a'",
    "[0]",
    "not ",
    "if",
)
SAID = (
    "lowest:0.05",
    "lowest:19",
    "window:0.5,512",
    "quantile:0,0.25",
    "below:-10",
    "soft:0.5",
    "highest:5%",
    "data=2,tensor=4",
    "127.0.0.1:80,2,1",
    "lld_rate>0.2",
    "margin<=1e-3",
    "displaced",
    "eval_loss:min",
    "displacement/margin:max",
    "beta=0.1",
    "a - 2 * abs(b.c)",
    "max(a, 2) > 2 * b.c",
    "log(a) / a",
    "now=2024-07-26",
    "enable_thinking=false",
    "prompt=a",
)


@harness
def words(rng: Random, folder: Path) -> Read:
    """Losses with their numbers, rules, expressions, meshes: small grammars of options."""
    from ches_jax import options
    from ches_jax.displacement.verdict import rule_holds
    from ches_jax.distributed.mesh import parse_mesh
    from ches_jax.distributed.processes import parse_processes
    from ches_jax.losses.registry import loss_names
    from ches_jax.select.expression import as_numbers, evaluated, names, parsed
    from ches_jax.select.keep import keep_indices, parse_rule
    from ches_jax.train.best import parse_best
    from ches_jax.train.objective import get_objective
    from ches_jax.train.optimizer import OPTIMIZERS, make_optimizer, make_schedule

    text = "".join(rng.choices(PIECES, k=rng.randrange(1, 8)))
    if rng.random() < 0.7:
        text = in_text(rng, rng.choice(SAID), list(PIECES))
    columns = {"a": np.array([0.0, 1.0, np.nan]), "b.c": np.array([1e308, -1.0, 2.0]), "x": np.zeros(3)}
    values = {
        rng.choice(["beta", "alpha", "gamma", "b1", "eps", "x"]): rng.choice([0, -1, 0.5, 1e308, float("nan"), True])
        for _ in range(rng.randrange(3))
    }

    def expression() -> None:
        tree = parsed(text)
        if set(names(tree)) <= columns.keys():
            evaluated(tree, columns)

    def objective() -> None:
        name = rng.choice([*loss_names(), "sft", text])
        get_objective(name, values, sft=rng.choice([0.0, 0.1, -1.0, float("nan")]), weighted=rng.random() < 0.3)

    def optimiser() -> None:
        make_optimizer(
            rng.choice([*OPTIMIZERS, text]), make_schedule(rng.choice(["cosine", "linear", text]), 1.0, 4), **values
        )

    ways: dict[str, Read] = {
        "keep": lambda: keep_indices(columns["a"], parse_rule(text)),
        "expression": expression,
        "mesh": lambda: parse_mesh(text),
        "processes": lambda: parse_processes(text),
        "rule": lambda: rule_holds(diagnosis(), text),
        "best": lambda: parse_best(text),
        "numbers": lambda: options._numbers([text]),
        "values": lambda: options._values([text]),
        "columns": lambda: options._renamed([text]),
        "column": lambda: as_numbers("x", [odd(rng) for _ in range(3)], ["x"]),
        "loss": objective,
        "optimiser": optimiser,
    }
    return ways[rng.choice(list(ways))]


@cache
def diagnosis() -> Any:
    from ches_jax.displacement.changes import Changes
    from ches_jax.displacement.verdict import diagnose_changes

    return diagnose_changes(Changes(-np.arange(12.0), -2 * np.arange(12.0), "here"))


@harness
def command_lines(rng: Random, folder: Path) -> Read:
    """Whole command lines: what does not parse is one message."""
    from ches_jax.cli import _parsed
    from ches_jax.cli.commands import COMMANDS
    from ches_jax.cli.options import options_of
    from ches_jax.cli.suggest import corrected, the_verb

    verb = rng.choice(list(COMMANDS)) if rng.random() < 0.9 else in_text(rng, rng.choice(list(COMMANDS)), list(PIECES))
    flags = [name for option in options_of(verb, COMMANDS[verb]) for name in option.flags] if verb in COMMANDS else []
    said = []
    for _ in range(rng.randrange(4)):
        said.append(
            in_text(rng, rng.choice(flags), ["-", "=", "x"]) if flags and rng.random() < 0.8 else rng.choice(PIECES)
        )
        said += rng.choices([*PIECES, *SAID], k=rng.choice([0, 1, 1, 2]))

    def read() -> None:
        known = the_verb(verb, tuple(COMMANDS))
        if not {"-h", "--help"} & set(said):
            _parsed(known, COMMANDS[known], corrected(known, COMMANDS[known], said))

    return read


# run directories


@cache
def runs() -> dict[str, dict[str, bytes]]:
    """Valid run directories, by the command that makes such ones: name of a file -> its bytes."""
    from tempfile import TemporaryDirectory

    from tests.fuzz.material import write_runs

    with TemporaryDirectory() as folder:
        write_runs(Path(folder))
        return {
            run.name: {p.relative_to(run).as_posix(): p.read_bytes() for p in sorted(run.rglob("*")) if p.is_file()}
            for run in sorted(Path(folder).iterdir())
        }


RUN_WORDS = (
    "config",
    "pairs",
    "counts",
    "rows",
    "verb",
    "step",
    "index",
    "row_id",
    "reasons",
    "categories",
    "summary",
    "bundled",
    "score",
    "train",
    "displacement",
    "dropped",
    "source",
    "rule",
    "chunks",
    "sha256",
    "limit",
)


def damaged_json(rng: Random, data: bytes, name: str) -> bytes:
    if rng.random() < 0.25 or not name.endswith((".json", ".jsonl")):
        return in_bytes(rng, data)
    if name.endswith(".jsonl"):
        rows = [json.loads(line) for line in data.splitlines() if line.startswith(b"{")]
        rows = in_value(rng, rows, RUN_WORDS) if rows else [odd(rng)]
        return b"\n".join(as_json(rng, row) for row in (rows if isinstance(rows, list) else [rows])) + b"\n"
    return as_json(rng, in_value(rng, json.loads(data), RUN_WORDS))


def damaged_parquet(rng: Random, data: bytes, path: Path) -> bytes:
    if rng.random() < 0.4:
        return in_bytes(rng, data)
    pq.write_table(in_table(rng, pq.read_table(pa.BufferReader(data))), path)
    return path.read_bytes()


ODD_NAMES = ("{}x", "{}-x", "{}-\u00b2", "{}-99999999999999999", "{}-000009", "{} ", ".{}", "{}-1")
NO_FILES: tuple[Callable[[Path], None], ...] = (
    os.mkfifo,
    lambda path: path.symlink_to("/dev/zero"),
    lambda path: path.symlink_to(path.name),
    Path.mkdir,
)


def damage_file(rng: Random, path: Path, data: bytes) -> None:
    """A file of a run is damaged, gone, under another name, or no file."""
    roll = rng.random()
    if roll < 0.08:
        path.unlink()
    elif roll < 0.14:
        stem = path.stem.rstrip("0123456789").rstrip("-")
        path.rename(path.with_name(rng.choice(ODD_NAMES).format(stem) + path.suffix))
    elif roll < 0.2:
        path.unlink()
        rng.choice(NO_FILES)(path)
    elif path.suffix == ".parquet":
        path.write_bytes(damaged_parquet(rng, data, path))
    else:
        path.write_bytes(damaged_json(rng, data, path.name))


def forge(run: Path) -> None:
    """The sums of the parts are those of the files that lie there, as a stranger would write them."""
    for record in (run / "parts").glob("done-*.json"):
        with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
            about = json.loads(record.read_text()) if record.is_file() else {}
            parts = [run / "parts" / name for name in about["sha256"]]
            sums = {part.name: hashlib.sha256(part.read_bytes()).hexdigest() for part in parts if part.is_file()}
            record.write_text(json.dumps({**about, "sha256": sums}))


@harness
def run_directories(rng: Random, folder: Path) -> Read:
    """One or two files of a run damaged or gone; then everything that reads such a run."""
    from ches_jax.cli.commands import Outcome
    from ches_jax.cli.recipe import run_recipe
    from ches_jax.displacement.config import DiagnoseConfig
    from ches_jax.displacement.diagnose import diagnose
    from ches_jax.errors import os_error_text
    from ches_jax.report import report
    from ches_jax.runs import chunks
    from ches_jax.runs.directory import open_run
    from ches_jax.scores.run import merge
    from ches_jax.scores.table import read_table
    from ches_jax.select.config import SelectConfig
    from ches_jax.select.run import select
    from ches_jax.train.metrics import JsonLines
    from ches_jax.train.observe.displacement_log import DisplacementLog
    from ches_jax.train.observe.pair_logprobs import PairLogps
    from ches_jax.train.reference import reference_logps
    from tests.fuzz.material import REFERENCED, nothing_known

    kind = rng.choice(list(runs()))
    run = folder / "run"
    for name, data in runs()[kind].items():
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_bytes(data)
    for name in rng.sample(list(runs()[kind]), min(rng.choice([1, 1, 2]), len(runs()[kind]))):
        damage_file(rng, run / name, runs()[kind][name])
    if rng.random() < 0.3:
        forge(run)
    score = {"keep": rng.choice(["lowest:0.5", "soft:0.5"]), "by": rng.choice(["ches", "ln_ches", "column:score"])}
    ways: dict[str, Read] = {
        "report": lambda: report(run, folder / "page"),
        "diagnose": lambda: diagnose(DiagnoseConfig(path=str(run))).to_json(),
        "before": lambda: diagnose(DiagnoseConfig(before=str(run), after=str(run))).to_json(),
        "logps": lambda: diagnose(DiagnoseConfig(logps=str(run / "scores.parquet"))).to_json(),
        "texts": lambda: diagnose(
            DiagnoseConfig(
                path=str(run),
                responses_before=str(run),
                responses_after=str(run),
                judgments=(str(run), str(run)),
                want="refusal",
            )
        ).to_json(),
        "select": lambda: select(SelectConfig(scores=run, out=folder / "kept", **score)),  # type: ignore[arg-type]
        "table": lambda: read_table(run),
        "resume": lambda: open_run(run, "score", {"config": {"model": "bundled"}}, resume=True),
        "merge": lambda: merge(run),
        "chunks": lambda: (chunks.done(run), chunks.require_whole(run)),
        "metrics": lambda: JsonLines(run / "metrics.jsonl", 3).last(),
        "reference": lambda: reference_logps(REFERENCED, lambda pairs: PairLogps(*np.ones((2, len(pairs)))), {}, run),
        "start": lambda: DisplacementLog(run, "include")._read_start({"train": REFERENCED}),
        "recipe": lambda: run_recipe(
            run / "a.toml", run / "out", lambda *_: Outcome(headline=""), ["report"], resume=True, say=lambda _: None
        ),
        "direction": lambda: nothing_known(run),
    }
    fit = {
        "score": ["report", "select", "select", "table", "before", "logps", "resume"],
        "parts": ["merge", "chunks", "resume"],
        "train": ["report", "diagnose", "metrics", "resume"],
        "responses": ["report", "texts"],
        "judgments": ["report", "texts"],
        "selection": ["report"],
        "diagnosis": ["report"],
        "training": ["report", "diagnose"],
        "resumed": ["reference", "start", "recipe", "direction"],
    }
    way = ways[rng.choice(fit.get(kind, ["report"]))]

    def read() -> None:
        try:
            way()
        except OSError as error:  # the door of the command tells those that name their file
            if error.filename is None:
                raise
            raise ChesError(os_error_text(error)) from None

    return read


@harness
def training_logs(rng: Random, folder: Path) -> Read:
    from ches_jax.displacement.config import DiagnoseConfig
    from ches_jax.displacement.diagnose import diagnose

    files = rng.choice(logs())
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    name = rng.choice(list(files))
    path, data = folder / name, files[name]
    if rng.random() < 0.06:
        name, data = "run.wandb", b""
        path = folder / name
        path.write_bytes(damaged_journal(rng))
    words = (
        "rewards/chosen",
        "rewards/rejected",
        "step",
        "loss",
        "log_history",
        "eval_rewards/margins",
        "beta",
        "logps",
    )
    if not data:
        pass
    elif path.suffix in (".json", ".jsonl") and rng.random() < 0.7:
        try:
            path.write_bytes(damaged_json(rng, data, name))
        except ValueError:
            path.write_bytes(in_bytes(rng, data))
    elif b"\0" not in data and rng.random() < 0.6:
        path.write_bytes(
            in_text(rng, data.decode("utf-8", "replace"), [*words, *NUMBERS, ",", "\n", "'", "{"]).encode()
        )
    else:
        path.write_bytes(in_bytes(rng, data))
    beta = rng.choice([None, None, 0.1])
    return lambda: diagnose(DiagnoseConfig(path=str(folder if rng.random() < 0.5 else path), beta=beta)).to_json()


def damaged_journal(rng: Random) -> bytes:
    """A journal of Weights & Biases whose sums are right, and whose messages are not."""
    messages = journal_messages(WANDB[:4], {"beta": 0.1})
    del messages[1]  # long, and passed over
    at = rng.randrange(len(messages))
    messages[at] = in_bytes(rng, messages[at])
    return journal(messages)


@cache
def logs() -> list[dict[str, bytes]]:
    return [
        {p.relative_to(log).as_posix(): p.read_bytes() for p in sorted(log.rglob("*")) if p.is_file()}
        for log in sorted(LOGS.iterdir())
        if log.is_dir()
    ]


# programs and rules of strangers

JINJA = (
    "{{ bos_token }}",
    "{% for m in messages %}",
    "{% endfor %}",
    "{{ m.role }}",
    "{{ m['content'] }}",
    "{{ messages }}",
    "{% if add_generation_prompt %}",
    "{% else %}",
    "{% endif %}",
    "<|assistant|>",
    "{{ 1 // 0 }}",
    "{{ 'a' * 10**12 }}",
    "{% for i in range(10**9) %}",
    "{% macro f(n) %}",
    "{% endmacro %}",
    "{{ f(1) }}",
    "{{ raise_exception('no') }}",
    "{% set x = messages[0] %}",
    "{{ m.content | trim | upper }}",
    "{{ strftime_now('%Y') }}",
    "{{ x.y.z }}",
    "{{ tools | tojson }}",
    "{% generation %}",
    "{% endgeneration %}",
    "{{ ''.__class__ }}",
    "{% include 'x' %}",
    "{{ m.content.split('a')[9] }}",
    "{{ '%999999d' % 1 }}",
    "{{ messages | batch(0) | list }}",
    "{{ namespace(a=1).a }}",
    "{% break %}",
    "{{",
    "%}",
    "{#",
    "{{ [1] | sum(start='a') }}",
    "{{ '\ud800' }}",
    "{{ 10 ** 400 / 3.0 }}",
    "{{ lipsum() }}",
    "{{ self }}",
    "{{ loop.index }}",
)


@harness
def templates(rng: Random, folder: Path) -> Read:
    from ches_jax.data import template as module
    from ches_jax.data.sources import rows_in_memory
    from ches_jax.data.tokenize import PairTokenizer, load_tokenizer

    plain = (bundled.model_dir() / "chat_template.jinja").read_text()
    text = (
        in_text(rng, plain, list(JINJA)) if rng.random() < 0.6 else "".join(rng.choices(JINJA, k=rng.randrange(1, 9)))
    )
    module.SECONDS = 1.0
    args = rng.choice([{}, {"now": "2024-07-26"}, {"x": odd(rng)}])

    def read() -> None:
        tokenizer = load_tokenizer("bundled")
        tokenizer.chat_template = text
        pairs = PairTokenizer(
            tokenizer, max_length=64, eos="include", vocab_size=1280, template="always", template_args=args
        )
        pairs(list(rows_in_memory(ROWS[rng.randrange(2)]).tolerant()))

    return read


@harness
def judges(rng: Random, folder: Path) -> Read:
    from ches_jax.judges.judge_prompt import default_question, fill_question, load_question
    from ches_jax.judges.phrases import default_rules, load_rules, refused

    path = folder / "rules.txt"
    if rng.random() < 0.7:
        plain = default_rules().read_text().splitlines()
        at = rng.randrange(len(plain))
        text = "\n".join(
            [
                *plain[:at],
                in_text(rng, plain[at], ["[anywhere]", "[x]", "(", "{A}", "\\", "*", " = "]),
                *plain[at + 1 :],
            ]
        )
        path.write_bytes(in_bytes(rng, text.encode()) if rng.random() < 0.3 else text.encode())
        said = in_text(
            rng, "I'm sorry, but I can't help with that.", ["\n", "“", "<think>", "</think>", "a" * 3000, "\ud800"]
        )
        return lambda: refused(load_rules(path), said)
    path.write_bytes(in_bytes(rng, default_question().read_bytes()))
    return lambda: fill_question(load_question(path), TALK, "x")
