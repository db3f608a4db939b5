"""One course of a run, written in the ways in which people's logs come: each is read as the same course."""

import contextlib
import csv
import io
import json
import math
import os
import struct
import zlib

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ches_jax.displacement.config import DiagnoseConfig
from ches_jax.displacement.diagnose import diagnose
from ches_jax.displacement.readers.find import read_log
from ches_jax.displacement.readers.metric_names import metric
from ches_jax.errors import ChesError

STEPS = range(10, 130, 10)
TRAIN = [{"step": s, "loss": 0.69 - s / 1000, "chosen": 0.001 * s, "rejected": -0.002 * s} for s in STEPS]
HELD_OUT = [{"step": s, "loss": 0.69, "chosen": -0.004 * s, "rejected": -0.006 * s} for s in STEPS]
NAMES = {"chosen": "rewards/chosen", "rejected": "rewards/rejected", "loss": "loss"}


def renamed(entries, names=NAMES, step="step"):
    """Entries with other names; a name is a template that takes ours in its place."""
    return [{step: e["step"], **{names[k]: e[k] for k in NAMES}} for e in entries]


def prefixed(prefix):
    return {k: prefix + v for k, v in NAMES.items()}


def mixed(train, held_out, *, step="step"):
    """Rows of both sets by step, as a trainer writes them."""
    rows = renamed(TRAIN, train, step) + renamed(HELD_OUT, held_out, step)
    return sorted(rows, key=lambda row: row[step])


def lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def table(rows, delimiter=",", missing=""):
    columns = list(dict.fromkeys(k for row in rows for k in row))
    out = io.StringIO()
    writer = csv.DictWriter(out, columns, restval=missing, delimiter=delimiter)
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def nested(row):
    out = {}
    for name, value in row.items():
        *folders, last = name.split("/")
        inner = out
        for folder in folders:
            inner = inner.setdefault(folder, {})
        inner[last] = value
    return out


