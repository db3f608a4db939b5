"""Write trl_golden.json: what TRL's own trainers compute on random log-probabilities.

Run by hand when TRL's version moves:

    python tests/losses/make_trl_golden.py

The methods that compute losses are called unbound, with a fake trainer and a fake model that
hands over prepared log-probabilities, so that no model runs and TRL's arithmetic is all that is measured.

Conventions in which TRL differs, each covered by a case here:
  ipo           mean over tokens, our ``ipo_mean``
  sft           mean over all chosen tokens of the batch, our ``with_sft(..., per="batch_token")`` and not ``rpo``
  bco_pair      decision boundary at zero, our ``bco_pair_unshifted``
  nca_pair      our ``nca``
  aot_unpaired  was ``aot_pair`` in releases before 1.0
  cpo           likelihood term is a mean over tokens; only the preference term is compared
  orpo          likelihood term covers the prompt too; only the odds ratio term is compared
"""

import json
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

# trl is imported where it is used: the collection of doctests imports this file

PAIRS, WIDTH = 6, 9
OUT = Path(__file__).with_name("trl_golden.json")

# case, our loss, our hyper-parameters, TRL's settings
PAIR_CASES = [
    ("sigmoid", "sigmoid", {"beta": 0.1}, {"loss_types": ["sigmoid"]}),
    ("sigmoid beta", "dpo", {"beta": 0.7}, {"loss_types": ["sigmoid"], "beta": 0.7}),
    ("hinge", "hinge", {"beta": 0.3}, {"loss_types": ["hinge"], "beta": 0.3}),
    ("ipo", "ipo_mean", {"tau": 0.1}, {"loss_types": ["ipo"]}),
    ("exo_pair", "exo_pair", {"label_smoothing": 0.01}, {"loss_types": ["exo_pair"], "label_smoothing": 0.01}),
    ("nca_pair", "nca", {"beta": 0.1}, {"loss_types": ["nca_pair"]}),
    ("robust", "robust", {"label_smoothing": 0.2}, {"loss_types": ["robust"], "label_smoothing": 0.2}),
    ("bco_pair", "bco_pair_unshifted", {"beta": 0.1}, {"loss_types": ["bco_pair"]}),
    ("sppo_hard", "sppo_hard", {"beta": 0.1}, {"loss_types": ["sppo_hard"]}),
    ("apo_zero", "apo_zero", {"beta": 0.1}, {"loss_types": ["apo_zero"]}),
    ("apo_down", "apo_down", {"beta": 0.1}, {"loss_types": ["apo_down"]}),
    ("discopop", "discopop", {"beta": 0.1}, {"loss_types": ["discopop"]}),
    ("sigmoid_norm", "sigmoid_norm", {"beta": 0.1}, {"loss_types": ["sigmoid_norm"]}),
    ("sigmoid_norm beta", "ln_dpo", {"beta": 5.0}, {"loss_types": ["sigmoid_norm"], "beta": 5.0}),
    ("sigmoid + sft", "rpo", {"alpha": 0.7}, {"loss_types": ["sigmoid", "sft"], "loss_weights": [1.0, 0.7]}),
    ("ld_alpha", "ld_dpo", {"alpha": 0.3}, {"loss_types": ["sigmoid"], "ld_alpha": 0.3}),
    ("forward_kl", "fdpo_forward_kl", {}, {"loss_types": ["sigmoid"], "f_divergence_type": "forward_kl"}),
    ("js_divergence", "fdpo_js", {}, {"loss_types": ["sigmoid"], "f_divergence_type": "js_divergence"}),
    (
        "alpha_divergence",
        "fdpo_alpha",
        {"alpha": 0.5},
        {"loss_types": ["sigmoid"], "f_divergence_type": "alpha_divergence"},
    ),
]
BATCH_CASES = [
    ("aot", "aot", {"label_smoothing": 0.1}, {"loss_types": ["aot"], "label_smoothing": 0.1}),
    ("aot_unpaired", "aot_unpaired", {}, {"loss_types": ["aot_unpaired"]}),
]


