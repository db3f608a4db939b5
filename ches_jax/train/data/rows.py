"""One source of rows: read, tokenised and audited, with the numbers that its rows bring."""

import hashlib
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np

from ches_jax.data.audit import UNSCORABLE, Audit, dropped_record, require_clean
from ches_jax.data.prompts import PAIR_COLUMNS, Numbers, canonical_content, lookup
from ches_jax.data.sources import LISTS, Kind, PairSource
from ches_jax.data.tokenize import PairTokenizer
from ches_jax.data.unpaired import COMPLETION, LABEL, ONE_RESPONSE, WITH_LABEL, is_good, with_own_flags
from ches_jax.distributed.processes import Process
from ches_jax.errors import ChesError, DataError
from ches_jax.inputs import Opener
from ches_jax.losses import Loss
from ches_jax.losses.inputs import REWARDS
from ches_jax.losses.tokens import TOKEN_WEIGHTS
from ches_jax.train.config import TrainConfig, UpdateOptions
from ches_jax.train.data.examples import NOTHING, ragged
from ches_jax.train.objective import is_supervised, is_unpaired, reads_lists, reads_samples
from ches_jax.train.reference import COLUMNS
from ches_jax.types import Eos, OnBadRow, Response, TokenPair

REFERENCE_FIELDS = ("ref_logp_chosen", "ref_logp_rejected")
REWARD_FIELDS = ("rewards_chosen", "rewards_rejected")
TOKEN_WEIGHT_FIELDS = ("token_weights_chosen", "token_weights_rejected")
REWARD_COLUMNS = (
    ("chosen_reward", "rejected_reward"),
    ("reward_chosen", "reward_rejected"),
    ("score_chosen", "score_rejected"),
    ("chosen_score", "rejected_score"),
    ("chosen_rating", "rejected_rating"),
    ("chosen-rating", "rejected-rating"),
)
"""Names under which published data sets keep the scores of the two responses; the first that a row has is read."""
SCORES = ("scores", "scores")
"""And where they keep those of several responses."""
_CHUNK = 256
"""Pairs that are tokenised at a time, and distributed to processes."""


@dataclass(frozen=True)
class ReadPairs:
    """The pairs of a source that can be trained on, in its order."""

    pairs: list[TokenPair]
    """Single responses have lent their prompt to a pair; where no other fits, its other side is empty."""
    extra: dict[str, np.ndarray]
    """Numbers that the rows bring, by field of ``LossInputs``."""
    dropped: list[dict[str, Any]]
    rows: int


def require_columns(config: TrainConfig, loss: Loss) -> None:
    """Refuse ``--rewards`` and ``--token-weights`` that name no two columns, or that the loss would not read.

    Raises:
      ChesError: what was expected.
    """
    for option, given, fields_read, what in (
        ("--rewards", config.rewards, REWARDS, "rewards of two columns"),
        ("--token-weights", config.token_weights, TOKEN_WEIGHTS, "weights of tokens; given_weights(LOSS) does"),
    ):
        if given is not None:
            names = given.split(",")
            if len(names) != 2 or not all(names):
                raise ChesError(f"{option} {given!r}: expected the names of two columns, CHOSEN,REJECTED")
            if not loss.needs >= fields_read:
                raise ChesError(f"{option} {given}: loss {config.loss!r} reads no {what}")
    if config.token_weights is None and loss.needs >= TOKEN_WEIGHTS:
        raise ChesError(
            f"loss {loss!r} reads a weight for each token; say in which columns they are: "
            "--token-weights CHOSEN,REJECTED"
        )


def option_columns(config: UpdateOptions) -> frozenset[str]:
    """Columns of the rows that options name."""
    named = (config.weights, config.label_probabilities, config.token_weights, config.rewards)
    return frozenset(name for names in named if names for name in names.split(","))


def _two(names: Sequence[str], columns: str) -> dict[str, str]:
    return dict(zip(names, columns.split(","), strict=True))