WANDB = mixed(prefixed("train/"), prefixed("eval/"), step="train/global_step")
TRL = mixed(NAMES, prefixed("eval_"))
SETS = ("train", "eval")
POINT = ("Wall time", "Step", "Value")
EVERY = list(dict.fromkeys(k for row in WANDB for k in row))
VARIANTS = {
    "trainer_state.json": json.dumps({"log_history": [*TRL, {"step": 120, "train_runtime": 9.5, "train_loss": 5.0}]}),
    "strings.jsonl": lines({k: str(v) for k, v in row.items()} for row in TRL),
    "percent.jsonl": lines({**row, "rewards/accuracies": "62.5%", "percentage": "8.1%"} for row in TRL),
    "swift.jsonl": lines({"global_step/max_steps": f"{r['step']}/120", **r, "step": None} for r in TRL),
    "nested.jsonl": lines({"step": r.pop("train/global_step"), **nested(r)} for r in map(dict, WANDB)),
    "dots.jsonl": lines(mixed({k: v.replace("/", ".") for k, v in NAMES.items()}, {**prefixed("validation.")})),
    "original.jsonl": lines(
        mixed(*[{k: v.replace("/", f"_{s}/") if k != "loss" else f"loss/{s}" for k, v in NAMES.items()} for s in SETS])
    ),
    "means.jsonl": lines(mixed(*[{k: f"{s}/{v}_mean" for k, v in NAMES.items()} for s in SETS])),
    "tunix.jsonl": lines(mixed(prefixed("dpo/train/"), prefixed("dpo/eval/"))),
    "aligner.jsonl": lines(
        mixed(*({k: f"{s}_{v.replace('/', '_')}" for k, v in NAMES.items()} for s in SETS), step="global_step")
    ),
    "history.json": json.dumps(WANDB),
    "nan_cells.json": json.dumps([{k: row.get(k, math.nan) for k in EVERY} for row in WANDB]),
    "nan_cells.csv": table(WANDB, missing="NaN"),
    "empty_cells.csv": table(WANDB),
    "semicolons.csv": table(TRL, ";"),
    "tabs.tsv": table(TRL, "\t"),
    "by_column.json": json.dumps({k: {str(i): row.get(k) for i, row in enumerate(WANDB)} for k in EVERY}),
    "lists.json": json.dumps({k: [row.get(k) for row in WANDB] for k in EVERY}),
    "console.log": "".join(f"  8%|#   | 10/120 [00:01<00:11]\r{row!r}\n" for row in TRL),
    "scalars.log": "\n".join(
        "{" + ", ".join(f"{k!r}: {v}" if k == "step" else f"{k!r}: np.float32({v})" for k, v in row.items()) + "}"
        for row in TRL
    ),
    "resumed.jsonl": lines([*TRL[:14], {"step": 60, "rewards/chosen": 9.0, "rewards/rejected": 9.0}, *TRL[10:]]),
    "bom.jsonl": "\ufeff" + lines(TRL).replace("\n", "\r\n"),
    "windows.log": lines(TRL).encode("utf-16"),
    "decimal_commas.csv": table(WANDB, ";").replace(".", ","),
    "newest_first.csv": table(WANDB[::-1]),
    "lightning.csv": table(
        mixed(
            *(
                {k: f"{s}_{v.replace('/', '_')}{e}" for k, v in NAMES.items()}
                for s, e in (("train", "_step"), ("val", ""))
            )
        )
    ),
    "long.csv": "step,metric,value\n"
    + "".join(
        f"{r['train/global_step']},{k},{v}\n" for r in WANDB for k, v in r.items() if k[:5] != "train" or "/" in k
    ),
    "evaluation.jsonl": lines(mixed(prefixed("learning/"), prefixed("evaluation/"))),
    "camel.jsonl": lines(mixed(*({k: f"{s}/{k}Reward" if k != "loss" else f"{s}/loss" for k in NAMES} for s in SETS))),
    "comments.jsonl": "# a log\n" + lines(TRL) + "done\n",
    "indented.json": "\n".join(json.dumps(row, indent=1) for row in TRL),
    "verl.log": "".join(
        "(pid=7) step:"
        + " - ".join([str(r.pop("train/global_step")), *(f"{k}:np.float64({v!r})" for k, v in r.items())])
        + "\n"
        for r in map(dict, WANDB)
    ),
    "torchtune.txt": "".join(
        f"Step {r.pop('step')} | " + " ".join(f"{k}:{v!r}" for k, v in r.items()) + " \n" for r in map(dict, TRL)
    ),
    "blocks.log": "".join(
        f"== Step {r.pop('step')}/120 ==\n" + "".join(f"  * {k} = {v}\n" for k, v in r.items()) for r in map(dict, TRL)
    ),
    "levanter.log": "".join(
        "2025-01-01 INFO :: " + json.dumps({"event": "log", "step": r.pop("train/global_step"), "metrics": r}) + "\n"
        for r in map(dict, WANDB)
    ),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_a_course_is_read_the_same_from_every_format(tmp_path, name):
    path, text = tmp_path / name, VARIANTS[name]
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    log = read_log(path)
    for which, entries in (("train", TRAIN), ("held_out", HELD_OUT)):
        for quantity in ("chosen", "rejected"):
            series = log.get(which, quantity)
            assert series is not None and series.values == pytest.approx([e[quantity] for e in entries], abs=1e-9)
            assert series.steps.tolist() == list(STEPS) or name == "scalars.log"
    loss = log.get("train", "loss")
    assert loss is not None and loss.values[-1] == pytest.approx(0.57)  # and not the mean over the whole run
    found = diagnose(DiagnoseConfig(path=str(path), beta=0.1))
    assert found.held_out and found.verdict == "displaced" and found.chosen.mean == pytest.approx(-4.8)
    assert found.beside is not None and found.beside.directions["chosen"] == "up"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("train/rewards/chosen", (False, "chosen")),
        ("rewards_train/chosen", (False, "chosen")),
        ("eval_rewards/chosen", (True, "chosen")),
        ("eval/rewards_chosen", (True, "chosen")),
        ("Eval Rewards Chosen", (True, "chosen")),
        ("validation-default/rewards_rejected_mean", (True, "rejected")),
        ("train/reject_reward", (False, "rejected")),
        ("dpo/train/rewards/margins", (False, "margin")),
        ("eval/dpo_chosen_reward", (True, "chosen")),
        ("odds_ratio_loss", (False, "odds_ratio")),
        ("loss/train", (False, "loss")),
        ("train_dpo_loss", (False, "loss")),
        ("eval_log_probs/chosen", (True, "logp_chosen")),
        ("summary/train/dpo_chosen_reward", (False, "chosen")),
        ("val_rewards_chosen_step", (True, "chosen")),
        ("beta", (False, "beta")),
        ("rewards/chosen_std", None),
        ("ref_rewards/chosen", None),
        ("logits/chosen", None),
        ("token_acc", None),
        ("aux_loss", None),
    ],
)
def test_names_of_metrics(name, expected):
    found = metric(name)
    assert (found and (found.held_out, found.quantity)) == expected