def random_tokens():
    """Log-probabilities of tokens, zero on padding, and their masks: chosen rows first, as TRL stacks them."""
    generator = torch.Generator().manual_seed(0)
    count = torch.randint(1, WIDTH + 1, (2 * PAIRS,), generator=generator)
    mask = (torch.arange(WIDTH)[None, :] < count[:, None]).to(torch.float64)
    policy = -2.0 * torch.rand(2 * PAIRS, WIDTH, generator=generator, dtype=torch.float64) * mask
    noise = torch.randn(2 * PAIRS, WIDTH, generator=generator, dtype=torch.float64)
    reference = (policy + noise).clamp(max=0.0) * mask
    return policy, reference, mask


def fake(**settings) -> Any:
    device = torch.device("cpu")
    accelerator = SimpleNamespace(device=device, gather=lambda x: x, gather_for_metrics=lambda x: x)
    defaults = {
        "beta": 0.1,
        "loss_weights": None,
        "label_smoothing": 0.0,
        "ld_alpha": None,
        "use_weighting": False,
        "f_divergence_type": "reverse_kl",
        "f_alpha_divergence_coef": 0.5,
        "precompute_ref_logps": True,
        "aux_loss_enabled": False,
        "args": SimpleNamespace(discopop_tau=0.05, gradient_checkpointing_kwargs=None),
        "accelerator": accelerator,
        "_total_train_tokens": 0,
        "_tp_size": 1,
        "_metrics": {"train": defaultdict(list)},
        "model": SimpleNamespace(training=True, is_gradient_checkpointing=False),
    }
    trainer = SimpleNamespace(**(defaults | settings))
    if trainer.loss_weights is None and hasattr(trainer, "loss_types"):
        trainer.loss_weights = [1.0] * len(trainer.loss_types)
    return trainer


def model_of(log_probs):
    """A model whose forward pass hands over what TRL reads from it."""
    nothing = torch.zeros_like(log_probs)
    outputs = SimpleNamespace(
        log_probs=log_probs, entropy=nothing, mean_logits=nothing, is_top1=nothing.bool(), log_sum_sq_probs=nothing
    )
    return lambda **_: outputs


def dpo(policy, reference, mask, settings):
    from trl.trainer.dpo_trainer import DPOTrainer  # pyright: ignore[reportMissingImports]

    if settings.get("f_divergence_type") == "alpha_divergence":  # its table of limits has no float64
        policy, reference = policy.float(), reference.float()
    trainer = fake(**settings)
    completion = torch.cat([torch.zeros_like(mask[:, :1]), mask], dim=1).long()  # one prompt token
    refs = reference.sum(1).chunk(2)
    inputs = {
        "input_ids": completion,
        "attention_mask": torch.ones_like(completion),
        "completion_mask": completion,
        "ref_chosen_logps": refs[0],
        "ref_rejected_logps": refs[1],
    }
    if settings.get("ld_alpha") is not None:  # the reference's sums are weighted in its own forward pass only
        trainer.precompute_ref_logps, trainer.ref_model = False, model_of(reference)
    loss = DPOTrainer._compute_loss(trainer, model_of(policy), inputs, False)
    metrics = trainer._metrics["train"]
    names = ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies", "logps/chosen")
    return loss.item(), {n: metrics[n][0] for n in (*names, "logps/rejected")}


def pair_cases(policy, reference, mask):
    for case, loss, hyper, settings in PAIR_CASES:
        rows = [torch.tensor([i, PAIRS + i]) for i in range(PAIRS)]
        results = [dpo(policy[r], reference[r], mask[r], settings) for r in rows]
        yield {
            "case": case,
            "loss": loss,
            "hyper": hyper,
            "per_pair": [r[0] for r in results],
            "metrics": {n: [r[1][n] for r in results] for n in results[0][1]},
        }


