"""The table of formats that are read, by the ``quant_method`` of ``quantization_config``."""

from collections.abc import Callable, Mapping
from typing import Any

from ches_jax.errors import CheckpointError, many
from ches_jax.hf.quantised import awq, bitsandbytes, compressed, fp8, gptq, mxfp4
from ches_jax.hf.quantised.scheme import Scheme
from ches_jax.hf.tensors import DTYPES

KEY = "quantization_config"
Reader = Callable[[Mapping[str, Any], str], tuple[Scheme | None, list[str]]]
READERS: dict[str, Reader] = {
    "awq": awq.read,
    "bitsandbytes": bitsandbytes.read,
    "compressed-tensors": compressed.read,
    "fp8": fp8.read,
    "gptq": gptq.read,
    "mxfp4": mxfp4.read,
}
READ = (
    "fp8 with block scales, mxfp4, compressed-tensors (weights only), bitsandbytes nf4 and int8, gptq, awq (gemm); or "
    "give the unquantised weights"
)


def scheme_of(raw: Mapping[str, Any], where: str = "config.json") -> Scheme | None:
    """How the weights of a model are quantised, from its (text model's) config; None where they are not.

    >>> scheme_of({"quantization_config": {"quant_method": "awq", "bits": 4, "group_size": 128}}).name
    'awq gemm (4 bits, groups of 128)'

    Raises:
      CheckpointError: a format that is unknown, half described, or more than a way to store weights.
    """
    settings = raw.get(KEY)
    if settings is None:
        return None
    method = settings.get("quant_method") if isinstance(settings, dict) else None
    if method is None:
        raise CheckpointError(f"{where}: {KEY} = {settings!r:.80} has no 'quant_method'; what is read: {READ}")
    if method not in READERS:
        raise CheckpointError(
            f"{where}: a quantised checkpoint ({str(method)!r:.40}) that is not read; read are {READ}"
        )
    dtype = raw.get("dtype") or raw.get("torch_dtype") or "bfloat16"
    scheme, problems = READERS[method](settings, str(dtype))
    if dtype not in DTYPES.values():
        problems.append(f"'dtype' = {dtype!r:.40}; expected one of {', '.join(DTYPES.values())}")
    if problems or scheme is None:
        raise CheckpointError(many(f"{where}: {KEY} ({method})", problems) + f"\nwhat to do: read are {READ}")
    return scheme
