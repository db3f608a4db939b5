"""A tokenizer read from its files by the ``tokenizers`` library alone, where transformers would read the same.

Importing transformers takes seconds, most of it for what no tokenizer needs. ``tokenizer.json`` is the whole tokenizer
for the class that takes it as it stands (``TokenizersBackend``, also called ``PreTrainedTokenizerFast``). Other classes
build a tokenizer of their own from parts of that file, and settings can change it afterwards: ``read`` answers only
where each setting in the directory is known to change nothing, and otherwise leaves the directory to transformers.

Chat templates are rendered by transformers' own sandbox (``render_jinja_template``), which needs little of the rest.
"""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ches_jax.errors import DataError
from ches_jax.runs.files import read_object, read_text

if TYPE_CHECKING:
    from tokenizers import Tokenizer

CLASSES = ("TokenizersBackend", "PreTrainedTokenizerFast")
"""Of ``tokenizer_class``: those for which ``tokenizer.json`` is the tokenizer."""
REBUILT = ("qwen2", "qwen3_5", "qwen3_5_moe", "qwen3_5_moe_text", "qwen4_exp", "hyperclovax_vision_v2", "siglip2")
"""Of ``model_type``: those for which transformers takes another class, whatever the directory names."""
NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_MORE = ("additional_special_tokens", "extra_special_tokens")
_HARMLESS = {
    *("tokenizer_class", "added_tokens_decoder", "chat_template", "backend", "is_local", "local_files_only"),
    *("name_or_path", "model_max_length", "padding_side", "truncation_side", "model_input_names"),
    *("clean_up_tokenization_spaces", "add_bos_token", "add_eos_token", "special_tokens_map_file", "legacy"),
}
"""Settings that are read here, or do not change ids where there is a ``tokenizer.json``."""
_OTHER_FILES = ("added_tokens.json", "tekken.json", "additional_chat_templates")
_IDS_ONLY = {
    **{"padding": False, "truncation": False, "verbose": False},
    **{"return_attention_mask": False, "return_token_type_ids": False},
}


