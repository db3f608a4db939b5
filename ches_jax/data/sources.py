"""Rows from files, folders and the hub: one at a time, in order, again and again.

What lies where is opened by ``opened``, and understood by ``schema``; here rows become records.
"""

import base64
import hashlib
import itertools
import json
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TypeVar, get_args

from ches_jax import bundled
from ches_jax.data.formats import (
    BATCH_ROWS,
    Lines,
    Raw,
    Unreadable,
    lines_of,
    read_lines,
    row_of_line,
)
from ches_jax.data.messages import NOT_AN_ANSWER, RESULTS
from ches_jax.data.nested import DEEPEST, within_depth
from ches_jax.data.opened import Opened, in_memory, opened
from ches_jax.data.prompts import (
    BEST_FIRST,
    CANDIDATE_COLUMNS,
    COLUMNS,
    PROMPT_COLUMNS,
    TEXT_COLUMNS,
    Numbers,
    canonical_content,
    canonical_prompt,
    columns_read,
    lookup,
    pair_contents,
)
from ches_jax.data.schema.column_values import Rows
from ches_jax.data.schema.left_over import note_on
from ches_jax.data.schema.mapping import (
    WORDS,
    Schema,
    canonical_rows,
    decoded_turns,
    from_file,
    from_words,
    grouped,
    is_declaration,
    is_plain,
)
from ches_jax.data.schema.presets import PRESETS
from ches_jax.data.schema.recognise import Recognised, recognise, recognise_prompt, told_of_columns
from ches_jax.data.schema.values import turns
from ches_jax.data.text_rows import TextRows, text_rows
from ches_jax.data.two_prompts import SIDES, TWO_PROMPTS
from ches_jax.errors import DataError, did_you_mean
from ches_jax.notices import notice
from ches_jax.runs.json_text import quoted
from ches_jax.types import Pairing

T = TypeVar("T")
_TEXTS = frozenset(TEXT_COLUMNS)
_STRING = frozenset({str})
_LOOKED_AT = 200
"""Rows from which a schema is recognised."""
_TURN = "turn"
"""Column of the turn that was judged (MT-Bench), or of the number of turns (Chatbot Arena)."""


Contents = Callable[[Mapping[str, Any], Mapping[str, str]], list[tuple[Numbers, dict[str, Any]]]]
"""(row as read, names of its columns) -> content, or contents of its pairs with their numbers; raises DataError."""


@dataclass(frozen=True)
class Kind:
    """What the rows of a source are."""

    name: str
    """For messages."""
    columns: tuple[str, ...]
    """What is read; the row's other columns are carried along."""
    contents: Contents
    recognise: Callable[[Any], Recognised] | None = None
    """Which schema some of its rows have; None: rows that no schema is about."""
    named: Callable[[Rows, Mapping[str, str]], Mapping[str, str]] | None = None
    """Of such rows: the names of columns, with those that some of the rows show; None: as they were given."""

    @cached_property
    def of_a_pair(self) -> frozenset[str]:
        """What is read of a row that is one pair."""
        return frozenset(self.columns) - {*CANDIDATE_COLUMNS}


def _prompt_contents(row: Mapping[str, Any], columns: Mapping[str, str]) -> list[tuple[Numbers, dict[str, Any]]]:
    responses = row.get("responses")
    if row.get("prompt") is None and isinstance(responses, list) and len(responses) > 1:
        content = canonical_content({"chosen": responses[0], "rejected": responses[1]}, {})
        return [(None, {"prompt": content["prompt"]})]
    return [(None, canonical_prompt(row, columns))]


PAIRS: dict[Pairing, Kind] = {
    pairing: Kind("preference pairs", COLUMNS, partial(pair_contents, pairing=pairing), recognise)
    for pairing in get_args(Pairing)
}
"""By which pairs of a row's candidates are meant."""
LISTS = Kind("lists of responses with scores", COLUMNS, partial(pair_contents, pairing=BEST_FIRST), recognise)
PROMPTS = Kind("prompts", PROMPT_COLUMNS, _prompt_contents, recognise_prompt)
LABELS = Kind("labels", (), lambda row, columns: [(None, {})])
"""Rows as they are, which say something of rows that are elsewhere."""


