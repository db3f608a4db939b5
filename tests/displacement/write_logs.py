"""Writes the logs in ``logs/`` that no trainer of this machine made, after the documented formats of their trainers.

    python tests/displacement/write_logs.py

One simulated run is written in each format: held-out chosen falls by six nats while rejected falls by ten and training
chosen rises (beta 0.1). ``expected.json`` says for each log what a diagnosis must tell.
"""

import csv
import json
import math
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

LOGS = Path(__file__).parent / "logs"
BETA, STEPS, EVERY = 0.1, 100, 10


def course() -> Iterator[tuple[int, dict[str, float], dict[str, float] | None]]:
    """Step, training metrics, held-out metrics where there was an evaluation; rewards as DPO defines them."""
    noise = random.Random(0)
    for step in range(1, STEPS + 1):
        share = 1 - math.exp(-4 * step / STEPS)
        chosen, rejected = 0.2 * share + noise.gauss(0, 0.02), -0.9 * share + noise.gauss(0, 0.02)
        margin = chosen - rejected
        train = {
            "loss": math.log1p(math.exp(-margin)),
            "chosen": chosen,
            "rejected": rejected,
            "margin": margin,
            "accuracy": 0.9,
            "logp_chosen": -85 + noise.gauss(0, 9),
            "logp_rejected": -95 + noise.gauss(0, 9),
        }
        held_out = None
        if step % EVERY == 0:
            c, r = -0.6 * step / STEPS, -1.0 * step / STEPS
            held_out = {
                "loss": math.log1p(math.exp(r - c)),
                "chosen": c,
                "rejected": r,
                "margin": c - r,
                "accuracy": 0.7,
                "logp_chosen": -120 + c / BETA,
                "logp_rejected": -150 + r / BETA,
            }
        yield step, train, held_out


def named(values: dict[str, float], names: dict[str, str], prefix: str = "") -> dict[str, float]:
    """The metrics that a trainer logs, as it calls them."""
    return {prefix + theirs: round(values[ours], 6) for ours, theirs in names.items()}


TRL = {
    "loss": "loss",
    "chosen": "rewards/chosen",
    "rejected": "rewards/rejected",
    "margin": "rewards/margins",
    "accuracy": "rewards/accuracies",
    "logp_chosen": "logps/chosen",
    "logp_rejected": "logps/rejected",
}


def rows(names: dict[str, str], train: str = "", held_out: str = "eval_", step: str = "step") -> list[dict[str, Any]]:
    """Entries of a log whose training and evaluation metrics stand in rows of their own."""
    out: list[dict[str, Any]] = []
    for at, first, second in course():
        out.append({step: at, **named(first, names, train)})
        if second is not None:
            out.append({step: at, **named(second, names, held_out)})
    return out


def lines(name: str, entries: list[dict[str, Any]], file: str = "metrics.jsonl") -> None:
    """JSON lines."""
    folder = LOGS / name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / file).write_text("".join(json.dumps(e) + "\n" for e in entries))


def table(name: str, entries: list[dict[str, Any]], columns: dict[str, str]) -> None:
    """CSV with other names of columns; cells of metrics that a row does not have are empty."""
    folder = LOGS / name
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "export.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, list(columns.values()))
        writer.writeheader()
        for entry in entries:
            writer.writerow({columns[k]: v for k, v in entry.items() if k in columns})


def original(step: int, train: dict[str, float], held_out: dict[str, float] | None) -> dict[str, float]:
    """An entry as the first implementation of DPO writes it: ``rewards_eval/chosen``."""
    names = {ours: theirs for ours, theirs in TRL.items() if "/" in theirs}
    out: dict[str, float] = {"step": step}
    for name, values in (("train", train), ("eval", held_out)):
        if values is not None:
            out |= {key.replace("/", f"_{name}/"): value for key, value in named(values, names).items()}
    return out