def test_one_set_alone_is_enough(tmp_path):
    for prefix, entries, held_out in (("", TRAIN, False), ("eval_", HELD_OUT, True)):
        path = tmp_path / f"{held_out}.jsonl"
        path.write_text(lines(renamed(entries, prefixed(prefix))))
        found = diagnose(DiagnoseConfig(path=str(path), beta=0.1))
        assert found.held_out is held_out and found.beside is None and found.pairs == len(STEPS)


def with_bad(row, bad):
    return {k: bad if "chosen" in k and row["step"] == 50 else v for k, v in row.items()}


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("state.json", json.dumps({"log_history": [with_bad(r, math.nan) for r in TRL]})),
        ("lines.jsonl", lines(with_bad(r, -math.inf) for r in TRL)),
        ("strings.jsonl", lines(with_bad(r, "NaN") for r in TRL)),
        ("table.csv", table([with_bad(r, "Infinity") for r in TRL])),
        ("tabs.tsv", table([with_bad(r, "nan") for r in TRL], "\t")),
        ("console.log", "".join(f"{with_bad(r, math.nan)!r}\n" for r in TRL)),
        ("verl.log", "".join(" - ".join(f"{k}:{v}" for k, v in with_bad(r, "NaN").items()) + "\n" for r in TRL)),
    ],
)
def test_a_number_that_is_none_is_counted_in_every_format(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    found = diagnose(DiagnoseConfig(path=str(tmp_path / name), beta=0.1))
    assert found.pairs == 11 and found.beside is not None and found.beside.pairs == 11
    words = "left out as NaN or infinite: rewards/chosen at 1 of 12 entries (step 50), eval_rewards/chosen at 1 of 12"
    assert any(note.startswith(words) for note in found.caveats)


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("two.csv", table([{"run": r, "step": s, "loss": 0.0} for r in "ab" for s in (1, 2)]), r"2 runs \(a, b\)"),
        ("two.jsonl", lines({"run_id": r, "step": s, "loss": 0.1} for r in "ab" for s in (1, 2)), r"2 runs \(a, b\)"),
        ("again.jsonl", lines([*TRL, *TRL]), "begins again at step 10: two runs in one file"),
        ("cut.json", json.dumps(WANDB)[:-40], "cut off after .* characters"),
        ("cut_columns.json", VARIANTS["lists.json"][:-40], "cut off after .* characters"),
        (
            "diverged.jsonl",
            lines([*TRL[:8], {"step": 50, **dict.fromkeys(NAMES.values(), math.nan)}]),
            "rewards/chosen is NaN or infinite at 1 of 5 entries, first at step 50, and at the end: the run diverged",
        ),
        (
            "diverged.log",
            "\n".join(map(repr, [*TRL[:8], {"step": 50, "rewards/chosen": math.nan, "rewards/rejected": -math.inf}])),
            "rewards/chosen is NaN or infinite at 1 of 5",
        ),
        (
            "diverged.csv",
            table([*WANDB, {"train/global_step": 130, "train/rewards/chosen": "nan", "train/rewards/rejected": "nan"}]),
            "rewards/chosen is NaN or infinite at 1 of 13 entries, first at step 130",
        ),
        ("nothing.json", json.dumps({"global_step": 0, "log_history": []}), "no metrics in it yet"),
        ("sft.jsonl", lines({"step": s, "loss": 1.0, "mean_token_accuracy": 0.5} for s in STEPS), "no rewards/chosen"),
        ("one_side.jsonl", lines({"step": s, "rewards/chosen": 1.0} for s in STEPS), "none of rejected ones"),
        ("sets.jsonl", lines([{f"eval_{s}_rewards/chosen": 0.1 for s in "ab"}]), "--held-out NAME"),
        *(
            (
                f"{x}_{y}.jsonl",
                lines(r for e in HELD_OUT for s in (a, b) for r in renamed([e], prefixed(s))),
                rf"several evaluation sets \({x}, {y}\)",
            )
            for a, b, x, y in (
                ("eval_train_", "eval_test_", "test", "train"),
                ("eval_test_", "eval_validation_", "test", "validation"),
                ("eval/", "test/", "eval", "test"),
            )
        ),
        (
            "two_names.jsonl",
            lines([{**TRL[0], "chosen_rewards": 3.0}]),
            "rewards/chosen is 0.01 and chosen_rewards is 3",
        ),
        ("two.db", "SQLite format 3\0", "no readable database"),
        ("orpo.jsonl", lines({**r, "odds_ratio_loss": 0.3, "sft_loss": 2.0} for r in TRL), "odds ratio of ORPO"),
    ],
)
def test_a_log_that_cannot_be_judged_says_why(tmp_path, name, text, words):
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(ChesError, match=words):
        diagnose(DiagnoseConfig(path=str(path)))