@dataclass(frozen=True, slots=True)
class Record:
    """One row as read, in canonical columns; of a row with candidates, one of its pairs."""

    index: int
    """Position of the row in the source, from 0; blank lines do not count."""
    row_id: str
    where: str
    """For messages: "line 17" (from 1) of a text file, "row 17" (from 0) of a table."""
    content: dict[str, Any]
    """Of a pair: ``prompt, chosen, rejected`` (all text or all messages; with ``tools`` and
    ``chat_template_kwargs`` where given), or ``prompt_ids, chosen_ids, rejected_ids``; of a pair of two prompts
    ``chosen_prompt`` and ``rejected_prompt`` (or with ``_ids``) in place of ``prompt``. Of a prompt: ``prompt`` or
    ``prompt_ids``. Where the candidates of a row make no pair: ``prompt`` and ``responses`` as they are."""
    category: str | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)
    """The row's other columns, as they are: selections carry them along."""
    candidates: Numbers = None
    """Numbers of chosen and rejected among the row's ``responses``; () where these make no pair."""
    fault: str = ""
    """Why the row cannot be read; then it has no content (only from ``PairSource.tolerant``)."""


@dataclass(frozen=True)
class PairSource:
    """Re-iterable rows. Made by ``open_pairs``, ``open_prompts``, ``open_rows``."""

    name: str
    kind: str
    read: Callable[[int], Iterator[Raw]]
    """Raw rows from a position on."""
    identity: Callable[[], str]
    columns: Mapping[str, str] = field(default_factory=dict)
    rows: Kind = PAIRS["chosen-against-all"]
    schema: Schema | None = None
    """What the columns mean; None: they are canonical but for the names in ``columns``."""
    notes: tuple[str, ...] = ()
    """What a person should know about how the columns are read."""
    forgiving: bool = False
    lines: Callable[[Sequence[int] | bytes | None], Iterator[Lines]] | None = None
    """The lines whose position is wanted, where rows are lines and others can be passed over."""

    def tolerant(self) -> "PairSource":
        """The same rows; one that cannot be read comes as a record with its ``fault`` instead of an error."""
        return replace(self, forgiving=True)

    def of_kind(self, rows: Kind) -> "PairSource":
        """The same rows understood as another kind of the same columns.

        Raises:
          DataError: none of the first rows is of it.
        """
        source = replace(self, rows=rows)
        _require_one(source)
        return source

    def __iter__(self) -> Iterator[Record]:
        return self.iter_from(0)

    def iter_from(self, start: int) -> Iterator[Record]:
        """Rows from position ``start`` on; what lies before is skipped without being parsed."""
        return itertools.chain.from_iterable(self.rows_from(start))

    def rows_from(self, start: int) -> Iterator[list[Record]]:
        """The same, the pairs of one row of the data together; at least one for each."""
        return (rows for _, rows in self.rows_with_raw(start))

    def rows_at(self, wanted: Sequence[int] | bytes) -> Iterator[list[Record]]:
        """The rows whose position is wanted (1 at its place); others are not understood, lines not even read."""
        if self.lines is not None:
            some = ((at, row) for lines in self.lines(wanted) for at, row in _bounded_lines(lines))
        else:
            rows = enumerate(itertools.islice(self.read(0), len(wanted)))
            some = (numbered for numbered in rows if wanted[numbered[0]])
        return (records for _, records in self._understood(some))

    def blocks(
        self, wanted: Sequence[int] | bytes | None = None, limit: int | None = None
    ) -> Iterator[TextRows | list[Record]]:
        """The rows, or those that are wanted, up to ``limit``, some at a time: lines of texts as they stand there."""
        if self.lines is not None and is_plain(self.schema):
            lines = _within(limit, self.lines(wanted))
            return text_rows(lines, lambda at, where, raw: self._records(at, where, _shallow(raw)))
        rows = self.rows_from(0) if wanted is None else self.rows_at(wanted[:limit])
        return at_a_time(itertools.chain.from_iterable(itertools.islice(rows, limit)))

    def rows_with_raw(self, start: int) -> Iterator[tuple[Raw, list[Record]]]:
        """The same as ``rows_from``, each beside the row as it was stored; the file is read once for both."""
        return self._understood(enumerate(self.read(start), start))

    def _understood(self, rows: Iterable[tuple[int, Raw]]) -> Iterator[tuple[Raw, list[Record]]]:
        return ((row, self._records(index, *row)) for index, row in rows)

    def _records(self, index: int, where: str, raw: Any) -> list[Record]:
        """What a row holds."""
        try:
            return _rows(index, where, raw, self)
        except DataError as error:
            if not self.forgiving:
                raise DataError(f"{self.name}, {where}: {error}") from None
            return [Record(index, row_id({"row": plain(_row_of(raw))}), where, {}, fault=str(error))]

    def fingerprint(self) -> str:
        """sha256 of the stored bytes (for the hub: of what identifies the revision).

        Renaming columns does not change it.
        """
        return self.identity()

    def describe(self) -> str:
        """One line: what is read, and how."""
        renamed = ", ".join(f"{name}={theirs}" for name, theirs in self.columns.items())
        how = f"; columns {renamed}" if renamed else f"; schema {self.schema.name}" if self.schema else ""
        return f"{self.name} ({self.kind}{how})"

    def messages(self) -> list[str]:
        """Lines for a person: which schema was taken, unless the columns are canonical, and what it leaves unread."""
        taken = self.schema is not None and not is_plain(self.schema)
        says = [f"{self.name}: schema {self.schema.name} ({self.schema.describe()})"] if taken and self.schema else []
        return says + [f"{self.name}: {note}" for note in self.notes]

    def schema_record(self) -> dict[str, Any]:
        """What ``run.json`` keeps of it."""
        schema = self.schema
        words = dict(self.columns) if schema is None else schema.to_words()
        return {"name": "columns" if schema is None else schema.name, "words": words, "notes": list(self.notes)}


