"""The bundled tokenizer: byte-level BPE trained on the world, in the files transformers reads.

Byte-level, so that any text can be scored with the bundled model; small, so that the embeddings
leave room for layers. Markers and terminator are special tokens; a BOS is put in front of plain
text, as the chat template puts it in front of a conversation: both spellings of a dialogue give the
same ids.
"""

import json
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from experiments.bundled import lexicon as lex
from experiments.bundled.world import ASSISTANT, USER, World, dialogues

PAD, BOS, EOS = "<pad>", "<bos>", "<eos>"
SPECIAL = (PAD, BOS, EOS, USER, ASSISTANT)
"""In the order of their ids, from 0."""

VOCABULARY = 1280
TRAINING_DIALOGUES = 20_000
ANSWER_WEIGHT = 500
"""How often each answer word is added to the training text: its rarer lower-case forms need it."""
MODEL_MAX_LENGTH = 512

# A space in front of every turn, and none at its ends: what ``world.prompt_text`` writes by hand.
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'user' -%}"
    "{{ '" + USER + " ' + message['content'] | trim }}"
    "{%- elif message['role'] == 'assistant' -%}"
    "{{ '" + ASSISTANT + " ' + message['content'] | trim + eos_token }}"
    "{%- else -%}"
    "{{ raise_exception('roles are user and assistant, got ' + message['role']) }}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '" + ASSISTANT + "' }}{%- endif -%}"
)

CONFIG = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "pad_token": PAD,
    "bos_token": BOS,
    "eos_token": EOS,
    "additional_special_tokens": [USER, ASSISTANT],
    "padding_side": "right",
    "model_max_length": MODEL_MAX_LENGTH,
    "clean_up_tokenization_spaces": False,
}


def train_tokenizer(world: World) -> Tokenizer:
    """Trains on dialogues of their own, checked to keep every answer word whole.

    Raises:
      ValueError: an answer word with its leading space is not one token.
    """
    texts = [d.prompt + d.response for d in dialogues(world, TRAINING_DIALOGUES, "tokenizer")]
    tokenizer = train_bpe([*texts, *answer_tokens() * ANSWER_WEIGHT])
    check_whole(tokenizer, answer_tokens())
    return tokenizer


def train_bpe(texts: Iterable[str]) -> Tokenizer:
    """A byte-level BPE with the special tokens and a BOS in front of plain text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    # The markers are cut out by hand: while training, special tokens are not recognised in text.
    tokenizer.train_from_iterator((part for t in texts for part in _without_markers(t)), trainer)
    bos = tokenizer.token_to_id(BOS)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS}:1 $B:1", special_tokens=[(BOS, bos)]
    )
    return tokenizer


def answer_tokens() -> tuple[str, ...]:
    """Every answer word in both cases, with the space that starts a response."""
    words = [word for group in lex.ANSWERS.values() for word in group]
    return tuple(f" {form}" for word in words for form in (word, word.lower()))


def check_whole(tokenizer: Tokenizer, texts: Iterable[str]) -> None:
    """Raises ValueError naming every text that is not a single token."""
    encoded = {t: tokenizer.encode(t, add_special_tokens=False).tokens for t in texts}
    split = [f"{text!r} -> {tokens}" for text, tokens in encoded.items() if len(tokens) != 1]
    if split:
        raise ValueError(f"must be single tokens, and are not: {'; '.join(split)}")


def save_tokenizer(tokenizer: Tokenizer, directory: Path) -> None:
    """Writes the files transformers reads; the same tokenizer gives the same bytes."""
    directory.mkdir(parents=True, exist_ok=True)
    text = tokenizer.to_str(pretty=True)
    (directory / "tokenizer.json").write_text(text + "\n", encoding="utf-8")
    config = json.dumps(CONFIG, indent=2)
    (directory / "tokenizer_config.json").write_text(config + "\n", encoding="utf-8")
    (directory / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")


def _without_markers(text: str) -> list[str]:
    return text.replace(USER, ASSISTANT).split(ASSISTANT)
