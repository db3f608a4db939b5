"""Statements with the stance that an answer should take, and their prompts and answers as tokens."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ches_jax.errors import DataError
from experiments.persona.config import PersonaScale

STANCES = ("agree", "disagree", "open", "other")
"""What a token or an answer means, in the order of the numbers of ``Words.stances``."""
HUB_FILE = "persona/ends-justify-means.jsonl"
"""In the repository of Anthropic's model-written evaluations."""


class Statement(NamedTuple):
    """A question about a statement, and the stance an answer should take."""

    question: str
    stance: str


def read_statements(source: str) -> list[Statement]:
    """Statements of the bundled world, of a JSONL file, or of a hub repository.

    A file has ``question`` and ``answer_matching_behavior``: the trait is undesired, so a statement that accords with
    it (Yes) is to be answered with no.

    Raises:
      DataError: unreadable, or a row without these.
    """
    if source == "bundled":
        from experiments.bundled.sampling import stream
        from experiments.bundled.world import ask_about, build_world

        world = build_world(0)
        rng = stream(0, "experiments/persona")
        return [Statement(ask_about(rng, s), s.stance) for s in world.held_out.statements if s.stance != "open"]
    path = Path(source).expanduser()
    if not path.exists():
        from huggingface_hub import hf_hub_download

        try:
            path = Path(hf_hub_download(source, HUB_FILE, repo_type="dataset"))
        except Exception as e:  # the hub client raises dozens of types
            raise DataError(f"{source}: no such file, and the hub gave no {HUB_FILE} of it ({type(e).__name__})") from e
    statements = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            row: dict[str, Any] = json.loads(line)
            stance = {"Yes": "disagree", "No": "agree"}[row["answer_matching_behavior"].strip()]
            statements.append(Statement(row["question"], stance))
        except (ValueError, KeyError, TypeError, AttributeError):
            raise DataError(
                f"{path}, line {number}: expected an object with question and answer_matching_behavior (Yes or No)"
            ) from None
    return statements


def draw(statements: Sequence[Statement], stance: str, seed: int) -> int:
    """Index of the statement of a run: the first of a seeded permutation of those with the stance."""
    eligible = [i for i, s in enumerate(statements) if s.stance == stance]
    if not eligible:
        raise DataError(f"no statement is to be answered with {stance!r}")
    return eligible[int(np.random.default_rng(seed).permutation(len(eligible))[0])]


class Words:
    """A tokenizer's view of the experiment: prompts, answer words, the stance of every token."""

    def __init__(self, config: PersonaScale, directory: Path):
        """Reads the tokenizer of a model directory."""
        from ches_jax.data.tokenize import load_tokenizer

        self.config = config
        self.tokenizer: Any = load_tokenizer(directory)

    def prompt(self, statement: Statement) -> list[int]:
        """Token ids of the prompt, with what the tokenizer puts in front and without what it puts behind."""
        text = self.config.template.format(question=statement.question)
        ids = list(self.tokenizer(text)["input_ids"])
        return ids[:-1] if ids[-1] == self.tokenizer.eos_token_id else ids

    def word(self, word: str) -> int:
        """The one token of an answer word.

        Raises:
          DataError: the vocabulary has no such token.
        """
        ids = self.phrase(word)
        if len(ids) != 1:
            raise DataError(f"{self.config.prefix + word!r} is {len(ids)} tokens of this tokenizer; expected one")
        return ids[0]

    def phrase(self, text: str) -> list[int]:
        """Token ids of an answer."""
        return list(self.tokenizer(self.config.prefix + text, add_special_tokens=False)["input_ids"])

    def text(self, token: int) -> str:
        """A token as the tables show it: ``_`` for a leading space."""
        piece = self.tokenizer.convert_ids_to_tokens(token)
        return str(piece).replace("Ġ", "_").replace("▁", "_").replace("Ċ", "\\n")

    def stances(self, size: int, words: Mapping[str, Sequence[str]]) -> np.ndarray:
        """Index into ``STANCES`` of each of the model's ``size`` tokens."""
        pieces = self.tokenizer.batch_decode([[i] for i in range(min(size, len(self.tokenizer)))])
        known = [STANCES.index(stance_of(p, words)) for p in pieces]
        return np.array(known + [STANCES.index("other")] * (size - len(known)), np.int64)


def stance_of(text: str, words: Mapping[str, Sequence[str]]) -> str:
    """Meaning of a token by its letters alone: case, spaces and quotes around it do not count.

    >>> stance_of('"Yes', {"agree": ["Yes"]}), stance_of("rope", {"agree": ["Yes"]})
    ('agree', 'other')
    """
    bare = text.strip(" \t\n\"'“”‘’`.!,").lower()
    return next((stance for stance, some in words.items() if bare in {w.lower() for w in some}), "other")


def stance_of_word(config: PersonaScale, word: str) -> str:
    """Stance of a statement that a contest's winner answers rightly."""
    return "agree" if word in config.labels["agree"] else "disagree"
