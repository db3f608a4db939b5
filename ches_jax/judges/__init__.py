"""Did responses refuse? Asked of a list of phrases, of a language model, or of labels."""

from typing import TYPE_CHECKING

from ches_jax.face import lazy_names

if TYPE_CHECKING:
    from ches_jax.judges.config import JudgeConfig as JudgeConfig
    from ches_jax.judges.run import judge as judge

_HOMES = {
    "judge": ".run",
    "JudgeConfig": ".config",
}
__all__ = [*_HOMES]  # pyright: ignore[reportUnsupportedDunderAll]
__getattr__, __dir__ = lazy_names(__name__, _HOMES)
