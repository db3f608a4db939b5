"""The page and the figures of what the claims saw: made from the files alone."""

import json

import pytest

from ches_jax.cli import main as ches
from ches_jax.errors import RunError
from theory import verify as command
from theory.figures import DRAWN, pictures
from theory.report import report

SPEARMAN = {
    name: {"rho": rho, "low": rho - 0.2, "high": rho + 0.2}
    for name, rho in (("head_score", 0.6), ("ches", 0.1), ("batch rate", 0.4), ("ufm_score", 0.5), ("own rate", 0.8))
}
SIX = [0.1, -0.2, 0.3, 0.0, 0.5, -0.1]
MODEL = {
    "K0m": {"influence": [[1.0, -0.5], [0.2, 2.0]]},
    "F6": {"SGD": {"predicted": SIX, "measured": SIX, "sizes": [1e-3, 1e-2], "wrong": [1e-6, 1e-4]}},
    "F2": {
        "spearman": SPEARMAN,
        "points": dict.fromkeys(("own rate", "batch rate", "head_score", "ches", "ufm_score"), SIX),
    },
    "F3": {"spearman": SPEARMAN, "change": SIX, "scores": {"ches": SIX, "head_score": SIX}},
    # tokens are the data's: markup, mathematics, glyphs that no font has
    "F4": {"alpha": [[0.5, -1.0]], "chosen": ["$x$"], "rejected": ["<b>", "\U0001f600"]},
    "F5": {"pair": ["a", "b"], "words": ["<i>", " $"], "along": [2.0, 1.0], "gains": [0.1, 0.2], "median gain": 0.0},
    "F7": {"by layer": {"embed": [0.1], "mlp": [0.2, 0.3], "final norm": [0.1], "head": [0.3]}},
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "toy"
    assert command.main(["--claims", "R1", "R4", "D2", "L1", "--instances", "20", "--out", str(out)]) == 0
    return out


def test_the_command_makes_a_page_with_every_figure(run, capsys):
    assert ches(["report", str(run)]) == 0
    assert capsys.readouterr().out.strip().endswith("report.html")
    drawn = sorted(p.stem for p in (run / "figures").glob("*.svg"))
    assert drawn == sorted(
        ["toy_band", "toy_log_probabilities", "toy_masses", "toy_optimisers", "toy_phases", "toy_terms", "toy_tokens"]
    )
    text = (run / "report.html").read_text()
    assert text.count('src="data:image/svg+xml') == len(drawn)
    assert "<h1>4 of 4 claims hold</h1>" in text and "Lemma 1" in text and text.count("<script") == 2


@pytest.mark.slow
def test_figures_of_a_model_are_drawn_from_the_files(run, tmp_path):
    (tmp_path / "claims.json").write_bytes((run / "claims.json").read_bytes())
    (tmp_path / "figures.json").write_text(json.dumps(MODEL))
    text = report(tmp_path).read_text()
    assert text.count('src="data:image/svg+xml') == 10
    assert "<b>" not in text and "<i>" not in text
    again = {name: picture.svg for _, picture in pictures(MODEL) for name in [picture.name]}
    assert all((tmp_path / "figures" / f"{n}.svg").read_bytes() == svg for n, svg in again.items())


def test_every_figure_belongs_to_a_claim():
    from theory.claims import all_claims

    assert set(DRAWN) <= {c.id for c in all_claims()}


def test_a_directory_without_claims_is_reported(tmp_path):
    with pytest.raises(RunError, match="ches verify --out"):
        report(tmp_path)
    (tmp_path / "claims.json").write_text('{"claims": []}')
    with pytest.raises(RunError, match="no claims"):
        report(tmp_path)


def test_results_without_figures_are_a_page_too(run, tmp_path):
    (tmp_path / "claims.json").write_bytes((run / "claims.json").read_bytes())
    assert 'src="data:image' not in report(tmp_path).read_text()
