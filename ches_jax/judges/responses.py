"""Responses to judge, and labels for them: rows of any file, known by row and number of the sample."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ches_jax.data.messages import as_messages, require_answer, text_of
from ches_jax.data.prompts import canonical_prompt, lookup
from ches_jax.data.schema.values import are_turns, turns
from ches_jax.data.sources import Kind, PairSource, Record, row_id
from ches_jax.data.template import continues
from ches_jax.errors import DataError, many
from ches_jax.generate.run import FILE_NAME
from ches_jax.inputs import Opener
from ches_jax.runs.store import here

Key = tuple[str, int]
WORDS = {
    "refusal": True,
    "refused": True,
    "refuse": True,
    "reject": True,
    "compliance": False,
    "complied": False,
    "comply": False,
    "compliant": False,
}
"""Labels in words -> whether the response refused."""
ALSO_TEXT = ("response", "output", "completion", "generated_text", "generation", "answer")
"""What others call the text of a response."""
_SHOWN = 3


def _identity(row: Mapping[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    """``row_id`` and ``sample`` of a row, and its prompt where it has one; without a row_id the prompt's own counts."""

    def value(name: str) -> Any:
        return lookup(row, columns.get(name, name))

    answers: dict[str, Any] = {}
    if value("prompt") is not None or value("prompt_ids") is not None:
        names = ("prompt", "prompt_ids", "tools", "chat_template_kwargs")
        prompt = {n: value(n) for n in names if value(n) is not None}
        if prompt.get("prompt") is not None:
            prompt.pop("prompt_ids", None)  # the output of ches generate has both; the text is what was asked
        answers |= canonical_prompt(prompt, {})
    if isinstance(value("row_id"), str):
        answers["row_id"] = value("row_id")
    elif answers:
        answers["row_id"] = row_id(answers)
    else:
        raise DataError(
            f"neither 'row_id' nor 'prompt' says which prompt it answers; found: {', '.join(map(str, row))}"
        )
    sample = 0 if value("sample") is None else value("sample")
    if isinstance(sample, str) and sample.isdigit():
        sample = int(sample)  # from a CSV table
    if not isinstance(sample, int) or sample < 0:
        raise DataError(f"'sample' is {sample!r}; expected a number from 0")
    return {**answers, "sample": sample}


def _called(row: Mapping[str, Any]) -> str:
    """The column of the response: ``text``, or else the one that others call it by.

    >>> _called({"prompt": "a", "response": "b"}), _called({"response": "a", "output": "b"})
    ('response', 'text')
    """
    found = [name for name in ALSO_TEXT if name in row]
    return found[0] if "text" not in row and len(found) == 1 else "text"


