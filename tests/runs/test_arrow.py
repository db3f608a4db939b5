"""What other libraries would load and no command has use for: pandas and IPython, which are there for whoever asks."""

import subprocess
import sys

import pyarrow as pa
import pytest

from ches_jax.runs.arrow import python_rows

COMMANDS = """
import sys
from ches_jax.cli import main

for words in (
    "score --limit 2 --quiet --out run",
    "select --scores run --by ches --keep lowest:0.5 --quiet --out kept",
    "report run --quiet",
):
    assert main(words.split()) == 0, words
assert not {"pandas", "IPython"} & set(sys.modules)
import IPython
"""
AFTERWARDS = """
import pyarrow as pa
from ches_jax.runs.arrow import leave_pandas_out, python_rows, take_pandas_in

leave_pandas_out()
assert "pandas" not in sys.modules and not [f for f in sys.meta_path if "NoPandas" in type(f).__name__]
moment = pa.table({"t": pa.array([[1_700_000_000_123_456_789]], pa.list_(pa.timestamp("ns")))})
assert python_rows(moment)[0]["t"][0].nanosecond == 789
assert moment.to_pandas().shape == (1, 1)
import pandas
assert pa.array(pandas.Series([1.0, float("nan")])).null_count == 1
"""


def in_a_process(code: str, folder) -> None:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, cwd=folder)
    assert done.returncode == 0, done.stderr


def test_score_select_and_report_load_no_pandas_and_no_ipython(tmp_path):
    # found first, also where none is installed
    (tmp_path / "IPython.py").write_text("def get_ipython():\n    return None\n")
    in_a_process(COMMANDS, tmp_path)


def test_pandas_is_there_for_whoever_asks(tmp_path):
    in_a_process(f"import sys{AFTERWARDS}", tmp_path)


@pytest.mark.parametrize("unit", ["s", "ms", "us", "ns"])
def test_times_of_any_unit_are_read(unit):
    table = pa.table({"t": pa.array([1_700_000_000], pa.timestamp(unit)), "x": [1]})
    assert python_rows(table) == table.to_pylist()