class FileTokenizer:
    """What reading pairs takes of a transformers tokenizer; anything else of one is asked of transformers.

    Attributes:
      name_or_path: the directory.
      backend_tokenizer: of the ``tokenizers`` library.
      special_tokens_map: the named special tokens, by name.
      chat_template: the template, or several by name, or None.
    """

    def __init__(
        self, directory: Path, backend: "Tokenizer", special: dict[str, str], chat_template: str | dict[str, str] | None
    ):
        """Takes what ``read`` has found in ``directory``."""
        self.name_or_path = str(directory)
        self.backend_tokenizer = backend
        self.special_tokens_map = special
        self.chat_template = chat_template
        for name in NAMED:
            token = special.get(name)
            setattr(self, name, token)
            setattr(self, f"{name}_id", None if token is None else backend.token_to_id(token))

    def __getattr__(self, name: str) -> Any:
        """Whatever else a tokenizer of transformers has."""
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self._in_transformers(), name)

    def __len__(self) -> int:
        """Tokens of the vocabulary, added ones included."""
        return self.backend_tokenizer.get_vocab_size(with_added_tokens=True)

    def __bool__(self) -> bool:
        """True, as for a tokenizer of transformers."""
        return True

    def __call__(self, text: Any, *more: Any, **settings: Any) -> Any:
        """As transformers, of which only the call of ``token_ids`` is answered here."""
        special = settings.pop("add_special_tokens", True)
        if more or settings != _IDS_ONLY:
            return self._in_transformers()(text, *more, add_special_tokens=special, **settings)
        texts = [text] if isinstance(text, str) else text
        ids = [encoded.ids for encoded in self.backend_tokenizer.encode_batch(texts, add_special_tokens=special)]
        return {"input_ids": ids[0] if isinstance(text, str) else ids}

    def decode(self, token_ids: int | Sequence[int], skip_special_tokens: bool = False, **settings: Any) -> str:
        """The text of token ids."""
        if settings.keys() - {"clean_up_tokenization_spaces"} or settings.get("clean_up_tokenization_spaces"):
            return self._in_transformers().decode(token_ids, skip_special_tokens=skip_special_tokens, **settings)
        ids = [token_ids] if isinstance(token_ids, int) else [int(i) for i in token_ids]
        return self.backend_tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)

    def batch_decode(self, sequences: Sequence[Sequence[int]], **settings: Any) -> list[str]:
        """The texts of several sequences."""
        return [self.decode(ids, **settings) for ids in sequences]

    def get_vocab(self) -> dict[str, int]:
        """Token -> id, added tokens included."""
        return self.backend_tokenizer.get_vocab(with_added_tokens=True)

    @property
    def added_tokens_decoder(self) -> Mapping[int, Any]:
        """Id -> added token."""
        return self.backend_tokenizer.get_added_tokens_decoder()

    def get_chat_template(self, chat_template: str | None = None, tools: Any = None) -> str:
        """The template that is used: the text or name that is given, or of several the one for tools, or the default.

        Raises:
          ValueError: there is none, or several and none is the default one.
        """
        own = self.chat_template if isinstance(self.chat_template, dict) else {"default": self.chat_template}
        if chat_template is not None:
            return own.get(chat_template) or chat_template
        chosen = own.get("tool_use" if tools is not None and "tool_use" in own else "default")
        if chosen is None:
            raise ValueError(f"no default chat template; the tokenizer has {sorted(k for k, v in own.items() if v)}")
        return chosen

    def apply_chat_template(
        self,
        conversation: Sequence[Mapping[str, Any]],
        tools: Any = None,
        chat_template: str | None = None,
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
        tokenize: bool = True,
        **variables: Any,
    ) -> Any:
        """The text of a conversation (``tokenize=False``), rendered by transformers."""
        template = self.get_chat_template(chat_template, tools)
        settings: dict[str, Any] = {
            **{"tools": tools, "chat_template": template},
            **{"add_generation_prompt": add_generation_prompt, "continue_final_message": continue_final_message},
        }
        if tokenize:
            return self._in_transformers().apply_chat_template(conversation, **settings, **variables)
        if not conversation:
            raise ValueError("an empty conversation; expected at least one message")
        from transformers.utils.chat_template_utils import render_jinja_template

        messages = [{name: value for name, value in message.items() if value is not None} for message in conversation]
        rendered, _ = render_jinja_template([messages], **settings, **{**self.special_tokens_map, **variables})
        return rendered[0]

    def _in_transformers(self) -> Any:
        if "_whole" not in self.__dict__:
            from transformers import AutoTokenizer

            self._whole = AutoTokenizer.from_pretrained(self.name_or_path, local_files_only=True)
        return self._whole


def token_ids(tokenizer: Any, texts: Any, *, add_special_tokens: bool) -> Any:
    """Ids of a text or of texts, by any tokenizer.

    Raises:
      DataError: the tokenizer cannot encode one of them, as where its unknown token is none of its vocabulary.
      TypeError: one is no text, or holds half a surrogate pair.
    """
    try:
        return tokenizer(texts, add_special_tokens=add_special_tokens, **_IDS_ONLY)["input_ids"]
    except Exception as error:
        if type(error) is not Exception:  # what the library raises has no type of its own
            raise
        raise DataError(
            f"the tokenizer cannot encode a text ({type(error).__name__}: {str(error)[:200]}); look at "
            "tokenizer_config.json: its tokenizer_class has to fit tokenizer.json, and the tokens that it names"
        ) from error


def is_blank(tokenizer: Any, token_id: int) -> bool:
    """Whether a token is nothing but white space."""
    return not str(tokenizer.decode([token_id])).strip()


