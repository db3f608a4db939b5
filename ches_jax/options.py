"""Option types of the command line that need words of their own."""

from typing import Annotated

from tyro.constructors import PrimitiveConstructorSpec

from ches_jax.errors import ChesError


def _renames(words: list[str]) -> dict[str, str]:
    pairs = [word.partition("=") for word in words]
    for word, (ours, equals, theirs) in zip(words, pairs, strict=True):
        if not (ours and equals and theirs):
            raise ChesError(f"--columns {word!r}: expected ours=theirs, such as prompt=instruction")
    return {ours: theirs for ours, _, theirs in pairs}


Columns = Annotated[
    dict[str, str],
    PrimitiveConstructorSpec(
        nargs="*",
        metavar="OURS=THEIRS",
        instance_from_str=_renames,
        is_instance=lambda value: isinstance(value, dict),
        str_from_instance=lambda value: [f"{k}={v}" for k, v in value.items()],
    ),
]
"""Other names of columns: ``--columns prompt=instruction chosen=answer_1``."""
