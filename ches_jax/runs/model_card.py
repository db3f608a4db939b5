"""The card of a model that was trained or converted: where it comes from, and how far its responses moved."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ches_jax.runs.files import replacing
from ches_jax.runs.markdown import table

CARD = "README.md"

_SIDES = {"eval_displacement/": "held-out pairs", "displacement/": "watched training pairs"}
_COLUMNS = ("dlogp_chosen", "dlogp_rejected", "margin", "lld_rate")


def trained_card(run: Mapping[str, Any], step: int, numbers: Mapping[str, float], library: str = "transformers") -> str:
    """The card of a checkpoint of ``ches train``.

    Args:
      run: its ``run.json``.
      step: updates that the checkpoint has seen.
      numbers: what was measured at this step (``displacement/*``, ``eval_displacement/*``); may be empty.
      library: what loads it, by its name on the hub: ``peft`` for an adapter.
    """
    config = run["config"]
    lines = [
        f"Trained with `ches train` from `{_name(config['model'])}`: {step} updates of `{run['loss']}`.",
        "",
        "## What the training did to the responses",
        "",
        *_displacement(numbers),
        "",
        "## Where it comes from",
        "",
        *table(
            {
                "base model": _name(config["model"]),
                "base fingerprint": run.get("model_fingerprint"),
                "reference": run.get("reference"),
                "objective": run["loss"],
                "optimizer": run.get("optimizer"),
                "learning rate": config.get("lr"),
                "batch size": config.get("batch_size"),
                "updates": f"{step} of {run['counts']['updates']}",
                "seed": config.get("seed"),
                "pairs": _name(config["pairs"]),
                "pairs fingerprint": run.get("data_fingerprint"),
                "training pairs": run["counts"].get("train"),
                "held-out pairs": run["counts"].get("held_out"),
                "versions": run.get("versions"),
            }
        ),
    ]
    return _card(lines, config["model"], "trained", "preference-optimisation", library)


def converted_card(model: str, adapter: str | None, dtype: str | None) -> str:
    """The card of a model that was only written anew."""
    lines = [
        "Written anew with `ches convert`; nothing was trained.",
        "",
        *table({"from": _name(model), "adapter, merged": adapter and _name(adapter), "dtype": dtype or "as it was"}),
    ]
    return _card(lines, model, "converted", "converted", "transformers")


def write_card(folder: Path, text: str) -> None:
    """Beside the weights; a card that is there is left alone."""
    if not (folder / CARD).exists():
        with replacing(folder / CARD) as path:
            path.write_text(text, encoding="utf-8")


def _displacement(numbers: Mapping[str, float]) -> list[str]:
    rows = []
    for prefix, pairs in _SIDES.items():
        values = [numbers.get(prefix + name) for name in _COLUMNS]
        if any(value is not None for value in values):
            rows.append(f"| {pairs} | " + " | ".join("" if v is None else f"{v:+.3f}" for v in values[:3]))
            rows[-1] += " | " + ("" if values[3] is None else f"{values[3]:.0%}") + " |"
    if not rows:
        return ["Not measured at this step: `ches diagnose --before BASE --after THIS --pairs HELD-OUT` measures it."]
    return [
        "Mean changes of ln π since the start, in nats, and the share of pairs whose chosen response fell.",
        "",
        "| | chosen | rejected | margin | chosen fell |",
        "|---|---|---|---|---|",
        *rows,
        "",
        "Means only. With intervals, and whether it harmed: `ches diagnose RUN`.",
    ]


def _card(lines: list[str], model: str, done: str, tag: str, library: str) -> str:
    hub = f"base_model: {model}\n" if model.count("/") == 1 and not Path(model).exists() else ""
    head = f"---\nlibrary_name: {library}\n{hub}tags:\n- ches\n- {tag}\n---\n# {_name(model)}, {done}\n\n"
    return head + "\n".join(lines) + "\n"


def _name(source: str) -> str:
    """A hub name whole; of a path its last part, since the machine it lay on is nobody's business."""
    return source if source.count("/") == 1 and not Path(source).exists() else Path(source).name