def read(directory: Path) -> FileTokenizer | None:
    """The tokenizer of a directory; None where only transformers knows what it is, or why it is none."""
    try:
        settings = read_object(directory / "tokenizer_config.json", DataError, "a tokenizer")
        config = read_object(directory / "config.json", DataError, "a model")
    except DataError:
        return None
    if settings.get("tokenizer_class") not in CLASSES or config.get("model_type") in REBUILT:
        return None
    if settings.keys() - _HARMLESS - {*NAMED, *_MORE} or any((directory / name).exists() for name in _OTHER_FILES):
        return None
    if not (directory / "tokenizer.json").is_file():
        return None
    try:
        return _read(directory, settings)
    except Exception:  # the file is damaged, or something in it is not what it should be: transformers says it
        return None


def _read(directory: Path, settings: Mapping[str, Any]) -> FileTokenizer | None:
    from tokenizers import Tokenizer, processors

    if not isinstance(settings.get("model_max_length", 0), int | float):
        return None  # transformers tells what is wrong with it
    backend = Tokenizer.from_file(str(directory / "tokenizer.json"))
    if backend.padding is not None and not settings.get("pad_token"):
        return None  # the token that the file pads with is the tokenizer's too, and is added where it is none
    backend.no_padding()
    backend.no_truncation()
    if backend.post_processor is None:  # as transformers does: one that adds nothing, part of the fingerprint
        backend.post_processor = processors.TemplateProcessing(single="$A:0", pair="$A:0 $B:1", special_tokens=[])
    added = {token.content: token for token in backend.get_added_tokens_decoder().values()}
    special = {name: _content(settings[name]) for name in NAMED if settings.get(name) is not None}
    beside = _read_beside(directory, settings)
    more = [_content(token) for names in (settings, beside) for name in _MORE for token in names.get(name) or ()]
    # a token that is not there yet would be added, and one that is not special would become so
    if not all(token in added and added[token].special for token in (*special.values(), *more)):
        return None
    if not _agrees(settings.get("added_tokens_decoder"), added):
        return None
    if settings.get("clean_up_tokenization_spaces") and type(backend.model).__name__ != "BPE":
        return None
    if beside and {name: _content(value) for name, value in beside.items() if name not in _MORE} != special:
        return None
    template = _template(directory, settings)
    return FileTokenizer(directory, backend, special, template)


def _read_beside(directory: Path, settings: Mapping[str, Any]) -> Mapping[str, Any]:
    """Special tokens of the older file beside the settings, which count where the settings declare no added tokens."""
    file = directory / "special_tokens_map.json"
    if "added_tokens_decoder" in settings or not file.exists():
        return {}
    return read_object(file, DataError, "a tokenizer")


def _agrees(declared: Any, added: Mapping[str, Any]) -> bool:
    """Whether the added tokens of ``tokenizer_config.json`` are those of ``tokenizer.json``, in every property."""
    if not declared:
        return declared is None
    properties = ("lstrip", "rstrip", "normalized", "single_word", "special")
    return all(
        token["content"] in added and all(token.get(p) == getattr(added[token["content"]], p) for p in properties)
        for token in declared.values()
    )


def _template(directory: Path, settings: Mapping[str, Any]) -> str | dict[str, str] | None:
    """The chat template of a directory: its own file, or else what the settings hold."""
    file = directory / "chat_template.jinja"
    template = settings.get("chat_template")
    if file.exists():  # with line ends as reading a text gives them
        template = io.StringIO(read_text(file, DataError, "a template"), newline=None).read()
    if isinstance(template, list):
        return {one["name"]: one["template"] for one in template}
    if template is None or isinstance(template, str):
        return template
    raise TypeError(f"chat_template: {type(template).__name__}")


def _content(token: Any) -> str:
    """The text of a token, which may stand as an object with its properties."""
    text = token["content"] if isinstance(token, dict) else token
    if not isinstance(text, str):
        raise TypeError(f"a special token: {type(text).__name__}")
    return text
