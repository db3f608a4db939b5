"""The stages up to the pairs: requests, two responses to each, what the judge says, which is preferred."""

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ches_jax import bundled
from ches_jax.errors import DataError
from experiments.framework.item import Work
from experiments.framework.training import write_rows
from experiments.sorrybench.config import TYPES, SorryScale


class Judged(NamedTuple):
    """A response of which is known whether it refuses (score below 0.5)."""

    key: str
    """Of the request: its ``question_id``, or its text."""
    response: str
    score: float


def model_directory(config: SorryScale) -> Path:
    """The model that is sampled and trained."""
    from ches_jax.hf.directory import resolve

    assert config.model is not None
    return resolve(config.model)


def requests_file(work: Work) -> Path:
    """The requests as prompts."""
    return work.folder("requests.jsonl")


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSON Lines file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


# ---- requests --------------------------------------------------------------------------------------------------------


def write_requests(work: Work) -> dict[str, Any]:
    """Draw the requests that leave room for a response (and have a gold pair, where there are any), and split them."""
    config: SorryScale = work.config
    requests = list(_bundled_requests() if config.pairs == "bundled" else _requests(config))
    gold = gold_pairs(config, requests) if config.gold is not None else None
    usable = [r for r in fitting(config, requests) if gold is None or r["key"] in gold]
    rng = np.random.default_rng([config.draw_seed, 0])
    drawn = [usable[i] for i in rng.permutation(len(usable))[: config.requests]]
    if len(drawn) < 20:
        raise DataError(f"{config.pairs}: {len(drawn)} usable requests of {len(requests)}; expected at least 20")
    test = set(rng.permutation(len(drawn))[: int(config.test_share * len(drawn))].tolist())
    rows = []
    for i, request in enumerate(drawn):
        row = {"prompt": request["prompt"], "request": i, "test": i in test}
        rows.append(row | ({"gold": gold[request["key"]]} if gold is not None else {}))
    write_rows(requests_file(work), rows)
    return {"found": len(requests), "usable": len(usable), "train": len(drawn) - len(test), "test": len(test)}


