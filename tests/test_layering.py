"""Imports run one way: errors, types, runs <- hf, data, distributed <- models <- scores, train <- report <- cli."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LEAVES = {"errors", "face", "types", "options", "runs", "bundled", "stats", "notices", "languages"}
PURE = LEAVES | {"hf", "data", "losses", "distributed"}
MAY_IMPORT = {
    "errors": set(),
    "face": set(),
    "hugepages": set(),
    "supervise": set(),
    "types": set(),
    "notices": set(),
    "languages": set(),
    "stats": set(),
    "options": {"errors", "types", "bundled", "runs"},
    "runs": {"errors"},
    "bundled": {"errors"},
    "hf": LEAVES,
    "data": LEAVES,
    "losses": LEAVES,
    "distributed": LEAVES,
    "models": LEAVES | {"hf", "distributed"},
    "inputs": PURE | {"models", "scores"},
    "scores": PURE | {"models", "inputs"},
    "displacement": PURE | {"scores", "inputs", "generate", "judges"},
    "integrations": LEAVES | {"displacement"},
    "select": PURE | {"scores"},
    "label": PURE | {"scores", "inputs", "displacement"},
    "train": PURE | {"models", "inputs", "displacement"},
    "forecast": PURE | {"models", "inputs", "scores", "displacement", "train"},
    "generate": PURE | {"models", "inputs"},
    "judges": PURE | {"models", "inputs", "generate"},
    "report": PURE | {"scores", "select", "displacement"},
    "health": LEAVES | {"data", "judges"},
    "doctor": PURE | {"models", "scores", "inputs", "health"},
    "plan": PURE | {"models", "scores", "train", "generate"},
    "convert": PURE | {"models", "train"},
}
PURE_MATHEMATICS = ["scores/hidden_sums.py", "models/attention/mask.py", "models/attention/dense.py", "models/rope.py"]


def library_files() -> list[Path]:
    return sorted(p for p in (ROOT / "ches_jax").rglob("*.py"))


def imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("path", library_files(), ids=lambda p: p.relative_to(ROOT).as_posix())
def test_a_stage_imports_only_earlier_stages(path):
    stage = path.relative_to(ROOT / "ches_jax").parts[0].removesuffix(".py")
    names = imported(path)
    foreign = {"theory", "experiments", "tests", "torch"}
    if stage == "integrations":  # runs inside other trainers
        foreign -= {"torch"}
    assert not {n.split(".")[0] for n in names} & foreign
    used = {n.split(".")[1] for n in names if n.startswith("ches_jax.")} - {stage}
    if stage in MAY_IMPORT:
        assert used <= MAY_IMPORT[stage], f"{stage} imports {sorted(used - MAY_IMPORT[stage])}"


@pytest.mark.parametrize("name", PURE_MATHEMATICS)
def test_the_mathematics_reads_no_files_and_no_data(name):
    used = {n.split(".")[0] for n in imported(ROOT / "ches_jax" / name)}
    assert used <= {"jax", "jaxtyping", "typing", "collections", "functools", "numpy", "math", "ches_jax"}


OPENING = {"open_pairs", "open_prompts", "open_rows", "load_tokenizer", "resolve", "read_config", "adapter_directory"}


@pytest.mark.parametrize("stage", ["scores", "train", "generate", "judges"])
def test_what_a_run_reads_is_opened_in_one_place(stage):
    """``inputs.Opener`` fingerprints what it opens, so a verb that opened something itself could forget to."""
    for path in (p for p in (ROOT / "ches_jax" / stage).rglob("*.py") if p.name != "__init__.py"):
        used = {name.rpartition(".")[2] for name in imported(path)} & OPENING
        assert not used, f"{path.name} opens with {sorted(used)}"
