"""``ches generate``: a model directory and a file of prompts to a run directory with ``responses.jsonl``.

Prompts are read, continued and written a chunk at a time. A chunk's texts follow from its rows alone, and a row's text
from the row alone (to rounding: a batch of another size adds up in another order), so a killed run continues where
it was and ends in the same bytes.
"""

import dataclasses
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from ches_jax.distributed.chunked_run import ChunkedRun
from ches_jax.distributed.mesh import row_shards
from ches_jax.distributed.processes import start_run
from ches_jax.errors import ChesError, require_config
from ches_jax.generate.config import GenerateConfig, checked
from ches_jax.generate.engine import Engine
from ches_jax.generate.packing import Request, Shape
from ches_jax.generate.prompts import Encoder, Inputs, Prompt, open_model_and_prompts
from ches_jax.generate.sampling import key_data
from ches_jax.generate.stops import Finisher, stop_ids
from ches_jax.inputs import Opener
from ches_jax.runs import chunks
from ches_jax.runs.directory import as_dict, merged, write_summary
from ches_jax.runs.progress import say
from ches_jax.runs.work import Positions, Work

FILE_NAME = "responses.jsonl"


def generate(
    config: GenerateConfig, *, resume: bool = False, quiet: bool = False, other_versions: bool = False
) -> Path:
    """Continue every prompt; returns the run directory.

    Args:
      config: what to continue, and how.
      resume: continue the run that ``config.out`` holds.
      quiet: no progress.
      other_versions: continue although packages have other versions than at the start.

    Raises:
      ChesError: any input that is not fit, before anything is written; logits that are not finite.

    >>> from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as folder:
    ...     options = GenerateConfig(limit=1, max_new_tokens=4, temperature=0.0, out=f"{folder}/run")
    ...     sorted(path.name for path in generate(options, quiet=True).iterdir())
    ['config.json', 'responses.jsonl', 'run.json']
    """
    require_config("generate", config, GenerateConfig)
    import jax

    process = start_run(config.distributed, config.out)
    config = checked(config)
    with (
        jax.enable_x64(config.dtype == "float64"),
        ChunkedRun("generate", str(config.out), config.mesh, process) as run,
    ):
        return _generate(config, run, resume, quiet or not run.division.first, other_versions)


def _generate(config: GenerateConfig, run: ChunkedRun, resume: bool, quiet: bool, other_versions: bool) -> Path:
    opener = Opener()
    with run.opening():
        inputs = open_model_and_prompts(config, opener)
        adapter = None if config.adapter is None else opener.adapter(config.adapter)
        encoder = inputs.encoder
        answer_end = encoder.writer.chat.answer_end() if inputs.templated() else None
        ends = stop_ids(encoder.model.directory, encoder.tokenizer, config.stop_tokens, answer_end)
        total = inputs.require_clean() if config.on_bad_row == "error" else None
    identity = {"config": as_dict(config), **opener.identity()}
    run.agree(identity)
    run.begin(identity, resume, other_versions)
    if run.finished:
        return run.out
    say(f"loading the model ({encoder.model.directory})", quiet=quiet)
    with run.team.sharing_errors():
        generator = Generator(config, encoder, ends, run.mesh, adapter)
    run.end(_finish, _generate_chunks(run, config, inputs, opener, generator, total, quiet))
    return run.out


def _generate_chunks(
    run: ChunkedRun,
    config: GenerateConfig,
    inputs: Inputs,
    opener: Opener,
    generator: "Generator",
    total: int | None,
    quiet: bool,
) -> dict[str, Any]:
    """Continue the chunks that are missing and are this process's; returns facts for ``run.json``, of these alone."""
    started, work, tokens = time.perf_counter(), Work(), 0
    with tqdm(
        unit=" texts",
        total=total and total * config.samples,
        initial=run.first_missing * config.chunk_rows * config.samples,
        disable=quiet,
        desc="generating",
        smoothing=0.1,
    ) as bar:
        say("compiling, then generating", quiet=quiet)
        for number, kept, dropped in run.missing(inputs.chunks, opener.require_unchanged):
            with work.on_device():
                rows = generator(kept, bar.update)
            if run.team.first:
                chunks.write(run.out, number, rows, [p.dropped() for p in dropped])
            tokens += sum(len(r["token_ids"]) for r in rows)
    seconds = time.perf_counter() - started
    return {
        "seconds": round(seconds, 3),
        "tokens_per_second": round(tokens / max(seconds, 1e-9), 1),
        "compiled_shapes": [dataclasses.asdict(s) for s in generator.shapes],
        "work": work.facts(**generator.counted.facts()),
    }


