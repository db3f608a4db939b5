"""The model that an item starts from: as it is, or after a first step of fine-tuning on chosen responses."""

from pathlib import Path
from typing import Any

from experiments.framework.item import Work
from experiments.framework.training import run_training


def start_model(work: Work) -> Path:
    """The model that is scored and trained."""
    from ches_jax.hf.directory import resolve

    if work.config.after_sft:
        return work.folder("sft") / "model"
    assert work.config.model is not None
    return resolve(work.config.model)


def tune(work: Work, pairs: Path, **options: Any) -> dict[str, Any]:
    """SFT on the chosen responses of ``pairs``; nats a token of them, before and after.

    Args:
      work: its scale says how (``Scale.sft``).
      pairs: what it trains on.
      options: others of ``ches train``.
    """
    from ches_jax.train.config import TrainConfig

    recipe = work.config.sft
    found = run_training(
        TrainConfig(
            model=str(work.config.model), pairs=str(pairs), loss="sft", optimizer="adamw", lr=recipe.lr,
            schedule="cosine", warmup=8, epochs=recipe.epochs, batch_size=32, out=str(work.folder("sft")),
            mesh=work.config.mesh, **options,
        ),
        quiet=work.quiet,
    )  # fmt: skip
    per_token = {}
    for when, step in (("before", 0), ("after", None)):
        rows = found.of("train", step)
        per_token[when] = float((rows["logp_chosen"] / rows["chosen_tokens"]).mean())
    return {"updates": int(found.log["step"].max()), "nats_per_token": per_token}
