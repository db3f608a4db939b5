"""Pairs in memory to a score table in memory: the numbers of ``ches score``, without a run directory.

``ches score`` computes its chunks by the same functions (``pair_scorer``, ``score_chunk``), so that the numbers are the
same to the bit.
"""

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import jax
import pyarrow as pa
from jax.sharding import Mesh

from ches_jax.data.audit import Audit, dropped_record, require_clean
from ches_jax.data.prompts import Pairing
from ches_jax.data.sources import rows_in_memory
from ches_jax.distributed.division import team_of
from ches_jax.distributed.mesh import make_mesh
from ches_jax.errors import ChesError
from ches_jax.inputs import convention, pair_tokenizer
from ches_jax.models.attention.choose import choose_attention
from ches_jax.models.attention.dense import Attend
from ches_jax.models.decoder import Decoder
from ches_jax.runs.directory import versions
from ches_jax.scores.config import ROW_TOKENS, ScoreConfig, parse_gradients, with_defaults
from ches_jax.scores.forward import ForwardPass, Outputs, largest_batch
from ches_jax.scores.gradients import Gradients
from ches_jax.scores.scorer import Batching, PairScorer
from ches_jax.scores.table import CANDIDATES, table_of, with_columns
from ches_jax.scores.table import schema as table_schema
from ches_jax.types import Eos, OnBadRow, Template, TokenPair

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class ScoredChunk(NamedTuple):
    """The scores of a chunk of pairs."""

    columns: dict[str, Any]
    """Columns of the score table, a row for each pair that was kept."""
    tokens: dict[str, list] | None
    """Columns of the token table, where token scores are computed."""
    dropped: list[TokenPair]


def pair_scorer(
    model: Decoder,
    mesh: Mesh,
    outputs: Outputs,
    attend: Attend,
    *,
    batch_tokens: int | Literal["auto"],
    eos: Eos,
    on_batch: Callable[[int], None] = lambda pairs: None,
    gradients: str | None = None,
) -> PairScorer:
    """A scorer for a model; it compiles when it meets a batch.

    Args:
      model: lies on ``mesh`` as ``models.sharding.placement`` says, or anywhere for a data-only mesh.
      mesh: axes ``data``, ``fsdp``, ``tensor``.
      outputs: what is computed beside CHES.
      attend: how attention is computed.
      batch_tokens: tokens per device and step; auto: the largest batch that the memory holds.
      eos: whether a terminator counts in a response.
      on_batch: called with the number of pairs after every batch.
      gradients: an estimator of the entanglement of gradients (``scores.gradients``); None: without.
    """
    forward = ForwardPass(model, mesh, outputs, attend)
    tokens = min(team_of(mesh).exchange(largest_batch(forward, ROW_TOKENS))) if batch_tokens == "auto" else batch_tokens
    rope = model.config.rope
    batching = Batching.of(tokens, ROW_TOKENS, forward, rope.length_threshold if rope else None)
    entangled = None if gradients is None else Gradients(model, mesh, parse_gradients(gradients), eos)
    return PairScorer(forward, batching, eos, on_batch, entangled)


def score_chunk(scorer: PairScorer, chunk: list[TokenPair], on_bad_row: OnBadRow) -> ScoredChunk:
    """Scores a chunk of pairs; flagged ones are left out where ``on_bad_row`` is ``drop``.

    Raises:
      ChesError: a number that is not finite; names the row.
    """
    dropped = [p for p in chunk if p.flags] if on_bad_row == "drop" else []
    columns, tokens = scorer([p for p in chunk if not p.flags] if dropped else chunk)
    return ScoredChunk(columns, tokens, dropped)


