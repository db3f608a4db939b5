r"""Rewards of single tokens from one model with two prompts (T-REG).

.. math:: \hat r_t = \sigma\left(\ln \pi(y_t|x_{better}, y_{<t}) - \ln \pi(y_t|x_{worse}, y_{<t})\right) - \tfrac12

Between -0.5 and 0.5: above 0 where a token is likelier when the prompt requests a better answer. Both responses of a
pair get a number for each token of the pair as it is trained on.

References:
  Zhou et al., T-REG (https://arxiv.org/abs/2412.02685), as a public reading note gives it: the reference model is asked
  to improve an answer and to spoil it. The paper's prompts could not be had; ``BETTER`` and ``WORSE`` are ours, after
  its four words (helpful, correct, coherent, concise), and do not show the answer, which a small model would copy under
  both. A prompt that shows it has ``{response}`` where it stands.
"""

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from scipy.special import expit

from ches_jax.data.audit import FLAGS, UNSCORABLE, Audit, require_clean
from ches_jax.data.messages import Message, text_of
from ches_jax.data.sources import Record
from ches_jax.data.tokenize import PairTokenizer, encode_prompts
from ches_jax.data.two_prompts import SIDES, prompts_in
from ches_jax.displacement.models import Models
from ches_jax.errors import DataError
from ches_jax.inputs import Opener
from ches_jax.label.config import LabelConfig
from ches_jax.runs.chunks import write_lines
from ches_jax.scores.config import ScoreConfig
from ches_jax.scores.parts import TOKENS
from ches_jax.types import Response

BETTER = "Give an answer that is helpful, correct, coherent and concise.\n\n{prompt}"
WORSE = "Give an answer that is unhelpful, incorrect, incoherent and verbose.\n\n{prompt}"
COLUMNS = ("chosen_token_rewards", "rejected_token_rewards")


def token_rewards(
    config: LabelConfig, opener: Opener, rows: Sequence[Record], work: Path, models: Models
) -> dict[str, dict[str, list[float]]]:
    """``COLUMNS`` of each row by its id; rows that cannot be scored are left out.

    Raises:
      DataError: rows that are not fit, under the policy ``on_bad_row``; prompts that are token ids, or that do not fit
        into the model with what is asked.
    """
    model = opener.model(config.model)
    tokenizer = model.pair_tokenizer(
        max_length=config.max_length, eos=config.eos, template=config.template, template_args=config.template_args
    )
    pairs = tokenizer(rows)
    audit = Audit()
    audit.extend(pairs)
    if config.on_bad_row == "error":
        require_clean(audit, config.pairs)
    bad = frozenset(FLAGS) if config.on_bad_row == "drop" else UNSCORABLE
    usable = [i for i, pair in enumerate(pairs) if bad.isdisjoint(pair.flags)]
    asked, responses = [], []
    for i in usable:
        prompts = prompts_in(rows[i].content)
        for side, prompt in zip(SIDES, prompts * (2 // len(prompts)), strict=True):
            for frame in (config.better or BETTER, config.worse or WORSE):
                asked.append(replace(rows[i], content=_framed(rows[i], prompt, side, frame)))
            responses.append((i, side, getattr(pairs[i], side)))
    ids = [found.ids for found in encode_prompts(tokenizer.writer, asked)]
    lines = []
    for number, (i, _, response) in enumerate(responses):
        better, worse = ids[2 * number], ids[2 * number + 1]
        _require_room(config, rows[i], tokenizer, max(len(better), len(worse)), response)
        whole = list(response.targets("include"))
        asked_both = {"chosen_prompt_ids": list(better), "rejected_prompt_ids": list(worse)}
        lines.append({**asked_both, "chosen_ids": whole, "rejected_ids": whole})
    file = work / "asked.jsonl"
    write_lines(file, lines)
    models.share(file)
    out = models.score(
        ScoreConfig(
            model=config.model,
            pairs=str(file),
            logps=True,
            token_scores=True,
            eos=config.eos,
            dtype=config.dtype,
            on_bad_row="keep",
            out=str(work / "asked"),
        )
    )
    logps = _token_logps(out / TOKENS)
    found: dict[str, dict[str, list[float]]] = {}
    for number, (i, side, response) in enumerate(responses):
        count = len(response.targets(config.eos))
        better, worse = (np.array(logps[number, way][:count]) for way in SIDES)
        if len(better) == len(worse) == count:
            rewards = expit(better - worse) - 0.5
            found.setdefault(rows[i].row_id, {})[f"{side}_token_rewards"] = rewards.tolist()
    return {row_id: columns for row_id, columns in found.items() if len(columns) == len(SIDES)}


def _token_logps(path: Path) -> dict[tuple[int, str], list[float]]:
    """Log-probabilities of the tokens of each response, in their order."""
    table = pq.read_table(path, columns=["index", "response", "position", "logp"])
    found: dict[tuple[int, str], list[tuple[int, float]]] = {}
    for index, side, position, logp in zip(*(column.to_pylist() for column in table.columns), strict=True):
        found.setdefault((index, side), []).append((position, logp))
    return {key: [logp for _, logp in sorted(some)] for key, some in found.items()}


def _framed(row: Record, prompt: Any, side: str, frame: str) -> dict[str, Any]:
    """A prompt with what is asked of its answer: of a conversation in the user's last message."""

    def filled(text: str) -> str:
        places = {"{prompt}": text}
        if "{response}" in frame:
            response = row.content[side]
            places["{response}"] = response if isinstance(response, str) else text_of(response[-1])
        # both at once: a prompt may itself hold such a word
        return re.sub(r"\{prompt\}|\{response\}", lambda place: places[place[0]], frame)

    rest = {k: row.content[k] for k in ("tools", "chat_template_kwargs") if k in row.content}
    if isinstance(prompt, str):
        return {"prompt": filled(prompt), **rest}
    messages: list[Message] = list(prompt)
    users = [n for n, m in enumerate(messages) if isinstance(m, dict) and m.get("role") == "user"]
    if not users:
        raise DataError(
            f"{row.where}: --by contrast asks in front of a prompt that is text, or in the user's last message; this "
            "one is token ids or has no message of a user"
        )
    last = messages[users[-1]]
    messages[users[-1]] = {**last, "content": filled(text_of(last))}
    return {"prompt": messages, **rest}


def _require_room(
    config: LabelConfig, row: Record, tokenizer: PairTokenizer, prompt_tokens: int, response: Response
) -> None:
    needed = prompt_tokens + len(response.targets("include"))
    if needed > tokenizer.max_length:
        raise DataError(
            f"{config.pairs}, {row.where}: with what is asked in front the prompt and its response are {needed} "
            f"tokens, and at most {tokenizer.max_length} fit: make --better and --worse shorter, or leave the row out"
        )
