"""Continue prompts by sampling, or greedily."""

from typing import TYPE_CHECKING

from ches_jax.face import lazy_names, make_callable

if TYPE_CHECKING:
    from ches_jax.generate.config import GenerateConfig as GenerateConfig
    from ches_jax.generate.engine import Engine as Engine
    from ches_jax.generate.run import generate as generate
    from ches_jax.generate.sampling import Sampling as Sampling

_HOMES = {
    "generate": ".run",
    "GenerateConfig": ".config",
    "Engine": ".engine",
    "Sampling": ".sampling",
}
__all__ = [*_HOMES]  # pyright: ignore[reportUnsupportedDunderAll]
__getattr__, __dir__ = lazy_names(__name__, _HOMES)
make_callable(__name__)