def _response(row: Mapping[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    name = columns.get("text") or _called(row)
    text = turns(lookup(row, name))
    if are_turns(text):  # as trainers write an answer: its message, or the conversation that it ends
        messages = as_messages(name, text)
        require_answer(name, messages)
        text = text_of(messages[-1])
    if not isinstance(text, str):
        raise DataError(
            f"no text in column '{name}'; found: {', '.join(map(str, row))}; say which column holds the response with "
            "--columns text=NAME"
        )
    return {**_identity(row, columns), "text": text}


def _label(row: Mapping[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    for name in ("refusal", "score", "label"):
        value = lookup(row, columns.get(name, name))
        if value is not None:
            return {**_identity(row, columns), "refusal": _refused(name, value)}
    raise DataError(
        f"no label; found: {', '.join(map(str, row))}; expected 'refusal' (true where the response refused), 'score' "
        "(0 refused, 1 complied) or 'label' (refusal, compliance); say which with --label-columns label=NAME"
    )


def _refused(name: str, value: Any) -> bool:
    """Whether a label says that the response refused; a number that is called ``label`` may mean either."""
    text = str(value).strip().lower()
    if name == "label":
        if text in WORDS:
            return WORDS[text]
        numbers = "; of 0 and 1, say which refused: --label-columns refusal=NAME (1 did) or score=NAME (0 did)"
        raise DataError(f"'label' is {value!r}; expected {', '.join(WORDS)}{numbers}")
    if text in ("true", "false", "1", "0", "1.0", "0.0"):
        yes = text in ("true", "1", "1.0")
        return yes if name == "refusal" else not yes
    raise DataError(f"'{name}' is {value!r}; expected 0 or 1")


_PROMPT = ("prompt", "prompt_ids", "tools", "chat_template_kwargs")
RESPONSES = Kind(
    "responses",
    ("text", "row_id", "sample", "category", *_PROMPT),
    lambda row, columns: [(None, _response(row, columns))],
)
LABELS = Kind(
    "labels",
    ("refusal", "score", "label", "row_id", "sample", *_PROMPT),
    lambda row, columns: [(None, _label(row, columns))],
)


def open_responses(opener: Opener, spec: str, split: str | None, columns: Mapping[str, str]) -> PairSource:
    """Responses from a file, or from the directory of ``ches generate``.

    Raises:
      DataError: nothing there, or a first row without a text.
    """
    spec = here(spec, DataError)
    folder = Path(spec)
    if (folder / FILE_NAME).is_file():
        spec = str(folder / FILE_NAME)
    elif (folder / "config.json").is_file() and not (folder / "state.json").is_file():
        raise DataError(f"{spec}: no {FILE_NAME}; if this is a run of ches generate, finish it with --resume")
    return opener.rows(spec, split, columns, RESPONSES, "responses")


def asked_and_answered(row: Record) -> tuple[Any, str]:
    """What was asked (None: unknown), and the whole answer: with its beginning, where the prompt ends with that."""
    prompt, text = row.content.get("prompt"), row.content["text"]
    if isinstance(prompt, list) and continues(prompt):
        return prompt[:-1], text_of(prompt[-1]) + text
    return prompt, text


def key(row: Record) -> Key:
    """What a response and its label have in common."""
    return row.content["row_id"], row.content["sample"]


def read_labels(opener: Opener, spec: str, columns: Mapping[str, str]) -> dict[Key, bool]:
    """Whether each response refused.

    Raises:
      DataError: a row without a label, or two labels for one response that differ.
    """
    refusals: dict[Key, bool] = {}
    source = opener.rows(spec, None, columns, LABELS, "labels")
    for row in source:
        if row.fault:
            raise DataError(f"{source.name}, {row.where}: {row.fault}")
        refused = row.content["refusal"]
        if refusals.setdefault(key(row), refused) != refused:
            raise DataError(f"{source.name}, {row.where}: another label for the same response stands before it")
    return refusals


def require_readable(rows: Iterable[Record], name: str) -> None:
    """The policy ``--on-bad-row error``.

    Raises:
      DataError: rows cannot be read; tells how many and the first.
    """
    count, faults = 0, []
    for row in rows:
        count += 1
        if row.fault:
            faults.append(f"row {row.index}, {row.where}: {row.fault}")
    if faults:
        shown = [*faults[:_SHOWN], *(["..."] if len(faults) > _SHOWN else [])]
        raise DataError(
            many(f"{name}: {len(faults)} of {count} rows cannot be read", shown, limit=_SHOWN + 1)
            + "\nwhat to do: --on-bad-row drop leaves them out and lists them in dropped.jsonl; "
            "--on-bad-row keep leaves them undecided"
        )


def dropped_row(row: Record) -> dict[str, Any]:
    """The line of ``dropped.jsonl`` of a row that cannot be read."""
    return {
        "row_id": row.row_id,
        "index": row.index,
        "reasons": ["unreadable"],
        "detail": {"unreadable": f"{row.where}: {row.fault}"},
    }


def require_labels(responses: Iterable[Record], labels: Mapping[Key, bool], name: str) -> None:
    """Every response has a label.

    Raises:
      DataError: tells how many have none, and the first.
    """
    rows, missing = 0, []
    for row in responses:
        rows += 1
        if not row.fault and key(row) not in labels:
            missing.append(f"row {row.index} (row_id {key(row)[0][:12]}, sample {key(row)[1]})")
    if missing:
        shown = [*missing[:_SHOWN], *(["..."] if len(missing) > _SHOWN else [])]
        raise DataError(
            many(f"{name}: {len(missing)} of {rows} responses have no label", shown, limit=_SHOWN + 1)
            + "\nwhat to do: add them (joined by row_id and sample, or by prompt and sample), or judge with "
            "--on-missing keep, which leaves them undecided"
        )
