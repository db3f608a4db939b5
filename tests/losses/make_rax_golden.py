"""Write rax_golden.json: what Rax, the learning-to-rank library of LiPO's authors' group, computes on random lists.

Rax is no dependency of the tests; this script is run by hand when its version moves:

    pip install --no-deps --target DIR rax && PYTHONPATH=DIR python tests/losses/make_rax_golden.py
"""

import json
from pathlib import Path

import numpy as np

OUT = Path(__file__).with_name("rax_golden.json")
ROWS, PLACES = 5, 4


def main() -> None:
    """Compute and write."""
    import jax

    with jax.enable_x64(True):
        import jax.numpy as jnp
        import rax  # pyright: ignore[reportMissingImports]

        rng = np.random.default_rng(0)
        s = rng.normal(0, 2, (ROWS, PLACES))
        scores = -np.sort(-rng.uniform(0, 1, (ROWS, PLACES)), axis=-1)
        sizes = rng.integers(2, PLACES + 1, ROWS)
        mask = np.arange(PLACES) < sizes[:, None]
        lists = [(jnp.asarray(a[:n]), jnp.asarray(b[:n])) for a, b, n in zip(s, scores, sizes, strict=True)]
        values = {
            "list_mle": [rax.listmle_loss(a, b) for a, b in lists],
            "list_softmax": [rax.softmax_loss(a, jax.nn.softmax(b / 0.5)) for a, b in lists],
            "lipo_lambda": [
                rax.pairwise_logistic_loss(a, b, lambdaweight_fn=rax.dcg_lambdaweight, reduce_fn=jnp.sum)
                for a, b in lists
            ],
        }
        golden = {
            "rax": rax.__version__,
            "s": s.tolist(),
            "scores": scores.tolist(),
            "mask": mask.astype(int).tolist(),
            "values": {name: [float(v) for v in some] for name, some in values.items()},
        }
    OUT.write_text(json.dumps(golden) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