def row_id(content: Mapping[str, Any]) -> str:
    """Identity of a pair: a hash of its canonical content, wherever and in whatever format it lies.

    >>> row_id({"prompt": "p", "chosen": "a", "rejected": "b"})
    '8ad7972c3a7a43fe4ae5c60fb53bdb64'
    """
    if content.keys() == _TEXTS and _STRING.issuperset(map(type, content.values())):
        # most rows: what the encoder writes, in a third of its time
        sides = tuple([quoted(content[name]) for name in ("chosen", "prompt", "rejected")])
        text = b'{"chosen":%b,"prompt":%b,"rejected":%b}' % sides
    else:
        text = json.dumps(content, sort_keys=True, ensure_ascii=False, separators=(",", ":"), default=str).encode()
    return hashlib.sha256(text).hexdigest()[:32]


def open_pairs(
    spec: str,
    split: str | None = None,
    columns: Mapping[str, str] | None = None,
    pairing: Pairing | None = None,
    schema: str = "auto",
    read: Collection[str] = (),
) -> PairSource:
    """Opens preference pairs; see ``open_rows``. ``pairing``: of rows with candidates; default: chosen-against-all."""
    return open_rows(spec, split, columns, _paired(pairing), schema, read)


def _paired(pairing: Pairing | None) -> Kind:
    if pairing is not None and pairing not in PAIRS:
        raise DataError(
            f"candidates is one of {', '.join(PAIRS)}, not {pairing!r}{did_you_mean(str(pairing), list(PAIRS))}"
        )
    return PAIRS[pairing or "chosen-against-all"]


def pairs_of_run(options: Mapping[str, Any], read: Collection[str] = ()) -> Iterator[list[Record]]:
    """The rows that a run's options name, also those that cannot be read; the pairs of one row together.

    Args:
      options: ``pairs``, and ``split, columns, candidates, schema, limit`` where they were given.
      read: columns that the caller reads itself.

    Raises:
      DataError: as ``open_rows``.
    """
    return itertools.islice(_source_of_run(options, read).rows_from(0), options.get("limit"))