def test_a_summary_and_a_copy_in_another_format_are_no_second_run(tmp_path):
    (tmp_path / "wandb-summary.json").write_text(json.dumps({"_step": 240, **WANDB[-2], **WANDB[-1]}))
    (tmp_path / "history.jsonl").write_text(lines(WANDB))
    assert read_log(tmp_path).source.endswith("history.jsonl (JSON lines)")
    (tmp_path / "export.csv").write_text(table(WANDB))
    assert len(read_log(tmp_path).series) == 6
    other = [{**row, "train/rewards/chosen": 0.5} for row in WANDB if "train/rewards/chosen" in row]
    (tmp_path / "export.csv").write_text(table(other))
    with pytest.raises(ChesError, match="holds 2 runs"):
        read_log(tmp_path)


def test_rows_cut_in_the_middle_are_left_out_and_said(tmp_path):
    (tmp_path / "a.jsonl").write_text(lines(TRL)[:-30])
    (tmp_path / "a.csv").write_text(table(TRL).rstrip()[:-30])
    for name in ("a.jsonl", "a.csv"):
        log = read_log(tmp_path / name)
        assert "cut off and was left out" in log.notes[0]
        series = log.get("held_out", "chosen")
        assert series is not None and series.steps[-1] == 110


def chart(name, side, run="dpo-run"):
    """What Weights & Biases saves of one chart."""
    column = f"{run} - {name}rewards/{side}"
    return table(
        [{"Step": e["step"], column: e[side], f"{column}__MIN": e[side], f"{column}__MAX": e[side]} for e in HELD_OUT]
    )


def test_charts_that_were_saved_one_by_one_are_one_log(tmp_path):
    for side in ("chosen", "rejected"):
        (tmp_path / f"{side}.csv").write_text(chart("eval/", side))
    found = diagnose(DiagnoseConfig(path=str(tmp_path), beta=0.1))
    assert found.held_out and found.pairs == len(STEPS) and found.chosen.mean == pytest.approx(-4.8)
    (tmp_path / "rejected.csv").write_text(chart("eval/", "rejected", run="another"))
    with pytest.raises(ChesError, match="holds 2 runs"):
        read_log(tmp_path)


@pytest.mark.parametrize("form", ["csv", "json"])
def test_charts_that_tensorboard_saved_are_called_by_their_files(tmp_path, form):
    for side in ("chosen", "rejected"):
        points = [(1.7e9 + e["step"], e["step"], e[side]) for e in HELD_OUT]
        text = json.dumps(points) if form == "json" else table([dict(zip(POINT, p, strict=True)) for p in points])
        (tmp_path / f"run-dpo-tag-eval_rewards_{side}.{form}").write_text(text)
    found = diagnose(DiagnoseConfig(path=str(tmp_path), beta=0.1))
    assert found.held_out and found.pairs == len(STEPS) and found.chosen.mean == pytest.approx(-4.8)
    (tmp_path / f"run-dpo-tag-eval_rewards_chosen.{form}").rename(tmp_path / f"download.{form}")
    with pytest.raises(ChesError, match=f"download.{form}: one chart of TensorBoard, .* name the file after it"):
        read_log(tmp_path / f"download.{form}")