def score_pairs(
    model: Decoder,
    tokenizer: "PreTrainedTokenizerBase",
    rows: Any,
    *,
    by: Literal["ches", "head_score"] = "ches",
    logps: bool = False,
    gradients: str | None = None,
    eos: Eos = "include",
    max_length: int | None = None,
    template: Template = "auto",
    template_args: Mapping[str, Any] | None = None,
    schema: str = "auto",
    columns: Mapping[str, str | Sequence[str]] | None = None,
    candidates: Pairing | None = None,
    on_bad_row: OnBadRow = "error",
    batch_tokens: int | Literal["auto"] | None = None,
    mesh: Mesh | str | None = None,
    attention: str = "auto",
    chunk_rows: int = 1024,
) -> pa.Table:
    """Scores preference pairs; the numbers of ``ches score`` with the same options, to the bit.

    Args:
      model: from ``load_model``.
      tokenizer: from ``load_tokenizer``, or any transformers tokenizer that belongs to the model.
      rows: a list of dicts, a ``datasets.Dataset`` or an Arrow table, with columns ``prompt, chosen, rejected`` (text
        or messages), ``prompt, responses`` or ``prompt_ids, chosen_ids, rejected_ids``, or others that ``schema`` or
        ``columns`` explain.
      by: ``head_score`` computes the exact score of the unembedding's gradient beside CHES.
      logps: log-probabilities of both responses too, in nats.
      gradients: entanglement of both responses' gradients by an estimator, as ``ScoreConfig.gradients``.
      eos: whether the terminator of a response counts in its length; ``given``: where the row has one.
      max_length: most tokens of prompt and response together; default: the model's context.
      template: when the chat template is used: auto (conversations only), always, none; or which: a name or a file.
      template_args: variables of the chat template, for every row; ``now`` stops its clock at a date.
      schema: what the columns mean: auto (recognised and reported), a preset by name, or a JSON or TOML file.
      columns: other names of columns, ``{"prompt": "instruction"}``, or the words of a schema,
        ``{"responses": ["answer_a", "answer_b"], "winner": "label", "order": ["A", "B"]}`` (docs/data.md).
      candidates: which pairs of rows with several responses are meant.
      on_bad_row: flagged rows: ``error``; ``drop`` (listed in the table's metadata under ``dropped``); ``keep`` (scored
        where possible, flagged).
      batch_tokens: tokens per device and step; default: 2048 on a CPU, 16384 on an accelerator.
      mesh: a mesh with axes data, fsdp, tensor, or its sizes as text (``"data=4"``); default: all local devices.
      attention: how attention is computed; auto: the best that runs here and agrees with dense.
      chunk_rows: rows that are packed together; only with the same number are two tables equal to the bit.

    Returns:
      The score table (``ches_jax.scores.table.COLUMNS``), a row per pair in order, provenance in its metadata.

    Raises:
      ChesError: rows that cannot be read or are flagged, an option that nothing can have, a score that is not finite.

    >>> from ches_jax import bundled
    >>> from ches_jax.models.checkpoint.load import load_model
    >>> from ches_jax.scores import load_tokenizer, score_pairs
    >>> model, tokenizer = load_model(bundled.model_dir()), load_tokenizer(bundled.model_dir())
    >>> rows = [{"prompt": "<|user|> Do you agree?<|assistant|>", "chosen": " Never", "rejected": " Absolutely"}]
    >>> score_pairs(model, tokenizer, rows).num_rows
    1
    """
    _require_loaded(model, tokenizer)
    dtype = str(model.dtype)
    options = with_defaults(
        ScoreConfig(
            by=by,
            logps=logps,
            gradients=gradients,
            eos=eos,
            max_length=max_length,
            template=template,
            template_args=template_args or {},  # type: ignore[arg-type]
            on_bad_row=on_bad_row,
            batch_tokens=batch_tokens,
            attention=attention,
            chunk_rows=chunk_rows,
            dtype=dtype,
            out="in memory",
        )
    )
    if columns is not None and not isinstance(columns, Mapping):
        raise ChesError(f"score_pairs: columns={columns!r:.80}; expected a dict, {{'prompt': 'instruction'}}")
    words = {name: theirs if isinstance(theirs, str) else ",".join(theirs) for name, theirs in (columns or {}).items()}
    source = rows_in_memory(rows, words, candidates, schema=schema).tolerant()
    tokenize = pair_tokenizer(
        tokenizer,
        model.config,
        max_length=options.max_length,
        eos=eos,
        template=options.template,
        template_args=options.template_args,
    )
    chunks = [
        tokenize(list(itertools.chain.from_iterable(group)))
        for group in _batched(source.rows_from(0), options.chunk_rows)
    ]
    if on_bad_row == "error":
        audit = Audit(tokenizer.bos_token_id, tokenizer.eos_token_id)  # type: ignore[arg-type]
        for chunk in chunks:
            audit.extend(chunk)
        require_clean(audit, source.name)
    with jax.enable_x64(dtype == "float64"):
        scorer = pair_scorer(
            model,
            _whole_mesh(mesh) if isinstance(mesh, Mesh) else make_mesh(mesh),
            Outputs(logps=logps, head_score=by == "head_score"),
            choose_attention(attention, model.config, dtype).attend,
            batch_tokens=options.batch_tokens,  # type: ignore[arg-type]
            eos=eos,
            gradients=options.gradients,
        )
        scored = [score_chunk(scorer, chunk, on_bad_row) for chunk in chunks]
    metadata = {
        "verb": "score_pairs",
        "family": model.config.family,
        "convention": convention(eos, options.max_length, options.template, options.template_args),
        "dtype": dtype,
        "versions": versions(),
        "schema": source.schema_record(),
        "dropped": [dropped_record(p) for s in scored for p in s.dropped],
    }
    names = set(scored[0].columns) | {n for s in scored for n in CANDIDATES if n in s.columns}
    whole = table_schema(names, metadata)
    return pa.concat_tables(
        with_columns(table_of(s.columns, table_schema(s.columns, metadata)), whole) for s in scored
    ).combine_chunks()


def _require_loaded(model: Any, tokenizer: Any) -> None:
    """Refuses names of models, and models of others.

    Raises:
      ChesError: one of the two is something else than what ``load_model`` and ``load_tokenizer`` return.
    """
    for name, value in (("model", model), ("tokenizer", tokenizer)):
        if isinstance(value, str | Path | None):
            raise ChesError(f"score_pairs: {name}={value!r}; load it first: load_{name}(...)")
    if not isinstance(model, Decoder):
        raise ChesError(
            f"score_pairs: model is a {type(model).__name__}; expected one of load_model(...). The states of any other "
            "model are scored by pair_statistics and ches, or head_score"
        )
    if not hasattr(tokenizer, "eos_token_id"):
        raise ChesError(
            f"score_pairs: tokenizer is a {type(tokenizer).__name__}; expected one of load_tokenizer(...), or another "
            "tokenizer of transformers"
        )


def _whole_mesh(mesh: Mesh) -> Mesh:
    if missing := {"data", "fsdp", "tensor"} - {*mesh.axis_names}:
        raise ChesError(
            f"score_pairs: a mesh with axes {', '.join(map(str, mesh.axis_names))}, without "
            f"{', '.join(sorted(missing))}; expected data, fsdp and tensor, of size 1 where they have no part, or a "
            "text such as 'data=4'"
        )
    return mesh


def _batched(items: Iterable[Any], count: int) -> Iterable[list[Any]]:
    iterator = iter(items)
    while batch := list(itertools.islice(iterator, count)):
        yield batch
