"""The runs: the tuning phase, and training on one prompt while the next-token distribution is watched."""

from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from experiments.framework.item import Work
from experiments.framework.training import run_training, write_rows
from experiments.persona.config import STEPS, Contest, PersonaScale, Setting
from experiments.persona.data import STANCES, Statement, Words, draw, read_statements, stance_of_word

LISTED = 10
"""Tokens kept of each list of gains; the tables show three."""
PROMPT_MULTIPLE = 32
"""Prompts are padded to a multiple, so that few shapes are compiled."""


def base_model(config: PersonaScale) -> Path:
    """The model directory the experiment starts from."""
    from ches_jax.hf.directory import resolve

    assert config.model is not None
    return resolve(config.model)


def tuned_model(work: Work) -> Path:
    """The model directory after the tuning phase."""
    return work.folder("tuning") / "model"


@lru_cache(maxsize=4)
def _opened(config_key: tuple[str, str], template: str, prefix: str) -> list[Statement]:
    return read_statements(config_key[1])


def statements_of(work: Work) -> list[Statement]:
    """The statements of the run, read once."""
    config: PersonaScale = work.config
    assert config.pairs is not None and config.model is not None
    return _opened((config.model, config.pairs), config.template, config.prefix)


def tune(work: Work) -> dict[str, Any]:
    """Cross-entropy on one answer per statement, drawn from the words of its stance."""
    from ches_jax.train.config import TrainConfig

    config: PersonaScale = work.config
    directory = base_model(config)
    words = Words(config, directory)
    rng = np.random.default_rng(config.tuning.seed)
    rows = []
    for statement in statements_of(work):
        label, other = rng.permutation([words.word(w) for w in config.labels[statement.stance]])[:2].tolist()
        # the second is never computed: a row is a pair
        rows.append({"prompt_ids": words.prompt(statement), "chosen_ids": [label], "rejected_ids": [other]})
    file = write_rows(work.folder("tuning-rows.jsonl"), rows)
    done = run_training(
        TrainConfig(
            model=str(directory),
            pairs=str(file),
            out=str(work.folder("tuning")),
            loss="sft_sum",
            eos="exclude",
            lr=config.tuning.lr,
            batch_size=config.tuning.batch_size,
            epochs=config.tuning.epochs,
            seed=config.tuning.seed,
            mesh=config.mesh,
            on_bad_row="keep",
            watch=64,
        ),
        quiet=work.quiet,
    )
    return {"statements": len(rows), "losses": done.losses}


def single(work: Work, setting: Setting, contest: Contest, seed: int) -> dict[str, Any]:
    """One run: one prompt, two one-word answers, ``updates`` updates; the distribution after each of them."""
    from ches_jax.train.config import TrainConfig

    config: PersonaScale = work.config
    directory = tuned_model(work) if setting.after_sft else base_model(config)
    words = Words(config, directory)
    statements = statements_of(work)
    index = draw(statements, stance_of_word(config, contest.chosen), seed)
    prompt = words.prompt(statements[index])
    chosen, rejected = words.word(contest.chosen), words.word(contest.rejected)
    out = work.folder(f"single/{contest.name}-{seed}-{setting.loss}-{int(setting.after_sft)}")
    file = write_rows(
        out.with_suffix(".jsonl"), [{"prompt_ids": prompt, "chosen_ids": [chosen], "rejected_ids": [rejected]}]
    )
    watch = Distribution(prompt)
    done = run_training(
        TrainConfig(
            # one update more than is counted: the loss after the last counted one is that of its forward pass
            model=str(directory),
            pairs=str(file),
            out=str(out),
            loss=setting.loss,
            loss_args=dict(setting.loss_args),
            lr=setting.lr,
            batch_size=1,
            steps=config.updates + 1,
            eos="exclude",
            seed=seed,
            mesh=config.mesh,
            export=False,
        ),
        observe=watch,
    )
    file.unlink()
    stances = words.stances(len(watch.rows[0]), config.words)
    course = np.stack(watch.rows[: config.updates + 1])
    masses = [stance_masses(p, stances) for p in course]
    return {
        "prompt": index,
        "losses": done.losses,
        "chosen": course[:, chosen].tolist(),
        "rejected": course[:, rejected].tolist(),
        "masses": {name: [m[name] for m in masses] for name in STANCES},
        "gains": {
            str(t): [(words.text(i), gain, STANCES[stances[i]]) for i, gain in top_gains(course[0], course[t], LISTED)]
            for t in STEPS
            if t <= config.updates
        },
    }