def varint(number):
    """A whole number as protocol buffers write it."""
    return bytes([number]) if number < 128 else bytes([number & 127 | 128]) + varint(number >> 7)


def field(number, value):
    """A field of a message: a whole number, or bytes."""
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    return varint(number << 3 | 2) + varint(len(value)) + value


def items(values):
    """Names and values, as histories and configs of Weights & Biases hold them."""
    return b"".join(field(1, field(1, k.encode()) + field(16, json.dumps(v).encode())) for k, v in values.items())


def messages_of(entries, config):
    """The records of a run as Weights & Biases keeps it on the machine."""
    messages = [field(1, 1) + field(17, field(1, b"id") + field(4, items(config))), field(13, b"x" * 70_000)]
    return messages + [field(2, items(e) + field(2, field(1, i))) + field(16, b"") for i, e in enumerate(entries)]


def journal(messages):
    """Records cut into framed pieces, in blocks of 32 KiB."""
    out = bytearray(b":W&B\xe1\xbe\x00")
    for message in messages:
        at = 0
        while at == 0 or at < len(message):
            left = 32768 - len(out) % 32768
            if left < 7:
                out += bytes(left)
                continue
            piece = message[at : at + left - 7]
            whole = len(piece) == len(message) - at
            kind = (1 if whole else 2) if at == 0 else (4 if whole else 3)
            out += struct.pack("<IHB", zlib.crc32(bytes([kind]) + piece), len(piece), kind) + piece
            at += len(piece)
    return bytes(out)


def test_the_journal_of_weights_and_biases_is_read_with_its_config(tmp_path):
    """What lies beside it (what was printed, the summary) is no second run."""
    folder = tmp_path / "wandb/run-1"
    (folder / "files").mkdir(parents=True)
    data = journal(messages_of(WANDB, {"beta": 0.1, "args": {"loss_type": ["sigmoid"]}}))
    path = folder / "run-1.wandb"
    path.write_bytes(data)
    (folder / "files/output.log").write_text("".join(f"{row!r}\n" for row in WANDB[:8]))
    (folder / "files/wandb-summary.json").write_text(json.dumps(WANDB[-1]))
    found = diagnose(DiagnoseConfig(path=str(tmp_path)))
    assert found.scale == "nats" and found.held_out and found.chosen.mean == pytest.approx(-4.8)
    assert found.beside is not None and found.beside.pairs == len(STEPS)
    path.write_bytes(data[:-10])  # of a run that still goes on
    log = read_log(path)
    assert "cut off and was left out" in log.notes[0] and log.last_step == STEPS[-1]
    path.write_bytes(data[:-10] + bytes([data[-10] ^ 1]) + data[-9:])
    with pytest.raises(ChesError, match=r"damaged journal .* has another checksum.*\.history\("):
        read_log(path)