def read_pairs(
    config: TrainConfig,
    loss: Loss,
    tokenizer: PairTokenizer,
    spec: str,
    split: str | None,
    limit: int | None,
    process: Process,
    opener: Opener,
    option: str,
) -> ReadPairs:
    """Read a source for a run; of several processes each tokenises its part, and all get the same.

    Raises:
      ChesError: data that cannot be read or is not fit, under the policy ``on_bad_row``.
    """
    source, one_response = _open(config, loss, spec, split, opener, option)
    if option == "eval_pairs" and _counts_alike(source, config.weights):
        config, alike = replace(config, weights=None), ("weights",)
    else:
        alike = ()
    choices_of = _column_choices(config, loss)
    if one_response:
        for asked, choices in choices_of:
            if [*choices[0]] != ["weights"]:
                raise ChesError(
                    f"{asked}: {source.name} has rows of one response, of which only the label and a weight are read"
                )
    pairs = _tokenised(source, tokenizer, limit, process)
    if one_response:
        pairs = [replace(with_own_flags(p), rejected=NOTHING) for p in pairs]
    rows = len({p.index for p in pairs})
    kept, dropped = _fit(source, tokenizer, pairs, config.on_bad_row)
    if one_response and is_supervised(loss):  # every response is a good one
        numbers = _numbers(source, choices_of, kept, limit, alike)
        _require_weights(source.name, config.weights, kept, numbers)
        return ReadPairs(kept, numbers, dropped, rows)
    if one_response:
        name = config.columns.get(LABEL, LABEL)
        numbers = _numbers(source, [(f"--loss {config.loss}", [{LABEL: name}]), *choices_of], kept, limit, alike)
        _require_weights(source.name, config.weights, kept, numbers)
        if option == "pairs":
            _require_both_kinds(source.name, loss, numbers[LABEL] > 0)
        pairs, members = pair_by_prompt(kept, numbers[LABEL] > 0)
        weights = {
            f"weights_{side}": numbers["weights"][which] for side, which in members.items() if "weights" in numbers
        }
        return ReadPairs(pairs, weights, dropped, rows)
    if reads_samples(loss) or reads_lists(loss):
        _require_one_prompt(source.name, config.loss, kept)
    if reads_samples(loss):
        _require_equal_samples(source.name, kept)
    if reads_lists(loss):
        _require_lists(source.name, config.loss, kept)
    numbers = _numbers(source, choices_of, kept, limit, alike)
    _require_label_probabilities(source.name, kept, numbers)
    if reads_lists(loss) and option == "pairs":
        _require_an_order(source.name, config.loss, numbers)
    _require_weights(source.name, config.weights, kept, numbers)
    return ReadPairs(kept, _token_weights(source.name, kept, numbers, config.eos), dropped, rows)


def _open(
    config: TrainConfig, loss: Loss, spec: str, split: str | None, opener: Opener, option: str
) -> tuple[PairSource, bool]:
    """The source, and whether its rows are of one response."""
    if is_unpaired(loss) or is_supervised(loss):
        try:
            source = opener.rows(spec, split, config.columns, ONE_RESPONSE, option)
        except DataError:
            if {*COMPLETION, LABEL} & config.columns.keys():
                raise
        else:
            return source.of_kind(WITH_LABEL) if is_unpaired(loss) else source, True
    if reads_samples(loss):
        return opener.rows(spec, split, config.columns, SAMPLES, option), False
    if reads_lists(loss):
        return opener.rows(spec, split, config.columns, LISTS, option, config.schema), False
    return opener.pairs(spec, split, config.columns, config.candidates, option, config.schema), False


def _counts_alike(source: PairSource, weights: str | None) -> bool:
    """Whether held-out rows have no weights: those say how much a row is trained on, and each of these counts 1."""
    if weights is None:
        return False
    _, first = next(iter(source.read(0)))
    return lookup(first, weights) is None


def _require_label_probabilities(name: str, pairs: Sequence[TokenPair], numbers: Mapping[str, np.ndarray]) -> None:
    """Probabilities lie between 0 and 1.

    Raises:
      DataError: the first that does not.
    """
    for pair, value in zip(pairs, numbers.get("label_probability", ()), strict=False):
        if not 0.0 <= value <= 1.0:
            raise DataError(f"{name}: row {pair.index} has the label probability {value:g}; expected 0 to 1")


def _require_weights(
    name: str, column: str | None, pairs: Sequence[TokenPair], numbers: Mapping[str, np.ndarray]
) -> None:
    """Weights are 0 or more, and some are more.

    Raises:
      DataError: the first that is less, which would raise its loss; or nothing but zeros.
    """
    weights = numbers.get("weights", np.ones(1))
    if (below := np.flatnonzero(weights < 0)).size:
        raise DataError(
            f"{name}: row {pairs[below[0]].index} has the weight {weights[below[0]]:g} in {column}; expected 0 or "
            "more, since the row's loss would be raised"
        )
    if not weights.any():
        raise DataError(f"{name}: the weights in {column} are all 0, and nothing would be learned")


