"""``ches score``: a model directory and a file of pairs to a run directory with the score table.

Rows are read, tokenised and audited a chunk at a time, packed, passed through the model and written as one part per
chunk (temporary name, then renamed), so memory does not grow with the data and a killed run goes on where it was. A
chunk's numbers depend on its rows alone, not on when it was computed: a resumed run ends in the same bytes.
"""

import itertools
import json
import shutil
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from rapidfuzz.distance import Levenshtein
from tqdm import tqdm

from ches_jax import embedded
from ches_jax.data.audit import UNSCORABLE, Audit, dropped_record, require_clean, shared_prefix
from ches_jax.data.packing import Placement, pack
from ches_jax.data.prompts import Template
from ches_jax.data.sources import PairSource, open_pairs
from ches_jax.data.tokenize import PairTokenizer, load_tokenizer, tokenizer_fingerprint
from ches_jax.errors import ChesError, RunError
from ches_jax.hf.directory import fingerprint, read_config, resolve
from ches_jax.models.families import decoder_config
from ches_jax.options import Columns
from ches_jax.runlog import RUN, as_dict, device_name, new_name, open_run, versions, write_json
from ches_jax.scores import derive
from ches_jax.scores.passes import ScoringPass, fetch
from ches_jax.scores.statistics import SegmentStatistics
from ches_jax.scores.table import COLUMNS, FILE_NAME, merge_parts, write_part
from ches_jax.types import Eos, OnBadRow, TokenPair

EMBEDDED = "embedded"
ROW_TOKENS = 2048
"""Standard length of a packed row: long enough that little is left over, short enough for one row to fit anywhere."""
PARTS = "parts"
DROPPED = "dropped.jsonl"
DTYPES = ("float32", "bfloat16", "float16", "float64")


@dataclass(frozen=True, kw_only=True)
class ScoreConfig:
    """What to score, with what, and how. Every field but ``out`` decides numbers or what becomes of a row."""

    model: str = EMBEDDED
    """Hugging Face model directory or hub name; default: the embedded model."""
    pairs: str = EMBEDDED
    """JSONL, JSON, Parquet or Arrow file, save_to_disk folder or hub name; default: the embedded pairs."""
    split: str | None = None
    """Split of a data set folder or hub data set."""
    columns: Columns = field(default_factory=dict)
    """Other names of columns: prompt=instruction."""
    limit: int | None = None
    """Score only the first rows."""
    out: str | None = None
    """Run directory; default: the first free runs/score-NNN."""
    logps: bool = False
    """Log-probabilities of both responses too."""
    eos: Eos = "include"
    """Whether the terminator of a complete response counts in |y|."""
    dtype: str = "float32"
    """Dtype of the computation: float32, bfloat16, float16 or float64. Sums are float32 at least."""
    param_dtype: str | None = None
    """Dtype the weights are kept in; default: as stored."""
    max_length: int | None = None
    """Most tokens of prompt and response together; default: the model's context."""
    template: Template = "auto"
    """Chat template: auto (conversations only), always, or none."""
    on_bad_row: OnBadRow = "error"
    """What becomes of flagged rows: error, drop (listed in dropped.jsonl) or keep (scored where possible)."""
    batch_tokens: int | None = None
    """Tokens per device and step; default: 2048 on a CPU, 16384 on an accelerator."""
    chunk_rows: int = 1024
    """Pairs per part file: what a killed run loses at most."""
    mesh: str | None = None
    """Devices, such as data=4; default: all local devices on the data axis."""


@dataclass(frozen=True)
class _Inputs:
    """Everything opened and checked before the first pass."""

    directory: Path
    source: PairSource
    tokenizer: PairTokenizer
    eos: Eos
    chunk_rows: int
    limit: int | None

    def chunks(self, start: int = 0) -> Iterator[list[TokenPair]]:
        """Tokenised chunks from row ``start`` on; the next one is prepared while the caller works on this one."""
        rows = itertools.islice(self.source.iter_from(start), None if self.limit is None else self.limit - start)
        with ThreadPoolExecutor(1) as pool:

            def prepare() -> list[TokenPair]:
                return self.tokenizer(list(itertools.islice(rows, self.chunk_rows)))

            ahead = pool.submit(prepare)
            while chunk := ahead.result():
                ahead = pool.submit(prepare)
                yield chunk