def fitting(config: SorryScale, requests: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The requests as the model is prompted: those short enough, which leave room for a response in its context."""
    from ches_jax.data.sources import Record
    from ches_jax.generate.prompts import open_encoder
    from ches_jax.inputs import Opener

    assert config.model is not None
    encoder = open_encoder(Opener(), config.model, None, "auto", {})
    prompted = [{**r, "prompt": as_prompt(r["prompt"], config.dialogue)} for r in requests]
    rows = [Record(i, r["key"], f"request {i}", {"prompt": r["prompt"]}) for i, r in enumerate(prompted)]
    lengths = [len(p.ids) for p in encoder(rows, str(config.pairs))]
    room = min(encoder.max_length - config.max_new_tokens, config.request_tokens or encoder.max_length)
    return [r for r, n in zip(prompted, lengths, strict=True) if n <= room]


def _bundled_requests() -> Iterator[dict[str, str]]:
    from experiments.bundled.world import build_world

    for request in build_world(0).train.mischief:
        yield {"key": request.text, "prompt": request.text}


def _requests(config: SorryScale) -> Iterator[dict[str, Any]]:
    assert config.pairs is not None
    seen = set()
    for raw in _raw_rows(config.pairs, config.split, config.where):
        prompt = raw.get("turns", raw.get("prompt"))
        if isinstance(prompt, list) and prompt and isinstance(prompt[0], str):
            prompt = prompt[0]
        if prompt is None or isinstance(prompt, list):
            from ches_jax.data.prompts import canonical_prompt

            prompt = canonical_prompt(raw, {}).get("prompt")
        key = str(raw.get("question_id", prompt))
        if key not in seen:
            seen.add(key)
            yield {"key": key, "prompt": prompt}


def _raw_rows(spec: str, split: str | None, where: Mapping[str, str]) -> Iterator[Mapping[str, Any]]:
    """Rows as they are, those that hold the values of ``where``."""
    from ches_jax.data.sources import Kind, open_rows

    kind = Kind("rows", (), lambda row, columns: [(None, dict(row))])
    for row in open_rows(spec, split, None, kind):
        if all(str(row.content.get(name)) == value for name, value in where.items()):
            yield row.content


def as_prompt(request: Any, dialogue: str | None) -> Any:
    """A request as the model's prompt: through its template, or written into ``dialogue``.

    >>> as_prompt("Hi", None), as_prompt("Hi", "Q: {prompt} A:"), as_prompt("Q: Hi A:", "Q: {prompt} A:")
    ([{'role': 'user', 'content': 'Hi'}], 'Q: Hi A:', 'Q: Hi A:')
    """
    if not isinstance(request, str):
        return request
    if dialogue is None:
        return [{"role": "user", "content": request}]
    ending = dialogue.partition("{prompt}")[2].strip()
    return request if request.rstrip().endswith(ending) else dialogue.format(prompt=request)


# ---- gold ------------------------------------------------------------------------------------------------------------


def gold_pairs(config: SorryScale, requests: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, str]]:
    """For each request that has both: a refusal and a compliance of somebody else, drawn from those there are."""
    judged = _bundled_judged() if config.gold == "bundled" else _judged(config)
    keys = {r["key"] for r in requests}
    responses: dict[str, tuple[list[str], list[str]]] = {}
    for one in judged:
        if one.key in keys:
            responses.setdefault(one.key, ([], []))[one.score >= 0.5].append(one.response)
    rng = np.random.default_rng([config.draw_seed, 1])
    both = {key: sides for key, sides in sorted(responses.items()) if all(sides)}
    return {
        key: dict(zip(("chosen", "rejected"), (s[int(rng.integers(len(s)))] for s in sides), strict=True))
        for key, sides in both.items()
    }


def _bundled_judged() -> Iterator[Judged]:
    """A refusal and a compliance by the world's own grammar, for each request."""
    from experiments.bundled import replies
    from experiments.bundled.sampling import stream
    from experiments.bundled.world import build_world

    rng = stream(0, "sorrybench/gold")
    for request in build_world(0).train.mischief:
        yield Judged(request.text, f" {replies.refusal(rng, request)}", 0.0)
        yield Judged(request.text, f" {replies.compliance(rng, request)}", 1.0)


def _judged(config: SorryScale) -> Iterator[Judged]:
    """Rows with ``question_id`` or ``prompt``, ``response`` or ``choices``, and ``human_score`` or ``score``."""
    assert config.gold is not None
    for split in config.gold_splits:
        for raw in _raw_rows(config.gold, split, config.where):
            key, score = raw.get("question_id", raw.get("prompt")), raw.get("human_score", raw.get("score"))
            response = raw.get("response")
            if response is None and raw.get("choices"):
                response = raw["choices"][0]["turns"][0]
            if key is None or score is None or response is None:
                raise DataError(
                    f"{config.gold}: a row without question_id or prompt, response or choices, human_score or score; "
                    f"found: {', '.join(raw)}"
                )
            yield Judged(str(key), response, float(score))


# ---- responses and judgments -----------------------------------------------------------------------------------------


def sample_responses(work: Work) -> dict[str, Any]:
    """Two responses to every request, at temperature 1."""
    config: SorryScale = work.config
    rows = generated(work, str(model_directory(config)), "responses", samples=2, temperature=1.0, seed=config.draw_seed)
    reasons = Counter(r["finish_reason"] for r in rows)
    return {
        "texts": len(rows),
        "tokens": sum(len(r["token_ids"]) for r in rows) / len(rows),
        "finish_reasons": dict(sorted(reasons.items())),
    }


def judge_responses(work: Work) -> dict[str, Any]:
    """What the judge says of them."""
    refusals = judged(work, "responses")
    counts = Counter(refusals)
    decided = counts[True] + counts[False]
    return {
        "refusal_rate": counts[True] / decided if decided else None,
        "undecided": counts[None],
    }


def generated(
    work: Work, model: str, name: str, *, samples: int, temperature: float, seed: int
) -> list[dict[str, Any]]:
    """Responses of a model to all requests, in order."""
    from ches_jax.generate.config import GenerateConfig
    from ches_jax.generate.run import FILE_NAME, generate
    from ches_jax.runs import chunks

    config: SorryScale = work.config
    out = generate(
        GenerateConfig(
            model=model,
            prompts=str(requests_file(work)),
            out=str(work.folder(name)),
            samples=samples,
            temperature=temperature,
            seed=seed,
            max_new_tokens=config.max_new_tokens,
            stop=config.stop,
            batch_size=config.sample_rows,
            chunk_rows=512,
            mesh=config.mesh,
            on_bad_row="keep",
        ),
        resume=True,
        quiet=True,
    )
    return list(chunks.read_lines(out / FILE_NAME))


def judged(work: Work, name: str) -> list[bool | None]:
    """Whether each of the responses ``name`` refuses, in order."""
    from ches_jax.judges.config import JudgeConfig
    from ches_jax.judges.run import FILE_NAME, judge
    from ches_jax.runs import chunks

    config: SorryScale = work.config
    common: dict[str, Any] = {"responses": str(work.folder(name)), "out": str(work.folder(f"{name}-judged"))}
    if config.judge in ("rules", "bundled"):
        rules = str(bundled.refusal_openings_file()) if config.judge == "bundled" else None
        how = JudgeConfig(**common, by="rules", rules=rules)
    else:
        how = JudgeConfig(
            **common, by="model", judge=config.judge, judge_template=config.judge_template, mesh=config.mesh
        )
    refusals = [r["refusal"] for r in chunks.read_lines(judge(how, resume=True, quiet=True) / FILE_NAME)]
    if all(r is None for r in refusals):
        raise DataError(f"{config.judge}: the judge decided none of {len(refusals)} responses; see {common['out']}")
    return refusals


# ---- pairs -----------------------------------------------------------------------------------------------------------


def pair_type(refusals: Sequence[bool | None]) -> str:
    """The type of a pair, from what the judge said of both responses.

    >>> [pair_type(p) for p in ([True, True], [False, False], [True, False], [None, True])]
    ['two_refusals', 'two_compliances', 'mixed', 'undecided']
    """
    if None in refusals:
        return TYPES[3]
    return TYPES[2] if refusals[0] != refusals[1] else TYPES[0] if refusals[0] else TYPES[1]


def preferred(refusals: Sequence[bool | None], draw: float) -> int:
    """Which of two responses is chosen: the refusal; where the judge says the same of both, or nothing, by chance."""
    if pair_type(refusals) == "mixed":
        return 0 if refusals[0] else 1
    return int(draw < 0.5)


def write_pairs(work: Work) -> dict[str, Any]:
    """Preference pairs of the training requests, as the tokens that were sampled; gold pairs of the same requests.

    Two responses of the same tokens make no pair.
    """
    from ches_jax.generate.run import FILE_NAME
    from ches_jax.runs import chunks

    config: SorryScale = work.config
    requests = read_lines(requests_file(work))
    responses = list(chunks.read_lines(work.folder("responses") / FILE_NAME))
    refusals = judged(work, "responses")
    draws = np.random.default_rng([config.draw_seed, 2]).random(len(requests))
    rows, gold, same = [], [], 0
    for i, request in enumerate(requests):
        if request["test"]:
            continue
        two, judgments = responses[2 * i : 2 * i + 2], refusals[2 * i : 2 * i + 2]
        if config.gold is not None:
            gold.append({"prompt": request["prompt"], **_as_responses(request), "request": i})
        if two[0]["token_ids"] == two[1]["token_ids"]:
            same += 1
            continue
        first = preferred(judgments, draws[i])
        chosen, rejected = two[first], two[1 - first]
        rows.append(
            {
                "prompt_ids": chosen["prompt_ids"],
                "chosen_ids": chosen["token_ids"],
                "rejected_ids": rejected["token_ids"],
                "chosen_text": chosen["text"],
                "rejected_text": rejected["text"],
                "category": pair_type(judgments),
                "request": i,
            }
        )
    write_rows(pairs_file(work, "generated"), rows)
    if gold:
        write_rows(pairs_file(work, "gold"), gold)
    types = Counter(r["category"] for r in rows)
    return {"pairs": len(rows), "same": same, "types": {t: types[t] for t in TYPES if types[t]}, "gold": len(gold)}


def _as_responses(request: Mapping[str, Any]) -> dict[str, Any]:
    """The gold pair in the shape of the prompt: text after text, a message after messages."""
    if isinstance(request["prompt"], str):
        return dict(request["gold"])
    return {side: [{"role": "assistant", "content": text}] for side, text in request["gold"].items()}


def pairs_file(work: Work, pairs: str) -> Path:
    """The pairs ``generated`` or ``gold`` of the training requests."""
    return work.folder(f"{pairs}.jsonl")


def only(rows: Iterable[dict[str, Any]], numbers: Sequence[int]) -> list[dict[str, Any]]:
    """Some of the rows, in their order."""
    kept = set(numbers)
    return [row for i, row in enumerate(rows) if i in kept]