def _token_weights(
    name: str, pairs: Sequence[TokenPair], numbers: Mapping[str, np.ndarray], eos: Eos
) -> dict[str, np.ndarray]:
    """The numbers, weights of tokens among them checked against the tokens there are.

    Raises:
      DataError: a response with another number of tokens than weights.
    """
    for field in TOKEN_WEIGHT_FIELDS:
        for pair, weights in zip(pairs, numbers.get(field, ()), strict=False):
            tokens = len((pair.chosen if field.endswith("_chosen") else pair.rejected).targets(eos))
            if len(weights) != tokens:
                raise DataError(
                    f"{name}: row {pair.index} has {len(weights)} {field}, and {tokens} tokens in that response"
                    f"{'' if eos == 'exclude' else ' (its terminator among them)'}"
                )
    return dict(numbers)


def _samples(row: Mapping[str, Any], columns: Mapping[str, str]) -> list[tuple[Numbers, dict[str, Any]]]:
    """A row with a rejected response and samples, as the pairs of each sample with it."""
    name = columns.get("responses", "responses")
    samples = lookup(row, name)
    if not isinstance(samples, list) or not samples:
        raise DataError(
            f"no list of samples in {name!r}; found: {', '.join(map(str, row)) or 'none'}; expected prompt, rejected "
            "and responses, the policy's own samples; say which column is which with --columns responses=NAME"
        )
    of_ids = isinstance(samples[0], list) and all(isinstance(t, int) for t in samples[0])
    side = "chosen_ids" if of_ids else "chosen"
    names = {k: v for k, v in columns.items() if k not in ("responses", "chosen", "chosen_ids")}
    return [((k, len(samples)), canonical_content({**row, side: sample}, names)) for k, sample in enumerate(samples)]


SAMPLES = Kind("rejected responses with samples", (*PAIR_COLUMNS, "responses"), _samples)


def _require_one_prompt(name: str, loss: str, pairs: Sequence[TokenPair]) -> None:
    """Every row a prompt with its responses.

    Raises:
      DataError: a row with a prompt for each response.
    """
    for pair in pairs:
        if pair.rejected_prompt is not None:
            raise DataError(
                f"{name}: row {pair.index} has two prompts, chosen_prompt and rejected_prompt, and loss {loss!r} reads "
                "several responses to one prompt; losses of pairs, such as dpo and dove, read such rows"
            )


def _require_equal_samples(name: str, pairs: Sequence[TokenPair]) -> None:
    """Every row with the same samples of the same prompt."""
    by_row: dict[int, list[TokenPair]] = {}
    for pair in pairs:
        by_row.setdefault(pair.index, []).append(pair)
    expected = [p.candidates for p in next(iter(by_row.values()))]
    for index, of_row in by_row.items():
        if [p.candidates for p in of_row] != expected:
            raise DataError(
                f"{name}: row {index} has other samples ({len(of_row)}) than the first ({len(expected)}); an objective "
                "of samples needs the same number for each prompt, all of them fit"
            )
        if len({p.prompt for p in of_row}) > 1:
            raise DataError(
                f"{name}: row {index}: tokens merge across the prompt's end, in some samples and not in all"
            )


def _require_lists(name: str, loss: str, pairs: Sequence[TokenPair]) -> None:
    """Every row a list of responses to the same prompt tokens.

    Raises:
      DataError: a row that is a pair; a prompt whose end merges with the tokens of some responses.
    """
    prompts: dict[int, tuple[int, ...]] = {}
    for pair in pairs:
        if pair.candidates is None:
            raise DataError(
                f"{name}: row {pair.index} is a pair, and loss {loss!r} reads lists: rows with prompt, responses and "
                "scores (a pair is such a row with two responses)"
            )
        if prompts.setdefault(pair.index, pair.prompt) != pair.prompt:
            raise DataError(
                f"{name}: row {pair.index}: tokens merge across the prompt's end, in some responses and not in all"
            )


def _require_an_order(name: str, loss: str, numbers: Mapping[str, np.ndarray]) -> None:
    """Some list whose scores differ.

    Raises:
      DataError: every response is as good as the others of its row, so that nothing would be learned.
    """
    best, other = (numbers[field] for field in REWARD_FIELDS)
    if len(best) and (best == other).all():
        raise DataError(
            f"{name}: the scores of each row are all equal, and loss {loss!r} learns from their order; are they in "
            "another column? Name it with --columns scores=NAME"
        )