def blocks_of_run(
    options: Mapping[str, Any], read: Collection[str] = (), wanted: bytes | None = None
) -> Iterator[TextRows | list[Record]]:
    """The same, some rows at a time.

    Args:
      options: as for ``pairs_of_run``.
      read: the same.
      wanted: of which rows: 1 at their positions; all where it is not given.
    """
    return _source_of_run(options, read).blocks(wanted, options.get("limit"))


def _source_of_run(options: Mapping[str, Any], read: Collection[str]) -> PairSource:
    spec = bundled.located(str(options["pairs"]), bundled.pairs_file)
    schema = options.get("schema") or "auto"
    split, columns, pairing = (options.get(name) for name in ("split", "columns", "candidates"))
    return open_pairs(spec, split, columns, pairing, schema, read).tolerant()


def open_prompts(
    spec: str, split: str | None = None, columns: Mapping[str, str] | None = None, schema: str = "auto"
) -> PairSource:
    """Opens prompts: ``prompt`` or ``prompt_ids``, preference pairs (their prompt is taken), lines of text."""
    return open_rows(spec, split, columns, PROMPTS, schema)


def open_rows(
    spec: str,
    split: str | None,
    columns: Mapping[str, str] | None,
    rows: Kind,
    schema: str = "auto",
    read: Collection[str] = (),
) -> PairSource:
    """Opens rows of one kind and reads the first, so that a wrong file or column shows at once.

    Args:
      spec: a file of one of ``formats.READERS``, compressed or not; several with commas, or a glob; a folder of them or
        of ``save_to_disk``; an address (``runs.store.READ``); or ``owner/name`` of the hub.
      split: which split, where the source has several (on the hub: "train" when not given).
      columns: canonical name -> name in the data, e.g. ``{"prompt": "instruction"}``; an empty name
        hides a column, a dot reaches into objects (``prompts.lookup``); or the words of a declaration
        (``schema.mapping``).
      rows: what the rows are.
      schema: ``auto`` (recognised by columns and values), the name of a preset, or a file with a declaration.
      read: columns that the caller reads itself, as an option says: they are not reported as left over.

    Raises:
      DataError: nothing there, an unknown format, no rows, two readings that both fit, or no row that can be used.
    """
    return _source(f"{spec}:{split}" if split else spec, partial(opened, spec, split), columns, rows, schema, read)


def rows_in_memory(
    rows: Any,
    columns: Mapping[str, str] | None = None,
    pairing: Pairing | None = None,
    name: str = "rows",
    schema: str = "auto",
) -> PairSource:
    """Preference pairs that lie in memory; they are read as those of a file are.

    Args:
      rows: a list (or other iterable) of dicts, a data frame, a ``datasets.Dataset`` or an Arrow table.
      columns: canonical name -> name in the data, as in ``open_rows``.
      pairing: of rows with candidates; default: chosen-against-all.
      name: of the rows, in messages.
      schema: as in ``open_rows``.

    Raises:
      DataError: something else than rows, no rows, or a first row that cannot be used.
    """
    kind, read = in_memory(rows, name)

    def identity() -> str:
        return hashlib.sha256("\n".join(record.row_id for record in source.tolerant()).encode()).hexdigest()

    source = _source(name, lambda: (kind, read, identity), columns, _paired(pairing), schema)
    return source


def _source(
    name: str,
    where: Callable[[], Opened],
    columns: Mapping[str, str] | None,
    rows: Kind,
    schema: str,
    known: Collection[str] = (),
) -> PairSource:
    """A source whose names of columns and first rows are checked."""
    columns = dict(columns or {})
    declared = _declared(columns, rows, schema)
    kind, unbounded, identity = where()
    read = partial(_bounded, unbounded)
    source = PairSource(name, kind, read, identity, {} if declared else columns, rows, declared)
    some = [raw for _, raw in itertools.islice(read(0), _LOOKED_AT)]
    if not some:
        raise DataError(f"{source.name}: no rows; expected {rows.name}, at least one")
    objects = [raw for raw in some if isinstance(raw, Mapping)]
    if rows.recognise is not None and objects:
        try:
            recognised = (
                rows.recognise(objects)
                if declared is None and not columns
                else told_of_columns(declared, columns, objects)
            )
        except DataError as error:
            raise DataError(f"{source.name}: {error}") from None
        notes = tuple(note for note in recognised.notes if not note.startswith(tuple(map(note_on, known))))
        source = replace(source, schema=declared if columns else recognised.schema, notes=notes)
    elif rows.named is not None and objects:
        source = replace(source, columns=rows.named(objects, columns))
    if source.schema is not None and source.schema.group:
        source = replace(source, read=partial(_grouped, source.schema, read))
    elif isinstance(unbounded, partial) and unbounded.func is read_lines:
        source = replace(source, lines=partial(lines_of, *unbounded.args))
    _require_one(source)
    notes = _of_turns(itertools.islice(source.tolerant(), _LOOKED_AT))
    source = replace(source, notes=(*source.notes, *notes))
    for line in source.messages():
        notice(line)
    return source


