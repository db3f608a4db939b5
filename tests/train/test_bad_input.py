"""What goes wrong in a run, met on the command line: one message, exit code 2, nothing half-written."""

import shutil
import subprocess
import sys

import pytest

from ches_jax import bundled
from ches_jax.cli import main
from ches_jax.errors import ChesError, RunError
from ches_jax.losses import get_loss
from ches_jax.models.families.registry import decoder_config
from ches_jax.runs.files import read_object
from ches_jax.train.config import TrainConfig
from ches_jax.train.loop import train
from ches_jax.train.setup import require_balance
from tests.models.test_strict import family


@pytest.fixture
def error_of(capsys, tiny_model):
    """From the words of a command that fails to its message."""

    def run(out, *words, model=tiny_model):
        options = ["--model", str(model), "--limit", "8", "--batch-size", "4", "--mesh", "data=1", "--quiet"]
        capsys.readouterr()
        assert main(["train", *options, "--out", str(out), *map(str, words)]) == 2
        output = capsys.readouterr()
        assert "Traceback" not in output.err and output.err.startswith("ches: ") and not output.out
        return output.err

    return run


@pytest.fixture(scope="module")
def short(small, tmp_path_factory):
    """A run of two updates with a checkpoint after each."""
    out = tmp_path_factory.mktemp("short") / "run"
    return train(small(out, limit=8, holdout=0, save_every=1, export=False), quiet=True)


def test_a_reference_cache_of_another_model(error_of, short, tmp_path):

    (cache,) = short.glob("reference-*.parquet")
    message = error_of(tmp_path / "run", "--reference", cache, model=bundled.model_dir())
    assert "the reference cache of another run" in message and "model_fingerprint: " in message


def test_a_loss_that_is_no_number(error_of, tmp_path):
    message = error_of(tmp_path / "run", "--optimizer", "sgd", "--lr", "1e30", "--save-every", "1")
    assert message.startswith("ches: update 2: ") and " on rows " in message
    assert f"the last good checkpoint is {tmp_path / 'run' / 'checkpoints' / '1'}" in message


def test_a_checkpoint_of_another_optimiser(error_of, short, tmp_path):
    """The checkpoints of one run in the directory of another: the run's own identity says nothing of it."""
    out, words = tmp_path / "run", ("--optimizer", "sgd", "--lr", "1e30", "--save-every", "1")
    error_of(out, *words)
    shutil.rmtree(out / "checkpoints")
    shutil.copytree(short / "checkpoints", out / "checkpoints")
    message = error_of(out, *words, "--resume")
    assert "a checkpoint of another architecture or optimiser" in message and "opt_state" in message


@pytest.mark.slow
def test_a_disk_that_is_full_leaves_the_last_checkpoint_whole(small, short, tiny_model, tmp_path):
    """A limit on the size of files simulates a full disk: writing fails where the arrays are written.

    In a process of its own, as the limit and what the checkpoint library leaves behind when it fails belong to one.
    """
    out = tmp_path / "run"
    shutil.copytree(short, out)
    shutil.rmtree(out / "checkpoints" / "2")
    (out / "run.json").unlink()
    before = {p: p.read_bytes() for p in (out / "checkpoints" / "1").rglob("*") if p.is_file()}
    options = ["--model", tiny_model, "--limit", 8, "--batch-size", 4, "--mesh", "data=1", "--lr", "1e-4"]
    command = [sys.executable, "-m", "ches_jax", "train", *options, "--save-every", 1, "--no-export", "--quiet"]
    ended = subprocess.run(
        ["bash", "-c", 'ulimit -f 40 && exec "$@"', "-", *map(str, command), "--out", str(out), "--resume"],
        capture_output=True,
        text=True,
    )
    message = ended.stderr
    assert ended.returncode == 2 and not ended.stdout, message
    assert message.startswith("ches: ") and message.count("\n") == 1, message
    assert "could not be written" in message and "whole ones: steps 1;" in message and "--resume" in message
    assert {p: p.read_bytes() for p in before} == before
    assert not (out / "run.json").exists()
    config = small(out, limit=8, holdout=0, save_every=1, export=False)
    train(config, resume=True, quiet=True)
    assert read_object(out / "run.json", RunError, "a run")["updates_this_time"] == 1
    for name in ("metrics.jsonl", "displacement.parquet"):
        assert (out / name).read_bytes() == (short / name).read_bytes(), name


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("llama", "has no routed experts"),
        ("deepseek_v3", "by a stored correction"),
        ("glm4_moe", "by a stored correction"),
        ("llama4_text", "measures softmax scores"),
        ("gemma4_text", "its own code has no balance loss"),
        ("qwen3_next", None),
    ],
)
def test_a_balance_loss_where_the_family_has_none_says_why(kind, reason):
    own = {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 6}
    decoder = decoder_config(family(kind, **(own if kind == "gemma4_text" else {})))
    config = TrainConfig(loss="sft", router_balance=0.01)
    loss = get_loss("sft")
    if reason is None:
        require_balance(config, loss, decoder)
        return
    with pytest.raises(ChesError, match=rf"--router-balance: a {kind} model .*{reason}.*leave the option out"):
        require_balance(config, loss, decoder)