def merge(out: Path) -> Path:
    """``ches merge``: the chunks of several processes become one run.

    Raises:
      RunError: no run, a run at work, a chunk that is missing, damaged or of another run.
    """
    return merged(out, _finish)


class Generator:
    """Continues prompts; one output row for each text."""

    def __init__(
        self, config: GenerateConfig, encoder: Encoder, ends: Sequence[int], mesh: Mesh, adapter: Path | None = None
    ):
        from ches_jax.models.adapters import peft
        from ches_jax.models.checkpoint.load import load_model
        from ches_jax.models.sharding import placement

        self.config = config
        self.encoder = encoder
        self.finish = Finisher(encoder.tokenizer, ends, config.stop)
        self.shards = row_shards(mesh)
        load = load_model if adapter is None else partial(peft.load_adapted, adapter=adapter)
        model = load(
            encoder.model.directory,
            dtype=config.dtype,
            param_dtype=config.param_dtype or config.dtype,
            sharding=placement(mesh),
        )
        self._engine = Engine(
            model,
            mesh,
            sampling=config.sampling,
            max_new_tokens=config.max_new_tokens,
            stop_ids=ends,
            stop_check=self.finish.stopped if config.stop else None,
        )

    @property
    def shapes(self) -> list[Shape]:
        """Batch shapes compiled so far."""
        return self._engine.shapes

    @property
    def counted(self) -> Positions:
        """Positions that went through the model so far."""
        return self._engine.counted

    def __call__(self, prompts: Sequence[Prompt], progress: Any = lambda n: None) -> list[dict[str, Any]]:
        """Rows in the order of the prompts, samples of a prompt in turn.

        Raises:
          ChesError: a log-probability that is not finite; names the row.
        """
        config = self.config
        texts = [(p, s) for p in prompts for s in range(config.samples)]
        requests = [
            Request(
                p.ids,
                key_data(config.seed, p.row_id, s),
                min(config.max_new_tokens, self.encoder.max_length - len(p.ids)),
            )
            for p, s in texts
        ]
        # few prompts need no full batch; a chunk of a longer run always has one
        few = 1 << max(len(requests) - 1, 0).bit_length()
        rows = min(config.batch_size, few) if len(prompts) < config.chunk_rows else config.batch_size
        completions = self._engine(requests, -(-rows // self.shards) * self.shards, progress)
        return [self._row(p, s, m) for (p, s), m in zip(texts, completions, strict=True)]

    def _row(self, prompt: Prompt, sample: int, completion: Any) -> dict[str, Any]:
        if not np.isfinite(completion.logps).all():
            raise ChesError(
                f"row {prompt.index} (row_id {prompt.row_id[:12]}), sample {sample}: the logits are not finite; try "
                "--dtype float32"
            )
        text = self.finish(prompt.ids, completion)
        row = {
            "row_id": prompt.row_id,
            "index": prompt.index,
            "sample": sample,
            "prompt": prompt.content.get("prompt"),
            "text": text.text,
            "finish_reason": text.finish_reason,
            "logp": text.logp,
            "prompt_ids": list(prompt.ids),
            "token_ids": list(text.tokens),
        }
        more = {"category": prompt.category, "flags": list(prompt.flags), "extra": dict(prompt.extra)}
        return row | {name: value for name, value in more.items() if value}


def _finish(out: Path, facts: Mapping[str, Any]) -> None:
    """Join the chunks, write ``run.json``, and remove the chunks: until it is there they are joined again."""
    chunks.join(out, FILE_NAME)
    reasons: Counter[str] = Counter()
    texts = tokens = 0
    prompts = set()
    for row in chunks.read_lines(out / FILE_NAME):
        reasons[row["finish_reason"]] += 1
        texts, tokens = texts + 1, tokens + len(row["token_ids"])
        prompts.add(row["index"])
    if not texts:
        raise ChesError(f"{out}: no prompt was continued; dropped.jsonl says why")
    counts = {"prompts": len(prompts), "texts": texts, "tokens": tokens, "dropped": chunks.count_dropped(out)}
    write_summary(out, {"counts": counts, "finish_reasons": dict(sorted(reasons.items())), **facts})
    chunks.clear(out)
