"""Run directories: what makes two runs one, and runs that version 0.1 wrote."""

import json

import pytest

from ches_jax.errors import CheckpointError, RunError
from ches_jax.hf.directory import read_config as read_model_config
from ches_jax.hf.directory import resolve
from ches_jax.runs.directory import CONFIG, RESULTS, open_run, read_json, require_no_other

IDENTITY = {"config": {"model": "bundled", "pairs": "bundled", "eos": "include"}, "data_fingerprint": "f"}
OF_0_1 = {
    "verb": "score",
    "config": {"model": "embedded", "pairs": "embedded", "eos": "include"},
    "data_fingerprint": "f",
}


def test_a_run_of_0_1_on_the_bundled_model_is_resumed(tmp_path):
    (tmp_path / CONFIG).write_text(json.dumps(OF_0_1))
    open_run(tmp_path, "score", IDENTITY, resume=True)
    assert json.loads((tmp_path / CONFIG).read_text()) == OF_0_1, "the files of the run stay as they are"


def test_options_of_0_1_that_spell_it_flat_are_understood(tmp_path):
    path = tmp_path / CONFIG
    path.write_text(json.dumps({"verb": "train", "model": "embedded", "probes": "embedded", "loss": "embedded"}))
    actual = read_json(path)
    assert (actual["model"], actual["probes"], actual["loss"]) == ("bundled", "bundled", "embedded")


def test_every_difference_is_named_and_without_resume_nothing_goes_on(tmp_path):
    open_run(tmp_path, "score", IDENTITY, resume=False)
    with pytest.raises(RunError, match="add --resume"):
        open_run(tmp_path, "score", IDENTITY, resume=False)
    with pytest.raises(RunError, match="data_fingerprint: 'f' there, 'g' now"):
        open_run(tmp_path, "score", IDENTITY | {"data_fingerprint": "g"}, resume=True)


def test_the_old_name_of_the_bundled_model_is_answered_with_the_new_one():
    with pytest.raises(CheckpointError, match="is called bundled since"):
        resolve("embedded")


@pytest.mark.parametrize("name", RESULTS)
def test_what_is_written_over_is_of_the_same_verb(tmp_path, name):
    """A diagnosis and a verification may be made again in their directory, and never in that of anything else."""
    (tmp_path / name).write_text("{}")
    for own, this in (("diagnosis.json", "this diagnosis"), ("claims.json", "this verification")):
        if name == own:
            require_no_other(tmp_path, own, this)
        else:
            with pytest.raises(RunError, match=f"holds {RESULTS[name]}, whose page {this} would replace; give a new"):
                require_no_other(tmp_path, own, this)
    require_no_other(tmp_path / "new", "claims.json", "this verification")
    with pytest.raises(RunError, match="is a file; --out names a directory"):
        require_no_other(tmp_path / name, "claims.json", "this verification")


def test_the_directory_of_a_run_is_no_model_and_says_where_the_model_is(tmp_path):
    (tmp_path / CONFIG).write_text(json.dumps({"verb": "score", **IDENTITY}))
    with pytest.raises(CheckpointError, match=r"a run of `ches score` and no model; expected a Hugging Face model di"):
        read_model_config(tmp_path)
    (tmp_path / CONFIG).write_text(json.dumps({"verb": "train", **IDENTITY}))
    with pytest.raises(CheckpointError, match=r"no model; write what it trained with: ches convert --run \S+ --out"):
        read_model_config(tmp_path)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / CONFIG).write_text("{}")
    with pytest.raises(
        CheckpointError, match=r"a run of `ches train` and no model; the one that it trained is .*/model"
    ):
        read_model_config(tmp_path)