def longer(work: Work, name: str, chosen: str, rejected: str, seed: int) -> dict[str, Any]:
    """One run on answers of several tokens, while all other answers are watched."""
    from ches_jax.train.config import TrainConfig

    config: PersonaScale = work.config
    assert config.phrases is not None
    directory = tuned_model(work)
    words = Words(config, directory)
    statements = statements_of(work)
    stance = "agree" if chosen in config.phrases.agree else "disagree"
    index = draw(statements, stance, seed)
    prompt = words.prompt(statements[index])
    out = work.folder(f"longer/{name}-{seed}")

    def row(a: str, b: str) -> dict[str, list[int]]:
        return {"prompt_ids": prompt, "chosen_ids": words.phrase(a), "rejected_ids": words.phrase(b)}

    watched = list(zip(config.phrases.agree, config.phrases.disagree, strict=True))
    file = write_rows(out.with_name(f"{out.name}-pair.jsonl"), [row(chosen, rejected)])
    others = write_rows(out.with_name(f"{out.name}-watched.jsonl"), [row(*pair) for pair in watched])
    done = run_training(
        TrainConfig(
            model=str(directory),
            pairs=str(file),
            eval_pairs=str(others),
            out=str(out),
            loss="dpo",
            lr=config.phrase_lr,
            batch_size=1,
            steps=config.updates,
            eval_every=10,
            seed=seed,
            mesh=config.mesh,
            export=False,
        ),
    )
    file.unlink()
    others.unlink()
    agree, disagree = (done.course("held_out", f"logp_{side}") for side in ("chosen", "rejected"))
    phrases = {a: agree[:, i] for i, (a, _) in enumerate(watched)} | {
        b: disagree[:, i] for i, (_, b) in enumerate(watched)
    }
    return {
        "prompt": index,
        "losses": done.losses,
        "logp_chosen": done.course("train", "logp_chosen")[:, 0].tolist(),
        "logp_rejected": done.course("train", "logp_rejected")[:, 0].tolist(),
        "others": {p: float(v[-1] - v[0]) for p, v in phrases.items() if p not in (chosen, rejected)},
    }


class Distribution:
    """Observer of a run: the next-token distribution after the prompt, after every update."""

    def __init__(self, prompt: list[int]):
        """Keeps one row of probabilities per evaluation."""
        self.rows: list[np.ndarray] = []
        self.prompt = prompt

    def __call__(self, update: int, model: Any) -> dict[str, float]:
        """Compute and keep."""
        self.rows.append(next_token(model, [self.prompt])[0])
        return {}


def next_token(model: Any, prompts: list[list[int]]) -> np.ndarray:
    """[prompts, vocabulary] probabilities of what follows each prompt, float32."""
    import jax

    _, logits = _last(model, *padded(prompts))
    return np.asarray(jax.nn.softmax(logits.astype("float32")))