def _require_both_kinds(name: str, loss: Loss, good: np.ndarray) -> None:
    """Rows of both kinds for a loss that tells them apart by the mean of all rewards.

    Raises:
      DataError: all are good, or all bad.
    """
    if "reward_mean" in loss.needs and good.all() == good.any():
        raise DataError(
            f"{name}: all {len(good)} rows are {'good' if good.all() else 'bad'}, and {loss!r} is a classifier of good "
            "and bad responses; kto takes rows of one kind"
        )


def pair_by_prompt(rows: Sequence[TokenPair], good: np.ndarray) -> tuple[list[TokenPair], dict[str, np.ndarray]]:
    """Single responses to pairs: of each prompt a good one with a bad one, as far as there are both.

    Returns:
      The pairs; and for the chosen and the rejected side of each which row it was, where a side is empty the other's.
    """
    by_prompt: dict[tuple[int, ...], tuple[list[int], list[int]]] = {}
    for i, (row, good_one) in enumerate(zip(rows, good, strict=True)):
        by_prompt.setdefault(row.prompt, ([], []))[0 if good_one else 1].append(i)
    pairs, members = [], []
    together = (two for sides in by_prompt.values() for two in itertools.zip_longest(*sides, fillvalue=-1))
    for one, other in together:
        members.append((one if one >= 0 else other, other if other >= 0 else one))
        if one < 0:
            pairs.append(replace(rows[other], chosen=NOTHING, rejected=rows[other].chosen))
        elif other < 0:
            pairs.append(rows[one])
        else:
            both = hashlib.sha256((rows[one].row_id + rows[other].row_id).encode()).hexdigest()[:32]
            pairs.append(replace(rows[one], row_id=both, rejected=rows[other].chosen))
    chosen, rejected = np.array(members, int).reshape(-1, 2).T
    return pairs, {"chosen": chosen, "rejected": rejected}


def _column_choices(config: TrainConfig, loss: Loss) -> list[tuple[str, list[Mapping[str, str]]]]:
    """Options that read numbers from the rows, and for each the columns that would do, by field of ``LossInputs``."""
    choices_of: list[tuple[str, list[Mapping[str, str]]]] = []
    if config.reference == "columns":
        choices_of.append(("--reference columns", [dict(zip(REFERENCE_FIELDS, COLUMNS, strict=True))]))
    if config.weights is not None:
        choices_of.append((f"--weights {config.weights}", [{"weights": config.weights}]))
    if config.label_probabilities is not None:
        name = config.label_probabilities
        choices_of.append((f"--label-probabilities {name}", [{"label_probability": name}]))
    if config.token_weights is not None:
        choices_of.append(
            (f"--token-weights {config.token_weights}", [_two(TOKEN_WEIGHT_FIELDS, config.token_weights)])
        )
    if reads_lists(loss):
        scores = config.columns.get("scores") or "scores"
        choices_of.append((f"--loss {config.loss}", [_two(REWARD_FIELDS, f"{scores},{scores}")]))
    if loss.needs >= REWARDS:
        names = [config.rewards.split(",")] if config.rewards else [*REWARD_COLUMNS, SCORES]
        option = f"--rewards {config.rewards}" if config.rewards else f"--loss {config.loss}"
        choices_of.append((option, [dict(zip(REWARD_FIELDS, two, strict=True)) for two in names]))
    return choices_of


def _tokenised(source: PairSource, tokenizer: PairTokenizer, limit: int | None, process: Process) -> list[TokenPair]:
    """All pairs of the source; every process tokenises its chunks of rows and hands them to the others."""
    rows = itertools.takewhile(lambda row: limit is None or row.index < limit, source)
    own_pairs: list[TokenPair] = []
    for number in itertools.count():
        chunk = list(itertools.islice(rows, _CHUNK))
        if not chunk:
            break
        if number % process.count == process.id:
            own_pairs += tokenizer(chunk)
    if process.count == 1:
        return own_pairs
    tokenised = [_decoded(pair) for part in process.exchange([_encoded(p) for p in own_pairs]) for pair in part]
    # chunks come back in the order of the processes; the pairs of a row lie in one or two chunks that follow each other
    return sorted(tokenised, key=lambda p: (p.index, p.candidates or ()))


