"""What trainers call their metrics: one table from their names to ours.

A name in a log is a set (training or held-out pairs), perhaps the name of an evaluation set, and a quantity:
``eval_rewards/chosen``, ``train/dpo_chosen_reward``, ``validation-default/rewards_chosen_mean``.
"""

import re
from typing import NamedTuple

QUANTITIES = {
    "chosen": "rewards_chosen chosen_rewards chosen_reward reward_chosen dpo_chosen_reward",
    "rejected": "rewards_rejected rejected_rewards rejected_reward reward_rejected reject_reward dpo_rejected_reward",
    "margin": "rewards_margins rewards_margin reward_margin reward_margins margin_rewards dpo_margin dpo_reward_margin",
    "accuracy": "rewards_accuracies rewards_accuracy reward_accuracy reward_accuracies dpo_accuracy "
    "dpo_reward_accuracy accuracy acc",
    "logp_chosen": "logps_chosen log_probs_chosen chosen_logps chosen_log_probs policy_chosen_logps",
    "logp_rejected": "logps_rejected log_probs_rejected rejected_logps rejected_log_probs policy_rejected_logps",
    "dlogp_chosen": "displacement_dlogp_chosen",
    "dlogp_rejected": "displacement_dlogp_rejected",
    "loss": "loss dpo_loss preference_loss",
    "nll_loss": "nll_loss sft_loss",
    "odds_ratio": "log_odds_ratio log_odds_chosen odds_ratio odds_ratio_loss",
    "kl": "kl",
    "beta": "beta dpo_beta",
}
"""Quantity -> its names in TRL, transformers' other trainers (LLaMA-Factory, axolotl, ms-swift, open-instruct), the
original DPO code, OpenRLHF, NeMo-RL, tunix, EasyDeL, MaxText, levanter and marin, and in our own runs, as ``plain``
writes them. ``chosen`` and ``rejected`` are rewards; ``dlogp_*`` changes in nats."""
STEPS = (
    "step",
    "train/global_step",
    "global_step",
    "current_steps",
    "training_step",
    "global_step/max_steps",
    "trainer/global_step",
    "iteration",
    "iter",
    "update",
    "_step",
)
"""Names of the step, the most telling first: ``_step`` of Weights & Biases counts calls and not updates."""
HELD_OUT = {"eval", "evaluation", "validation", "val", "valid", "test", "dev", "heldout", "held"}
TRAINING = {"train", "training", "learning"}
NEUTRAL = {
    *("dpo", "orpo", "kto", "cpo", "simpo", "ipo", "preference", "implicit"),
    *("mean", "avg", "average", "stats", "metrics", "data", "actor", "summary"),
}
"""Words before a quantity that do not make another of it: the method, where it was kept, that batches are averaged."""
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
    """The name of the evaluation set, ``eval`` where it has none; empty for training batches."""


_BY_NAME = {name: quantity for quantity, names in QUANTITIES.items() for name in names.split()}
_LONGEST_FIRST = sorted(_BY_NAME, key=len, reverse=True)


def plain(name: str) -> str:
    """A name in small letters with one separator, its set in front, without the word for a mean or for a step.

    >>> plain("rewards_train/chosen"), plain("loss/eval"), plain("Validation-default.rewards/chosen_mean")
    ('train_rewards_chosen', 'eval_loss', 'validation_default_rewards_chosen')
    >>> plain("val_chosenRewards_step"), plain("held-out/rewards/chosen")
    ('val_chosen_rewards', 'held_rewards_chosen')
    """
    text = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name.strip())
    text = re.sub(r"[^a-z0-9]+", "_", text.lower()).strip("_")
    text = re.sub(r"_(mean|avg|average|step)$", "", text).replace("held_out", "held")
    return re.sub(r"^(rewards|logps|loss)_(train|eval|val|valid|validation|test)(?=_|$)(.*)$", r"\2_\1\3", text)


def metric(name: str) -> Metric | None:
    """The meaning of a metric's name; None for one that this project has no use for.

    >>> metric("eval_rewards/chosen")
    Metric(held_out=True, quantity='chosen', evaluation_set='eval')
    >>> metric("train/dpo_rejected_reward")
    Metric(held_out=False, quantity='rejected', evaluation_set='')
    >>> metric("rewards_eval/chosen").evaluation_set, metric("eval_ultra_rewards/chosen").evaluation_set
    ('eval', 'ultra')
    >>> metric("eval_train_rewards/chosen").evaluation_set, metric("test/rewards/chosen").evaluation_set
    ('train', 'test')
    >>> metric("learning_rate") is metric("rewards/format/mean") is metric("ref_rewards/chosen") is None
    True
    """
    text = plain(name)
    for known in _LONGEST_FIRST:
        if text == known or text.endswith(f"_{known}"):
            words = [w for w in text.removesuffix(known).split("_") if w and w not in NEUTRAL]
            if word := next((w for w in words if w in HELD_OUT), None):
                at = words.index(word)
                # what follows names the set, also where it is called train or test
                named = [w for w in words[:at] if w not in TRAINING] + [w for w in words[at + 1 :] if w != word]
                return Metric(True, _BY_NAME[known], "_".join(named) or word)
            if any(w not in TRAINING for w in words):
                return None  # policy_chosen_..., aux_loss: another quantity
            return Metric(False, _BY_NAME[known], "")
    return None
