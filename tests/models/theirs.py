"""Models of transformers in exact float64, with weights that depend on the names of their parameters alone.

Its code asks for float32 in norms, softmaxes and rotary tables whatever the dtype of the model; here each such request
is float64. The published truth in ``../shared/golden`` was made so.
"""

import copy
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

TOKENS = 32
"""Length of the sequence: more than the windows of ``rows.py``, and more than the context of ``dynamic``."""
IDS = np.random.default_rng(0).integers(0, 101, (1, TOKENS))
PLAIN: dict[str, Any] = {"attn_implementation": "eager", "experts_implementation": "eager"}


class Theirs(NamedTuple):
    """What transformers makes of a config."""

    model: Any
    shapes: dict[str, tuple[int, ...]]
    hidden: np.ndarray
    logits: np.ndarray

    def differs(self, other: "Theirs") -> bool:
        """Whether it has other tensors, or other numbers."""
        if self.shapes != other.shapes:
            return True
        return float(np.abs(self.logits - other.logits).max()) > 1e-9 * float(np.abs(other.logits).max())


@contextmanager
def float64_for_float32() -> Iterator[None]:
    """Every request for float32 in the code of torch and transformers is one for float64."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "float32", torch.float64)
        patch.setattr(torch, "float", torch.float64)
        patch.setattr(torch.Tensor, "float", torch.Tensor.double)
        yield


def theirs(config_class: str, raw: dict[str, Any]) -> Theirs:
    """The model of a ``config.json``, and its states and logits of ``IDS``; whatever transformers raises."""
    with float64_for_float32(), torch.no_grad():
        torch.manual_seed(0)
        config = getattr(transformers, config_class).from_dict(copy.deepcopy(raw))
        model = transformers.AutoModelForCausalLM.from_config(config, **PLAIN, dtype=torch.float64).eval().double()
        stored = model.state_dict()
        for name, a in [*model.named_parameters(), *model.named_buffers()]:
            if a.is_floating_point() and name in stored:  # other buffers follow from the config
                generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
                noise = torch.randn(a.shape, generator=generator, dtype=torch.float64)
                if a.ndim > 1:
                    a.copy_(noise * a.shape[-1] ** -0.5)
                elif name.endswith(("sinks", "router.bias")):  # drawn in the width that the config says
                    a.copy_(noise)
                else:
                    a.add_(0.3 * noise)
        inner = getattr(model, "model", model.base_model)
        ids = torch.tensor(IDS)
        hidden, logits = inner(ids).last_hidden_state.numpy(), model(ids).logits.numpy()
    return Theirs(model, {n: tuple(t.shape) for n, t in model.state_dict().items()}, hidden, logits)