def main() -> None:
    """All formats."""
    # transformers and what is built on it
    state = {"global_step": STEPS, "log_history": rows(TRL)}
    (LOGS / "axolotl/checkpoint-100").mkdir(parents=True, exist_ok=True)
    (LOGS / "axolotl/checkpoint-100/trainer_state.json").write_text(json.dumps(state) + "\n")
    llama = LOGS / "llama_factory"
    llama.mkdir(parents=True, exist_ok=True)
    (llama / "trainer_state.json").write_text(json.dumps(state) + "\n")
    lines(
        "llama_factory",
        [{"current_steps": s, "total_steps": STEPS, "loss": t["loss"], "accuracy": 0.9} for s, t, _ in course()],
        "trainer_log.jsonl",
    )
    lines(
        "llama_factory_trainer_log_alone",
        [
            {"current_steps": s, "total_steps": STEPS, "loss": round(t["loss"], 4), "accuracy": 0.9}
            for s, t, _ in course()
            if s % 10 == 0
        ],
        "trainer_log.jsonl",
    )
    swift = [
        {
            **{k: str(v) if k == "loss" else v for k, v in e.items() if k != "step"},
            "global_step/max_steps": f"{e['step']}/{STEPS}",
            "percentage": f"{e['step']}%",
        }
        for e in rows(TRL)
    ]
    lines("ms_swift", swift, "logging.jsonl")
    names = {k: v for k, v in TRL.items() if k != "loss"} | {"margin": "rewards/margin", "accuracy": "rewards/accuracy"}
    lines(
        "open_instruct",
        [{"training_step": s, "train_loss": round(t["loss"], 5), **named(t, names)} for s, t, _ in course()],
    )
    printed = ["  1%|          | 1/100 [00:01<01:40]", *(repr(e) for e in rows(TRL))]
    (LOGS / "console").mkdir(parents=True, exist_ok=True)
    (LOGS / "console/train.log").write_text("\n".join(printed) + "\n")
    # other trainers
    rlhf = {"loss": "loss", "chosen": "chosen_reward", "rejected": "reject_reward", "accuracy": "acc"}
    lines("open_rlhf", [{"train/global_step": s, **named(t, rlhf, "train/")} for s, t, _ in course()])
    nemo = {
        "loss": "preference_loss",
        "chosen": "rewards_chosen_mean",
        "rejected": "rewards_rejected_mean",
        "accuracy": "accuracy",
    }
    lines("nemo_rl", rows(nemo, "train/", "validation-default/"))
    (LOGS / "nemo_rl/config.yaml").write_text("dpo:\n  reference_policy_kl_penalty: 0.1\n  preference_loss_weight: 1\n")
    tunix = {
        "loss": "loss",
        "chosen": "rewards/chosen",
        "rejected": "rewards/rejected",
        "margin": "rewards/margin",
        "accuracy": "rewards/accuracy",
        "logp_chosen": "log_probs/chosen",
        "logp_rejected": "log_probs/rejected",
    }
    lines("tunix", rows(tunix, "train/", "eval/"))
    lines("maxtext", rows(tunix, "train/", "eval/"), "metrics.json")
    levanter = {
        "loss": "loss",
        "chosen": "dpo_chosen_reward",
        "rejected": "dpo_rejected_reward",
        "accuracy": "dpo_accuracy",
    }
    lines("levanter", rows(levanter, "train/", "eval/", "_step"))
    (LOGS / "levanter/config.yaml").write_text("trainer:\n  num_train_steps: 100\nbeta: 0.1\n")
    easydel = {"loss": "loss", "chosen": "chosen_rewards", "rejected": "rejected_rewards"}
    lines("easydel", rows(easydel, "train/", "eval/"))
    lines("verl", [{"step": e.pop("step"), "data": e} for e in rows(TRL, "actor/", "val/")])
    lines("original_dpo", [original(*entry) for entry in course()])
    # exports
    wandb = rows(TRL, "train/", "eval/", "train/global_step")
    lines("wandb_history", [{"_step": i, "_runtime": i * 2.5, **e} for i, e in enumerate(wandb)])
    chart = {"step": "Step"} | {f"eval/{q}": f"dpo-run - eval/{q}" for q in TRL.values()}
    ends = [e for e in rows(TRL, "train/", "eval/") if "eval/rewards/chosen" in e]
    table("wandb_chart", ends, chart)
    summary = {"_step": 110, "_runtime": 300.0, **{k: v for e in wandb for k, v in e.items()}}
    (LOGS / "wandb_summary").mkdir(parents=True, exist_ok=True)
    (LOGS / "wandb_summary/wandb-summary.json").write_text(json.dumps(summary) + "\n")
    trackio = {"step": "step"} | {f"{s}/{q}": f"{s}/{q}" for s in ("train", "eval") for q in TRL.values()}
    table("trackio", rows(TRL, "train/", "eval/"), trackio)
    # what must be refused
    lines(
        "grpo", [{"step": s, "reward": 0.5, "rewards/format/mean": 0.4, "kl": 0.01, "loss": 0.0} for s in range(1, 20)]
    )
    lines("ppo_verl", [{"step": s, "data": {"critic/rewards/mean": 0.5, "actor/pg_loss": 0.1}} for s in range(1, 20)])
    lines(
        "reward_model",
        [
            {"step": s, "loss": 0.6, "chosen_reward": 0.4, "reject_reward": 0.1, "reward_mean": 0.2, "reward_std": 1.0}
            for s in range(1, 20)
        ],
    )
    lines("sft", [{"step": s, "loss": 2.0 - s / 20, "learning_rate": 1e-5} for s in range(1, 20)])


if __name__ == "__main__":
    main()