def score(config: ScoreConfig, *, resume: bool = False, quiet: bool = False) -> Path:
    """Score every pair of a data set; returns the run directory.

    Raises:
      ChesError: any input that is not fit, before anything is written; a score that is not finite.
    """
    import jax

    config = _with_defaults(config)
    with jax.enable_x64(config.dtype == "float64"):
        return _score(config, resume, quiet)


def _with_defaults(config: ScoreConfig) -> ScoreConfig:
    """The config with words for options resolved; bad options refused."""
    import jax

    if config.dtype not in DTYPES:
        raise ChesError(f"--dtype {config.dtype!r}: expected one of {', '.join(DTYPES)}")
    if config.param_dtype is not None and config.param_dtype not in DTYPES:
        raise ChesError(f"--param-dtype {config.param_dtype!r}: expected one of {', '.join(DTYPES)}")
    on_cpu = jax.default_backend() == "cpu"
    tokens = config.batch_tokens
    if tokens is None:
        tokens = ROW_TOKENS if on_cpu else 8 * ROW_TOKENS
    for name, value in [("batch-tokens", tokens), ("chunk-rows", config.chunk_rows), ("limit", config.limit)]:
        if value is not None and value < 1:
            raise ChesError(f"--{name} {value}: expected a positive number")
    out = config.out or str(new_name(Path("runs"), "score"))
    return replace(config, batch_tokens=tokens, out=out)


def prepare(config: ScoreConfig) -> _Inputs:
    """Open and check the model directory, the tokenizer and the pairs; nothing is computed or written."""
    directory = embedded.model_dir() if config.model == EMBEDDED else resolve(config.model)
    decoder = decoder_config(read_config(directory), str(directory))
    context = decoder.max_positions
    if config.max_length is not None and decoder.rope is None and config.max_length > context:
        raise ChesError(f"--max-length {config.max_length}: the model has learned positions for {context} tokens only")
    source = open_pairs(
        str(embedded.pairs_file()) if config.pairs == EMBEDDED else config.pairs, config.split, config.columns
    )
    tokenizer = PairTokenizer(
        load_tokenizer(directory),
        max_length=context if config.max_length is None else config.max_length,
        eos=config.eos,
        vocab_size=decoder.vocab_size,
        template=config.template,
    )
    return _Inputs(directory, source, tokenizer, config.eos, config.chunk_rows, config.limit)


def audit(inputs: _Inputs) -> Audit:
    """The token audit of the whole data set."""
    found = Audit(inputs.tokenizer.tokenizer.bos_token_id, inputs.tokenizer.tokenizer.eos_token_id)  # type: ignore[arg-type]
    for chunk in inputs.chunks():
        found.extend(chunk)
    return found


