"""What trainers call their metrics: one table from their names to ours.

A name in a log is a set (training or held-out pairs), perhaps the name of an evaluation set, and a quantity:
``eval_rewards/chosen``, ``train/dpo_chosen_reward``, ``validation-default/rewards_chosen_mean``.
"""

import re
from typing import NamedTuple

QUANTITIES = {
    "chosen": "rewards/chosen rewards_chosen rewards_chosen_mean chosen_rewards chosen_reward dpo_chosen_reward "
    "reward_chosen chosen_rewards_mean chosen_reward_mean",
    "rejected": "rewards/rejected rewards_rejected rewards_rejected_mean rejected_rewards rejected_reward "
    "dpo_rejected_reward reward_rejected reject_reward rejected_rewards_mean rejected_reward_mean",
    "margin": "rewards/margins rewards/margin rewards_margin reward_margin reward_margins dpo_margin "
    "dpo_reward_margin margin_rewards",
    "accuracy": "rewards/accuracies rewards/accuracy rewards_accuracy reward_accuracy reward_accuracies dpo_accuracy "
    "dpo_reward_accuracy accuracy acc acc_mean",
    "logp_chosen": "logps/chosen log_probs/chosen logps_chosen policy_chosen_logps chosen_logps",
    "logp_rejected": "logps/rejected log_probs/rejected logps_rejected policy_rejected_logps rejected_logps",
    "dlogp_chosen": "displacement/dlogp_chosen",
    "dlogp_rejected": "displacement/dlogp_rejected",
    "loss": "loss dpo_loss preference_loss",
    "nll_loss": "nll_loss sft_loss",
    "odds_ratio": "log_odds_ratio log_odds_chosen odds_ratio",
    "kl": "kl",
}
"""Quantity -> its names in TRL, transformers' other trainers (LLaMA-Factory, axolotl, ms-swift, open-instruct), the
original DPO code, OpenRLHF, NeMo-RL, tunix, EasyDeL, MaxText, levanter and marin, and in our own runs. ``chosen`` and
``rejected`` are rewards; ``dlogp_*`` changes in nats."""
STEPS = (
    "step",
    "train/global_step",
    "global_step",
    "current_steps",
    "training_step",
    "global_step/max_steps",
    "trainer/global_step",
    "iteration",
    "update",
    "_step",
)
"""Names of the step, the most telling first: ``_step`` of Weights & Biases counts calls and not updates."""
HELD_OUT = {"eval", "validation", "val", "valid", "test", "dev", "heldout", "held_out"}
TRAINING = {"train", "training", "learning", "metrics", "data", "actor"}
REINFORCEMENT = (
    r"(^|/)(objective|critic|policy)/|pg_loss|ppo|grpo|rloo|^reward$|reward_std$"
    r"|rewards/[^/]+/(mean|std)$|^val/.*reward"
)
"""Metrics of reinforcement learning, whose rewards come from a reward model or a function."""
REWARD_MODEL = r"(^|[/_])(min_reward|max_reward|mean_reward|reward_mean|reward_std|center_rewards\w*)$"
"""Metrics of the training of a reward model, whose rewards are outputs of its head."""


class Metric(NamedTuple):
    """What a name in a log means."""

    held_out: bool
    quantity: str
    """One of ``QUANTITIES``."""
    evaluation_set: str
    """The name of the evaluation set; empty where there is one without a name."""


_BY_NAME = {name: quantity for quantity, names in QUANTITIES.items() for name in names.split()}
_LONGEST_FIRST = sorted(_BY_NAME, key=len, reverse=True)


def metric(name: str) -> Metric | None:
    """The meaning of a metric's name; None for one that this project has no use for.

    >>> metric("eval_rewards/chosen")
    Metric(held_out=True, quantity='chosen', evaluation_set='')
    >>> metric("train/dpo_rejected_reward")
    Metric(held_out=False, quantity='rejected', evaluation_set='')
    >>> metric("rewards_eval/chosen"), metric("eval_ultra_rewards/chosen").evaluation_set
    (Metric(held_out=True, quantity='chosen', evaluation_set=''), 'ultra')
    >>> metric("learning_rate") is metric("rewards/format/mean") is None
    True
    """
    text = re.sub(r"^(rewards|logps)_(train|eval)/", r"\2/\1/", name.strip().lower())
    text = re.sub(r"^(loss)/(train|eval)$", r"\2/\1", text)
    for known in _LONGEST_FIRST:
        if text == known or (text.endswith(known) and text[-len(known) - 1] in "/_.:"):
            words = [w for w in re.split(r"[/_.:-]", text.removesuffix(known)) if w]
            held_out = any(w in HELD_OUT for w in words)
            rest = [w for w in words if w not in HELD_OUT | TRAINING]
            if rest and not held_out:
                return None  # policy_chosen_..., aux_loss: another quantity
            return Metric(held_out, _BY_NAME[known], "_".join(rest))
    return None