def _require_one(source: PairSource) -> None:
    """One of the first rows can be read.

    Raises:
      DataError: none can; about the first.
    """
    if all(record.fault for record in itertools.islice(source.tolerant(), _LOOKED_AT)):
        next(iter(replace(source, forgiving=False)))


def _of_turns(records: Iterable[Record]) -> Iterator[str]:
    """What a person should know of responses of several turns.

    Args:
      records: the first ones of a source.
    """
    talks = itertools.takewhile(lambda r: not isinstance(r.content.get("chosen"), str), records)
    some = [record for record in talks if "chosen" in record.content]
    sides = [[m for side in SIDES for m in r.content.get(side, ())] for r in some]
    if found := sum(any(m["role"] in NOT_AN_ANSWER | RESULTS for m in messages) for messages in sides):
        yield (
            f"{found} of the first {len(some)} pairs have messages of the user or of a tool inside a response: their "
            "tokens count as the response's, as where TRL trains on it (docs/data.md)"
        )
    judged = [r.extra.get(_TURN) for r in some]
    answers = [sum(m["role"] == "assistant" for n in TEXT_COLUMNS[:2] for m in r.content.get(n, ())) for r in some]
    if early := sum(type(turn) is int and 0 < turn < n for turn, n in zip(judged, answers, strict=True)):
        yield (
            f"column '{_TURN}' says of {early} of the first {len(some)} pairs that an earlier turn than their last was "
            "judged, and is not read: the responses hold what came after it too"
        )


def _bounded(read: Callable[[int], Iterator[Raw]], start: int) -> Iterator[Raw]:
    """Rows, those that are nested too deeply for what is done with them as such that cannot be read."""
    return ((where, _shallow(raw)) for where, raw in read(start))


def _bounded_lines(lines: Lines) -> Iterator[tuple[int, Raw]]:
    """The same of lines, each with its position."""
    for at, (where, raw) in zip(lines.positions.tolist(), itertools.starmap(row_of_line, lines), strict=True):
        yield at, (where, _shallow(raw))


def _within(limit: int | None, blocks: Iterator[Lines]) -> Iterator[Lines]:
    """Lines whose position is below a limit, where there is one."""
    for lines in blocks:
        some = lines if limit is None else lines.some(lines.positions < limit)
        yield some
        if len(some) < len(lines):
            return


def at_a_time(rows: Iterable[T], count: int = BATCH_ROWS) -> Iterator[list[T]]:
    """Rows in lists; where their reading fails, first those that were read.

    >>> list(at_a_time("abc", 2))
    [['a', 'b'], ['c']]
    """
    some: list[T] = []
    try:
        for row in rows:
            some.append(row)
            if len(some) == count:
                yield some
                some = []
    except DataError:
        yield some
        raise
    if some:
        yield some


def _shallow(raw: Any) -> Any:
    return raw if within_depth(raw) else _DEEP


_DEEP = Unreadable(f"a column is nested more than {DEEPEST} deep; expected text, conversations or lists of them")


def _grouped(schema: Schema, read: Callable[[int], Iterator[Raw]], start: int) -> Iterator[Raw]:
    """Rows that share a prompt, together; their positions count prompts."""
    return itertools.islice(grouped(schema, read(0)), start, None)