def _score(config: ScoreConfig, resume: bool, quiet: bool) -> Path:
    from ches_jax.models.load import load_model
    from ches_jax.models.partition import placement
    from ches_jax.parallel import make_mesh

    assert config.out is not None
    out = Path(config.out)
    mesh = make_mesh(config.mesh)
    inputs = prepare(config)
    total = None
    if config.on_bad_row == "error":
        # tokenised twice, so that a bad row shows now and not in hour two
        found = audit(inputs)
        require_clean(found, inputs.source.name)
        total = found.rows
    model = load_model(inputs.directory, dtype=config.dtype, param_dtype=config.param_dtype, sharding=placement(mesh))
    identity = _identity(config, inputs)
    open_run(out, "score", identity, resume)
    if (out / FILE_NAME).exists():
        return out
    metadata = _metadata(identity, model.config.family)
    run = ScoringPass(model, mesh, logps=config.logps)
    assert config.batch_tokens is not None
    started = time.perf_counter()
    rope = model.config.rope
    writer = _ChunkWriter(out / PARTS, metadata, config, run, rope.length_threshold if rope else None)
    rows = writer.run(inputs, total, quiet)
    if rows == 0:
        raise RunError(f"{inputs.source.name}: no rows")
    kept = _finish(out, writer.count)
    seconds = time.perf_counter() - started
    write_json(
        out / RUN,
        {
            "verb": "score",
            "config": identity["config"],
            "model_fingerprint": metadata["model_fingerprint"],
            "tokenizer_fingerprint": metadata["tokenizer_fingerprint"],
            "data_fingerprint": metadata["data_fingerprint"],
            "versions": versions(),
            "device": device_name(),
            "mesh": dict(mesh.shape),
            "counts": {"rows": rows, "kept": kept, "dropped": rows - kept, "scored_this_time": writer.scored},
            "seconds": {"scoring": round(seconds, 3), "compiling": round(run.compile_seconds, 3)},
            "pairs_per_second": round(writer.scored / max(seconds - run.compile_seconds, 1e-9), 2),
            "compiled_shapes": [list(s) for s in run.shapes],
            "padding_waste": round(writer.waste, 4),
        },
    )
    return out


def _identity(config: ScoreConfig, inputs: _Inputs) -> dict[str, Any]:
    """What makes two runs the same run: options that decide results, and what the inputs hold."""
    options = as_dict(config)
    # where the results go and how work is cut for the devices do not decide them beyond rounding; the chunk size
    # decides which rows a part holds
    for name in ("out", "mesh"):
        del options[name]
    return {
        "config": options,
        "model_fingerprint": fingerprint(inputs.directory),
        "tokenizer_fingerprint": tokenizer_fingerprint(inputs.tokenizer.tokenizer),
        "data_fingerprint": inputs.source.fingerprint(),
    }


def _metadata(identity: dict[str, Any], family: str) -> dict[str, Any]:
    """Provenance of the table; without times, so that equal runs give equal bytes."""
    config = identity["config"]
    shown = {k: v for k, v in config.items() if v not in (None, {}, False)}
    columns = ",".join(f"{k}={v}" for k, v in config["columns"].items())
    words = [
        f"--{k.replace('_', '-')} {columns if k == 'columns' else '' if v is True else v}".strip()
        for k, v in shown.items()
    ]
    return {
        "verb": "score",
        "model": config["model"],
        "family": family,
        "pairs": config["pairs"],
        **{k: identity[k] for k in ("model_fingerprint", "tokenizer_fingerprint", "data_fingerprint")},
        "convention": {"eos": config["eos"], "max_length": config["max_length"], "template": config["template"]},
        "dtype": config["dtype"],
        "param_dtype": config["param_dtype"] or "stored",
        "accumulation": "float64" if config["dtype"] == "float64" else "float32",
        "versions": versions(),
        "command": " ".join(["ches score", *words]),
    }