def test_a_run_of_weights_and_biases_that_was_resumed_is_one(tmp_path):
    """Each part is a journal of the run's name in a folder of its own time; of a step in both the later one counts."""
    half = next(at for at, row in enumerate(WANDB) if row["train/global_step"] == 80)
    again = next(at for at, row in enumerate(WANDB) if row["train/global_step"] == 50)
    parts = {"run-20260102_100000-ab": WANDB[again:], "offline-run-20260101_235959-ab": WANDB[:half]}
    wrong = [{n: v + 9 if "rewards" in n else v for n, v in row.items()} for row in WANDB[again:half]]
    parts["offline-run-20260101_235959-ab"] = [*WANDB[:again], *wrong]
    for name, entries in parts.items():
        (tmp_path / "wandb" / name).mkdir(parents=True)
        (tmp_path / "wandb" / name / "run-ab.wandb").write_bytes(journal(messages_of(entries, {"beta": 0.1})))
    (tmp_path / "whole.wandb").write_bytes(journal(messages_of(WANDB, {"beta": 0.1})))
    log, whole = read_log(tmp_path / "wandb"), read_log(tmp_path / "whole.wandb")
    assert log.source.endswith("run-20260102_100000-ab/run-ab.wandb (Weights & Biases, 2 parts of one run)")
    assert "resumed at step" in " ".join(log.notes) and log.settings == whole.settings
    alone = {name: " ".join(read_log(tmp_path / "wandb" / name / "run-ab.wandb").notes) for name in parts}
    assert {name: "its run began in" in notes for name, notes in alone.items()} == {
        "run-20260102_100000-ab": True,
        "offline-run-20260101_235959-ab": False,
    }
    assert log.series.keys() == whole.series.keys()
    for key, series in whole.series.items():
        np.testing.assert_array_equal(log.series[key].steps, series.steps)
        np.testing.assert_array_equal(log.series[key].values, series.values)
    (tmp_path / "wandb/run-20260102_100000-ab/run-ab.wandb").rename(
        tmp_path / "wandb/run-20260102_100000-ab/run-cd.wandb"
    )
    with pytest.raises(ChesError, match="holds 2 runs"):
        read_log(tmp_path / "wandb")


@pytest.mark.parametrize(
    "message",
    [
        field(2, 7),  # a history that is a number
        field(17, 1),
        field(2, field(2, field(1, b"x"))),
        field(2, field(1, field(16, b"1" * 5000))),
        b"\x13",  # a field of a kind that there is none of
        b"\x16\x01",
        b"\xff" * 40_000,  # a number without end
        field(2, field(1, field(16, b"[" * 30_000))),
    ],
)
def test_a_journal_with_right_sums_and_odd_messages_is_read_or_refused_in_words(tmp_path, message):
    (tmp_path / "a.wandb").write_bytes(journal([*messages_of(WANDB[:2], {}), message]))
    with contextlib.suppress(ChesError):
        read_log(tmp_path / "a.wandb")


def test_a_log_that_is_larger_than_any_is_not_read_into_memory(tmp_path):
    for name, begin in (("a.wandb", b":W&B\xe1\xbe\x00"), ("a.jsonl", b"{")):
        (tmp_path / name).write_bytes(begin)
        os.truncate(tmp_path / name, 10**11)  # without a byte on the disk
        with pytest.raises(ChesError, match="are too large for a log"):
            read_log(tmp_path / name)


@pytest.mark.parametrize(
    ("train", "evaluation"), [("train.jsonl", "eval.jsonl"), ("train/m.jsonl", "validation/m.jsonl")]
)
def test_the_name_of_a_file_says_which_set_its_metrics_are_of_where_they_do_not(tmp_path, train, evaluation):
    for name, entries in ((train, TRAIN), (evaluation, HELD_OUT)):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(lines(renamed(entries)))
    found = diagnose(DiagnoseConfig(path=str(tmp_path), beta=0.1))
    assert found.held_out and found.chosen.mean == pytest.approx(-4.8) and found.beside is not None
    assert any("is taken as evaluations" in note for note in found.caveats)


def test_parts_of_a_resumed_run_are_one_log_and_runs_beside_each_other_are_not(tmp_path):
    (tmp_path / "a.jsonl").write_text(lines(r for r in TRL if r["step"] <= 60))
    (tmp_path / "b.jsonl").write_text(lines(r for r in TRL if r["step"] > 60))
    series = read_log(tmp_path).get("held_out", "chosen")
    assert series is not None and series.steps.tolist() == list(STEPS)
    (tmp_path / "b.jsonl").write_text(lines(r for r in TRL if r["step"] > 50))
    with pytest.raises(ChesError, match="holds 2 runs"):
        read_log(tmp_path)


def test_a_log_that_was_exported_as_parquet(tmp_path):
    path = tmp_path / "history.parquet"
    pq.write_table(pa.Table.from_pylist([{name: row.get(name) for name in EVERY} for row in WANDB]), path)
    found = diagnose(DiagnoseConfig(path=str(path), beta=0.1))
    assert found.held_out and found.chosen.mean == pytest.approx(-4.8) and found.beside is not None