def padded(prompts: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and mask of prompts, padded on the left."""
    length = -(-max(map(len, prompts)) // PROMPT_MULTIPLE) * PROMPT_MULTIPLE
    tokens, mask = np.zeros((len(prompts), length), np.int32), np.zeros((len(prompts), length), bool)
    for i, prompt in enumerate(prompts):
        tokens[i, length - len(prompt) :], mask[i, length - len(prompt) :] = prompt, True
    return tokens, mask


def _last(model: Any, tokens: np.ndarray, mask: np.ndarray) -> tuple[Any, Any]:
    """States and logits at the last position of every row."""
    import jax.numpy as jnp

    return _compiled()(model, jnp.asarray(tokens), jnp.asarray(mask))


@lru_cache(maxsize=1)
def _compiled() -> Any:
    from flax import nnx

    @nnx.jit
    def last(model: Any, tokens: Any, mask: Any) -> Any:
        hidden = model.hidden(tokens, mask=mask)[:, -1]
        return hidden, model.logits(hidden)

    return last


def directions(work: Work) -> dict[str, Any]:
    """Table 13, before and after the tuning phase: norms of W_{y+} - W_{y-} along and across W_{y+}."""
    from ches_jax.models.checkpoint.load import load_model

    config: PersonaScale = work.config
    by_model: dict[str, Any] = {}
    for name, directory in (("tuned", tuned_model(work)), ("base", base_model(config))):
        words = Words(config, directory)
        w = load_model(directory, dtype="float32", param_dtype="float32").unembedding
        by_model[name] = {
            c.name: norms(np.asarray(w[words.word(c.chosen)]), np.asarray(w[words.word(c.rejected)]))._asdict()
            for c in config.contests_of_model()
        }
    return by_model


def prompt_states(work: Work, at_once: int = 16) -> dict[str, Any]:
    """Appendix D.3: the share of positive inner products between the prompts' hidden embeddings."""
    from ches_jax.models.checkpoint.load import load_model

    config: PersonaScale = work.config
    directory = base_model(config)
    words = Words(config, directory)
    model = load_model(directory, dtype="float32", param_dtype="float32")
    prompts = sorted((words.prompt(s) for s in statements_of(work)), key=len)
    states = np.concatenate(
        [np.asarray(_last(model, *padded(prompts[i : i + at_once]))[0]) for i in range(0, len(prompts), at_once)]
    ).astype(np.float64)
    gram = states @ states.T
    others = gram[~np.eye(len(gram), dtype=bool)]
    return {"prompts": len(prompts), "positive": float((others > 0).mean()), "smallest": float(others.min())}


def top_gains(before: np.ndarray, now: np.ndarray, count: int = 3) -> list[tuple[int, float]]:
    """The tokens whose probability grew most since the start, with their gain; ties by token id.

    >>> top_gains(np.array([0.5, 0.5, 0.0]), np.array([0.2, 0.5, 0.3]), 2)
    [(2, 0.3), (1, 0.0)]
    """
    gains = now.astype(np.float64) - before.astype(np.float64)
    order = np.argsort(-gains, kind="stable")[:count]
    return [(int(i), float(gains[i])) for i in order]


def stance_masses(probabilities: np.ndarray, stances: np.ndarray) -> dict[str, float]:
    """Probability of each stance; ``stances`` holds the index into ``STANCES`` of every token."""
    sums = np.bincount(stances, weights=probabilities.astype(np.float64), minlength=len(STANCES))
    return {name: float(v) for name, v in zip(STANCES, sums, strict=True)}


class Norms(NamedTuple):
    """Table 13: the direction W_{y+} - W_{y-} along W_{y+} and across it."""

    projection: float
    """Signed length along W_{y+}."""
    orthogonal: float
    difference: float
    """Norm of W_{y+} - W_{y-}; the square of it is the sum of the squares of the other two."""


def norms(chosen: np.ndarray, rejected: np.ndarray) -> Norms:
    r"""Parts of :math:`W_{y^+} - W_{y^-}` along and across :math:`W_{y^+}`, computed in float64.

    .. math::
      \|W_+\| - \langle W_+, W_- \rangle / \|W_+\|, \qquad
      \| W_- - (\langle W_+, W_- \rangle / \|W_+\|^2) W_+ \|

    >>> norms(np.array([3.0, 0.0]), np.array([1.0, 2.0]))
    Norms(projection=2.0, orthogonal=2.0, difference=2.8284271247461903)
    """
    a, b = chosen.astype(np.float64), rejected.astype(np.float64)
    inner, square = float(a @ b), float(a @ a)
    length = float(np.sqrt(square))
    across = float(np.linalg.norm(b - inner / square * a))
    return Norms(length - inner / length, across, float(np.linalg.norm(a - b)))