class _ChunkWriter:
    """Scores chunk after chunk and writes each as a part; skips the parts that are there."""

    def __init__(
        self,
        folder: Path,
        metadata: dict[str, Any],
        config: ScoreConfig,
        run: ScoringPass,
        length_threshold: int | None,
    ):
        self.folder = folder
        self.metadata = metadata
        self.config = config
        self.run_pass = run
        self.length_threshold = length_threshold
        self.count = 0
        self.scored = 0
        self._positions = 0
        self._used = 0

    @property
    def waste(self) -> float:
        """Share of computed positions that were padding."""
        return 1 - self._used / self._positions if self._positions else 0.0

    def run(self, inputs: _Inputs, total: int | None, quiet: bool) -> int:
        """Score what is missing; returns the number of rows of the source (``total``, where that is known)."""
        self.folder.mkdir(exist_ok=True)
        while self._part(self.count).exists():
            self.count += 1
        rows = start = self.count * self.config.chunk_rows
        if self.count:
            rows = start = self._rows_done(self.count)
        with tqdm(unit=" pairs", initial=start, total=total, disable=quiet, desc="scoring") as self._bar:
            for chunk in inputs.chunks(start):
                self._write(chunk)
                rows += len(chunk)
                self._bar.update(rows - self._bar.n)  # rows that needed no pass
        return rows

    def _rows_done(self, parts: int) -> int:
        """Rows of the source that ``parts`` finished parts cover (the last may be a short one)."""
        import pyarrow.parquet as pq

        last = parts - 1
        dropped = self._dropped(last)
        lines = dropped.read_bytes().count(b"\n") if dropped.exists() else 0
        return last * self.config.chunk_rows + pq.read_metadata(self._part(last)).num_rows + lines

    def _part(self, i: int) -> Path:
        return self.folder / f"part-{i:06d}.parquet"

    def _dropped(self, i: int) -> Path:
        return self.folder / f"dropped-{i:06d}.jsonl"

    def _write(self, chunk: list[TokenPair]) -> None:
        """One chunk: dropped rows first, the part last, whose presence marks the chunk as done."""
        kept = chunk
        if self.config.on_bad_row == "drop":
            kept = [p for p in chunk if not p.flags]
            lines = [json.dumps(dropped_record(p), ensure_ascii=False) + "\n" for p in chunk if p.flags]
            temporary = self._dropped(self.count).with_suffix(".tmp")
            temporary.write_text("".join(lines), encoding="utf-8")
            temporary.replace(self._dropped(self.count))
        write_part(self._part(self.count), self._columns(kept), self.metadata)
        self.count += 1
        self.scored += len(kept)

    def _columns(self, pairs: list[TokenPair]) -> dict[str, Any]:
        """The chunk's rows of the table."""
        able = [i for i, p in enumerate(pairs) if UNSCORABLE.isdisjoint(p.flags)]
        numbers = {n: np.full(len(pairs), np.nan) for n in MODEL_COLUMNS}
        chosen = [pairs[i] for i in able]
        assert self.config.batch_tokens is not None
        shards = self.run_pass.mesh.shape["data"] * self.run_pass.mesh.shape["fsdp"]
        length = min(ROW_TOKENS, -(-self.config.batch_tokens // 64) * 64)
        batches = pack(
            chosen,
            length=length,
            rows_per_batch=max(1, self.config.batch_tokens // length) * shards,
            row_multiple=shards,
            eos=self.config.eos,
            length_threshold=self.length_threshold,
        )
        waiting: list[tuple[SegmentStatistics, list[Placement]]] = []
        for rows, placements in batches:
            self._positions += rows.tokens.size
            self._used += int((rows.lengths > 0).sum())
            waiting.append((self.run_pass(rows), placements))
            if len(waiting) > 1:  # one batch is under way on the device while another is read
                self._collect(*waiting.pop(0), able, numbers)
        for item in waiting:
            self._collect(*item, able, numbers)
        self._require_finite(pairs, able, numbers)
        return _table_columns(pairs, numbers, logps=self.config.logps, eos=self.config.eos)

    def _collect(
        self,
        statistics: SegmentStatistics,
        placements: list[Placement],
        able: list[int],
        numbers: dict[str, np.ndarray],
    ) -> None:
        """Put a batch's pair statistics where they belong."""
        s = fetch(statistics)
        rows = np.array([p.row for p in placements], int)
        shared = np.array([p.shared for p in placements], int)
        at = np.array([able[p.pair] for p in placements], int)
        plus, minus = (s.sums[rows, shared] + s.sums[rows, shared + side] for side in (1, 2))
        numbers["inner"][at] = (plus * minus).sum(-1)
        numbers["sqnorm_chosen"][at] = (plus * plus).sum(-1)
        numbers["sqnorm_rejected"][at] = (minus * minus).sum(-1)
        numbers["last_hidden_inner"][at] = (s.last[rows, shared + 1] * s.last[rows, shared + 2]).sum(-1)
        if s.logps is not None:
            numbers["logp_chosen"][at] = s.logps[rows, shared] + s.logps[rows, shared + 1]
            numbers["logp_rejected"][at] = s.logps[rows, shared] + s.logps[rows, shared + 2]
        told = {"compile": f"{self.run_pass.compile_seconds:.1f}s", "padding": f"{self.waste:.0%}"}
        self._bar.set_postfix(told, refresh=False)
        self._bar.update(len(placements))

    def _require_finite(self, pairs: list[TokenPair], able: list[int], numbers: Mapping[str, np.ndarray]) -> None:
        asked = [n for n in MODEL_COLUMNS if self.config.logps or not n.startswith("logp")]
        for name in asked:
            bad = [i for i in able if not np.isfinite(numbers[name][i])]
            if bad:
                p = pairs[bad[0]]
                raise ChesError(
                    f"row {p.index} (row_id {p.row_id[:12]}): {name} is not finite in {self.config.dtype}; "
                    "try --dtype float32, or look at the row with `ches doctor`"
                )


MODEL_COLUMNS = (
    "inner", "sqnorm_chosen", "sqnorm_rejected", "last_hidden_inner", "logp_chosen", "logp_rejected",
)  # fmt: skip
"""What the model gives; everything else is derived or counted."""


def edit_distance(pair: TokenPair) -> float:
    """Levenshtein distance of the two contents in tokens, over the longer length: 0 equal, 1 nothing in common."""
    return Levenshtein.normalized_distance(pair.chosen.content, pair.rejected.content)


def _table_columns(pairs: list[TokenPair], numbers: dict[str, np.ndarray], *, logps: bool, eos: Eos) -> dict[str, Any]:
    """All columns of the table for a chunk; NaN in ``numbers`` (no score) becomes null."""
    inner, plus, minus = numbers["inner"], numbers["sqnorm_chosen"], numbers["sqnorm_rejected"]
    n_chosen, n_rejected = (
        np.array([len(getattr(p, side).targets(eos)) for p in pairs], np.int32) for side in ("chosen", "rejected")
    )
    with np.errstate(divide="ignore", invalid="ignore"):  # unscorable rows have no tokens; they become null
        scores = {
            **{n: numbers[n] for n in MODEL_COLUMNS if logps or not n.startswith("logp")},
            "ches": derive.ches(inner, plus),
            "ln_ches": derive.ln_ches(inner, plus, n_chosen, n_rejected),
            "cosine": derive.cosine(inner, plus, minus),
        }
    columns: dict[str, Any] = {
        "row_id": [p.row_id for p in pairs],
        "index": [p.index for p in pairs],
        **{n: [None if np.isnan(x) else float(x) for x in v] for n, v in scores.items()},
        "edit_distance": [edit_distance(p) for p in pairs],
        "chosen_tokens": n_chosen,
        "rejected_tokens": n_rejected,
        "prompt_tokens": [len(p.prompt) for p in pairs],
        "shared_prefix_tokens": [shared_prefix(p) for p in pairs],
        "flags": [list(p.flags) for p in pairs],
        "category": [p.category for p in pairs],
    }
    return {name: columns[name] for name in COLUMNS if name in columns}


def _finish(out: Path, parts: int) -> int:
    """Join the parts into the table and the list of dropped rows; returns the rows of the table."""
    folder = out / PARTS
    dropped = sorted(folder.glob("dropped-*.jsonl"))
    if dropped:
        temporary = out / f".{DROPPED}.tmp"
        temporary.write_text("".join(p.read_text(encoding="utf-8") for p in dropped), encoding="utf-8")
        temporary.replace(out / DROPPED)
    kept = merge_parts([folder / f"part-{i:06d}.parquet" for i in range(parts)], out / FILE_NAME)
    shutil.rmtree(folder)
    return kept