def _encoded(pair: TokenPair) -> dict[str, Any]:
    """A pair as JSON values."""
    return {f.name: getattr(pair, f.name) for f in fields(pair)} | {
        side: [response.content, response.terminator]
        for side, response in (("chosen", pair.chosen), ("rejected", pair.rejected))
    }


def _decoded(values: dict[str, Any]) -> TokenPair:
    sides = {side: Response(tuple(values[side][0]), values[side][1]) for side in ("chosen", "rejected")}
    lists = {name: tuple(v) for name, v in values.items() if isinstance(v, list) and name not in sides}
    return TokenPair(**{**values, **lists, **sides})


def _fit(
    source: PairSource, tokenizer: PairTokenizer, pairs: Sequence[TokenPair], policy: OnBadRow
) -> tuple[list[TokenPair], list[dict[str, Any]]]:
    """Pairs that can be trained on, and records of those left out."""
    audit = Audit(tokenizer.tokenizer.bos_token_id, tokenizer.tokenizer.eos_token_id)  # type: ignore[arg-type]
    audit.extend(pairs)
    if policy == "error":
        require_clean(audit, source.name)
    bad = [p for p in pairs if (p.flags if policy == "drop" else not UNSCORABLE.isdisjoint(p.flags))]
    out = {id(p) for p in bad}
    kept = [p for p in pairs if id(p) not in out]
    if not kept:
        raise DataError(f"{source.name}: no row is left to train on ({len(pairs)} read, all left out)")
    return kept, [dropped_record(p) for p in bad]


def _numbers(
    source: PairSource,
    choices_of: Sequence[tuple[str, list[Mapping[str, str]]]],
    pairs: Sequence[TokenPair],
    limit: int | None,
    alike: Sequence[str] = (),
) -> dict[str, np.ndarray]:
    """Numbers that the rows themselves bring, for each of ``pairs``; 1 in the fields in which all are ``alike``."""
    ones = {field: np.ones(len(pairs)) for field in alike}
    if not choices_of:
        return ones
    by_row: dict[int, list[int]] = {}
    for position, pair in enumerate(pairs):
        by_row.setdefault(pair.index, []).append(position)
    values: list[dict[str, Any]] = [{} for _ in pairs]
    for index, (where, raw) in enumerate(source.read(0)):
        if limit is not None and index >= limit:
            break
        for position in by_row.get(index, ()):
            for option, choices in choices_of:
                subject = f"{source.name}, {where}: {option}"
                values[position] |= _row_numbers(subject, choices, raw, pairs[position].candidates)
    return ones | {field: _column([numbers[field] for numbers in values]) for field in (values[0] if values else {})}


def _column(values: list[Any]) -> np.ndarray:
    return ragged(values) if isinstance(values[0], np.ndarray) else np.array(values)


def _row_numbers(
    subject: str, choices: Sequence[Mapping[str, str]], raw: Mapping[str, Any], candidates: tuple[int, int] | None
) -> dict[str, Any]:
    """The first choice of columns that the row has, of the pair that these two of its responses make."""
    for columns in choices:
        one_list = len({*columns.values()}) < len(columns)
        found = {field: lookup(raw, name) for field, name in columns.items()}
        if LABEL in found:
            found[LABEL] = is_good(columns[LABEL], found[LABEL])
        if all(value is not None for value in found.values()) and not (one_list and candidates is None):
            values = {field: _of_pair(field, value, candidates) for field, value in found.items()}
            if all(_fits(field, v) for field, v in values.items()):
                return {f: np.array(v, float) if isinstance(v, list) else float(v) for f, v in values.items()}
    named = ", or ".join(" and ".join(dict.fromkeys(columns.values())) for columns in choices)
    lists = "" if candidates is None else " (of several responses to a prompt: lists, a number for each response)"
    raise DataError(f"{subject} needs numbers in {named}{lists}; the row has {', '.join(map(str, raw))}")


def _fits(field: str, value: Any) -> bool:
    """Whether a value is a finite number, or a list of them where the field is of tokens."""
    if field in TOKEN_WEIGHT_FIELDS:
        return isinstance(value, list) and all(_fits("", v) for v in value)
    return isinstance(value, int | float) and math.isfinite(value)


def _of_pair(field: str, value: Any, candidates: tuple[int, int] | None) -> Any:
    """The number of a pair; where the row makes several, a number of one side is in a list of all responses."""
    if candidates is None or not field.endswith(("_chosen", "_rejected")):
        return value
    which = candidates[field.endswith("_rejected")]
    return value[which] if isinstance(value, list) and which < len(value) else None