def _declared(columns: Mapping[str, str], rows: Kind, schema: str) -> Schema | None:
    """The requested schema; None: to be recognised, or columns that are renamed."""
    if schema != "auto" and columns:
        raise DataError(f"--schema {schema} and --columns both say what the columns mean; leave one out")
    if schema != "auto":
        if rows.recognise is None:
            raise DataError(f"--schema {schema}: {rows.name} have no schema; name their columns with --columns")
        if schema in PRESETS:
            return PRESETS[schema].schema
        if Path(schema).suffix.lower() not in (".json", ".toml"):
            raise DataError(
                f"--schema {schema!r}: expected auto, a JSON or TOML file, or one of "
                f"{', '.join(PRESETS)}{did_you_mean(schema, list(PRESETS))}"
            )
        return from_file(schema)
    if rows.recognise is not None and is_declaration(columns) and set(columns) <= set(WORDS):
        return from_words(columns, "--columns")
    unknown = [n for n in columns if n not in rows.columns]
    if unknown:
        raise DataError(
            f"--columns {unknown[0]}={columns[unknown[0]]}: '{unknown[0]}' is not a column this "
            f"tool reads ({', '.join(rows.columns)}); write --columns prompt=NAME_IN_THE_DATA"
        )
    return None


def _rows(index: int, where: str, raw: Any, source: PairSource) -> list[Record]:
    rows, columns, schema = source.rows, source.columns, source.schema
    if isinstance(raw, Unreadable):
        raise DataError(raw.fault)
    if not isinstance(raw, Mapping):
        raise DataError(f"a {type(raw).__name__} instead of an object with columns {', '.join(rows.columns[:3])}")
    category = lookup(raw, schema.category if schema else columns.get("category", "category"))
    category = None if category is None else str(plain(category))
    declared = [] if schema is None or is_plain(schema) else schema.reads
    made = []
    for numbers, content in _contents(raw, source):
        if declared:
            read = {name if name in raw else name.partition(".")[0] for name in declared}
        else:
            read = columns_read(raw, columns, rows.of_a_pair if numbers is None else rows.columns)
        try:
            identity = row_id(content)
            extra = {str(name): plain(value) for name, value in raw.items() if name not in read}
        except UnicodeEncodeError:
            raise DataError("a text holds half a surrogate pair (\\ud800...); expected Unicode") from None
        made.append(Record(index, identity, where, content, category, extra, numbers))
    return made


def _contents(raw: Mapping[str, Any], source: PairSource) -> list[tuple[Numbers, dict[str, Any]]]:
    """Contents of a row's pairs with their numbers, by the schema where there is one."""
    if source.schema is None:
        texts = ("prompt", "chosen", "rejected", "responses", *TWO_PROMPTS)
        theirs = {source.columns.get(n, n) for n in texts}
        turned = {n: turns(decoded_turns(raw[n])) for n in theirs if n in raw}
        return source.rows.contents({**raw, **turned}, source.columns)
    rows = canonical_rows(source.schema, raw)
    if is_plain(source.schema) and len(rows) == 1 and rows[0][0] is None:
        return source.rows.contents(rows[0][1], {})
    contents = []
    for numbers, canonical in rows:
        tie = canonical.pop("tie", None) if not is_plain(source.schema) else None
        contents += [
            (of_row if numbers is None else numbers, content | {"tie": tie} if of_row == () and tie else content)
            for of_row, content in source.rows.contents(canonical, {})
        ]
    return contents


def plain(value: Any) -> Any:
    """A value that JSON and Arrow can write: of dates and bytes their text, of NaN null, of half a surrogate its code.

    >>> import datetime
    >>> plain({"when": datetime.date(2020, 1, 2), "score": math.nan, "text": "ok"})
    {'when': '2020-01-02', 'score': None, 'text': 'ok'}
    """
    if isinstance(value, str):
        return value if value.isascii() else value.encode("utf-8", "backslashreplace").decode("utf-8")
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(plain(k)): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    return value.isoformat() if hasattr(value, "isoformat") else plain(str(value))


def _row_of(raw: Any) -> Any:
    return raw.fault if isinstance(raw, Unreadable) else raw
