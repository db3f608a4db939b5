"""The protocol of whatever looks at a model while it trains, and who looks when.

    step               0     1     2     3     4     5 = total
    every = 2          x           x           x     x
    every = None       x                             x

An observer is asked before the first update, after every ``every`` updates, and after the last one.

>>> class Norm:
...     every = 10
...     def observe(self, step, params):
...         return {"own/norm": float(sum((p**2).sum() for p in params.values()) ** 0.5)}
...     def close(self):
...         pass

``train(config, observers=[Norm()])`` puts ``own/norm`` into ``metrics.jsonl``.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from ches_jax.models.decoder import Decoder
from ches_jax.train.policy import Policy

Params = dict[str, Any]
"""All parameters of the model by dotted name, adapters among them; the next update takes their memory back."""
Watch = Callable[[int, Decoder], Mapping[str, float]]
"""From the number of updates done and the model there to numbers for ``metrics.jsonl``."""


class Observer(Protocol):
    """Looks at the model on a schedule of its own; its numbers join ``metrics.jsonl``."""

    @property
    def every(self) -> int | None:
        """Updates between two looks, beside those at the start and at the end; None: only those."""
        ...

    def observe(self, step: int, params: Params) -> Mapping[str, float]:
        """Numbers by name after ``step`` updates, under the parameters of that moment."""
        ...

    def close(self) -> None:
        """The run is finished; not called where it stopped or failed, since a resumed run has observers of its own."""
        ...


class EveryUpdate:
    """A function of the model as an observer of every update."""

    every = 1

    def __init__(self, policy: Policy, watch: Watch):
        """``policy`` makes a model of parameters."""
        self._policy = policy
        self._watch = watch

    def observe(self, step: int, params: Params) -> Mapping[str, float]:
        """What the function says of the model."""
        return self._watch(step, self._policy.with_parameters(params))

    def close(self) -> None:
        """Nothing is open."""


class Observers:
    """Several observers whose numbers share a line of ``metrics.jsonl``."""

    def __init__(self, members: Sequence[Observer], total: int):
        """``total``: updates of the run."""
        self.members = members
        self._total = total

    def _looks(self, one: Observer, step: int) -> bool:
        return step in (0, self._total) or bool(one.every and step % one.every == 0)

    def due(self, step: int) -> bool:
        """Whether somebody looks after ``step`` updates."""
        return any(self._looks(one, step) for one in self.members)

    def observe(self, step: int, params: Params) -> dict[str, float]:
        """The numbers of all who look after ``step`` updates."""
        numbers: dict[str, float] = {}
        for one in self.members:
            if self._looks(one, step):
                numbers |= one.observe(step, params)
        return numbers

    def close(self) -> None:
        """The run is finished."""
        for one in self.members:
            one.close()