def batch_cases(policy, reference, mask):
    for case, loss, hyper, settings in BATCH_CASES:
        yield {"case": case, "loss": loss, "hyper": hyper, "mean": dpo(policy, reference, mask, settings)[0]}
    settings = {"loss_types": ["sigmoid", "sft"], "loss_weights": [1.0, 0.7]}
    value = dpo(policy, reference, mask, settings)[0]
    yield {"case": "sigmoid + sft, batch", "loss": "sigmoid", "hyper": {}, "sft": 0.7, "mean": value}


def reference_free_cases(policy, mask):
    from trl.experimental.cpo import CPOTrainer  # pyright: ignore[reportMissingImports]
    from trl.experimental.orpo import ORPOTrainer  # pyright: ignore[reportMissingImports]

    sums, means = policy.sum(1).chunk(2), (policy.sum(1) / mask.sum(1)).chunk(2)
    for case, loss, hyper, logps, settings in [
        ("cpo", "cpo", {"lam": 0.0}, sums, {"loss_type": "sigmoid", "alpha": 0.0}),
        (
            "simpo",
            "simpo",
            {"beta": 2.0, "gamma": 0.6},
            means,
            {"loss_type": "simpo", "alpha": 0.0, "beta": 2.0, "simpo_gamma": 0.6},
        ),
        ("alphapo", "alphapo", {}, means, {"loss_type": "simpo", "alpha": 0.25, "beta": 2.5, "simpo_gamma": 0.1}),
    ]:
        value = CPOTrainer.cpo_loss(fake(**settings), *logps)[0]
        yield {"case": case, "loss": loss, "hyper": hyper, "per_pair": value.tolist()}
    ratio = -ORPOTrainer.odds_ratio_loss(fake(), *means)[0]
    yield {"case": "orpo", "loss": "orpo", "hyper": {}, "odds_term": ratio.tolist()}


def kto_case(policy, reference, mask):
    from trl.trainer.kto_trainer import KTOTrainer  # pyright: ignore[reportMissingImports]

    generator = torch.Generator().manual_seed(1)
    label = torch.tensor([True, False] * PAIRS)
    kl, ref_kl = -10 * torch.rand(2, 2 * PAIRS, generator=generator, dtype=torch.float64)
    kl = kl + 1.0
    trainer = fake(loss_type="kto", calculate_KL=True, desirable_weight=1.3, undesirable_weight=0.8)
    trainer._compute_kl_logps = lambda model, batch: kl
    completion = torch.cat([torch.zeros_like(mask[:, :1]), mask], dim=1).long()
    inputs = {
        "input_ids": completion,
        "attention_mask": torch.ones_like(completion),
        "completion_mask": completion,
        "label": label,
        "ref_logps": reference.sum(1),
        "ref_KL_logps": ref_kl,
    }
    value = KTOTrainer._compute_loss(trainer, model_of(policy), inputs, False).item()
    hyper = {"weight_desirable": 1.3, "weight_undesirable": 0.8}
    return {
        "case": "kto",
        "loss": "kto",
        "hyper": hyper,
        "mean": value,
        "desirable": label.tolist(),
        "kl_logp": kl.tolist(),
        "ref_kl_logp": ref_kl.tolist(),
    }


def main():
    import trl  # pyright: ignore[reportMissingImports]

    policy, reference, mask = random_tokens()
    cases = [*pair_cases(policy, reference, mask), *batch_cases(policy, reference, mask)]
    cases += [*reference_free_cases(policy, mask), kto_case(policy, reference, mask)]
    golden = {
        "trl": trl.__version__,
        "torch": torch.__version__,
        "tokens": policy.tolist(),
        "ref_tokens": reference.tolist(),
        "mask": mask.int().tolist(),
        "cases": cases,
    }
    OUT.write_text(json.dumps(golden) + "\n", encoding="utf-8")
    print(OUT, len(cases), "cases")


if __name__ == "__main__":
    main()
