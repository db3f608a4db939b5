"""The command: a table, files, exit codes, one clear line for bad input; double precision stays inside."""

import json
from dataclasses import asdict

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ches_jax.errors import ChesError
from theory import verify as command
from theory.claims import registry
from theory.claims.registry import Claim, Outcome


def test_results_are_written_with_seed_dtype_and_versions(tmp_path, capsys):
    assert command.main(["--claims", "L1", "--instances", "20", "--seed", "5", "--out", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    assert "1 of 1 claims hold" in printed and printed.splitlines()[-1].endswith("claims.json")
    written = json.loads((tmp_path / "out" / "claims.json").read_text())
    assert written["passed"] == 1 and "jax" in written["versions"]
    (claim,) = written["claims"]
    assert claim["seed"] == 5 and claim["dtype"] == "float64" and claim["n"] == 200
    assert (tmp_path / "out" / "claims.txt").read_text().count("\n") == 2
    assert jnp.zeros(()).dtype == jnp.float32


def test_a_claim_that_fails_is_exit_code_one(monkeypatch, capsys):
    false = Claim(
        id="Z",
        statement="1 < 0",
        source="nobody",
        status="exact",
        scope="toy",
        tolerance=0.0,
        check=lambda ctx: Outcome(
            value=np.float64(1.0),  # type: ignore[arg-type]
            n=np.int64(1),  # type: ignore[arg-type]
            detail={"a": jnp.ones(2), "b": float("inf")},
            figure={"c": np.arange(2)},
        ),
    )
    monkeypatch.setitem(registry._CLAIMS, "Z", false)
    assert command.main(["--claims", "Z"]) == 1
    assert "not: Z" in capsys.readouterr().out
    (result,) = command.verify(["Z"], quiet=True)
    # numbers of any library become JSON's
    json.dumps(asdict(result), allow_nan=False)


def test_bad_input_is_exit_code_two_and_one_line(capsys):
    assert command.main(["--claims", "nonsense"]) == 2
    assert command.main(["--claims", "F1"]) == 2
    assert command.main(["--model", "/nowhere/at/all"]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert all(line.startswith("error: ") for line in lines if "claims:" not in line)
    assert "--model DIR" in "".join(lines)


def test_the_list_names_every_claim(capsys):
    assert command.main(["--list"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == len(registry.all_claims())


@pytest.mark.parametrize("option", [{"instances": 0}, {"instances": -3}, {"limit": 0}, {"seed": -1}])
def test_a_claim_is_not_called_wrong_where_nothing_was_checked(option):
    (name,) = option
    with pytest.raises(ChesError, match=f"--{name} {option[name]}: expected"):
        command.verify(["L1"], quiet=True, **option)


def test_importing_the_theory_leaves_precision_alone():
    assert not jax.config.jax_enable_x64  # type: ignore[attr-defined]


def test_results_are_of_one_verification_and_take_no_other_directory(tmp_path, monkeypatch, capsys):
    """claims.json is written last; where the others fail, that of an earlier one does not stand beside them."""
    words = ["--claims", "L1", "--instances", "20", "--out", str(tmp_path)]
    assert command.main(words) == command.main(words) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["claims.json", "claims.txt", "figures.json"]
    with monkeypatch.context() as patch:
        patch.setattr(command, "table", lambda results: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            command.write_results(tmp_path, [], {})
    assert not (tmp_path / "claims.json").exists()
    (tmp_path / "selection.json").write_text("{}")
    assert command.main(words) == 2
    assert "holds a selection, whose page this verification would replace" in capsys.readouterr().err
