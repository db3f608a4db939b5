"""Situations from public reports (``../shared/cases``): each has tests of its kind here, and its own check passes."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CASES = ROOT.parent / "shared" / "cases"

KINDS = {
    "adapter_scale_differs_by_layer": "models/test_lora.py::test_each_layer_has_its_own_scale_as_peft_computes_it",
    "config_unread_key": "models/test_readings.py::test_a_key_that_no_code_reads_is_named_once_and_changes_nothing",
    "diagnose_eval_rewards": "displacement/test_log_changes.py::"
    "test_held_out_rewards_count_and_training_ones_stand_beside",
    "diagnose_one_logged_step": "displacement/test_log_changes.py::test_one_logged_step_has_no_verdict",
    "diagnose_orpo_log": "displacement/test_log_changes.py::test_rewards_without_a_reference_are_no_changes",
    "end_pad_is_end_of_turn": "data/test_template.py::"
    "test_an_answer_ends_with_what_the_template_writes_behind_it_whatever_it_is_called",
    "end_special_closes_content": "data/test_template.py::test_nothing_in_an_answer_is_taken_for_its_end",
    "end_template_ignores_generation_flag": "data/test_template.py::"
    "test_a_header_that_is_never_asked_for_belongs_to_the_prompt",
    "end_token_not_marked_special": "data/test_template.py::test_an_added_token_that_is_not_special_ends_an_answer_too",
    "file_csv_long_field": "data/test_files.py::test_tables_of_text_have_long_fields_and_line_ends",
    "file_gzip_jsonl": "data/test_files.py::test_compressed_files_are_read_and_a_cut_one_is_reported",
    "file_json_one_object": "data/test_files.py::test_json_holds_rows_under_a_key_or_as_columns",
    "generate_prefilled_answer": "data/test_template.py::test_an_answer_that_the_prompt_begins_goes_on",
    "judge_apology_is_no_refusal": "judges/test_rules.py::test_answers_are_no_refusals",
    "judge_reasoning_block": "judges/test_rules.py::test_refusals_are_found",
    "prompt_doubled_system_only_in_conversation": "data/test_repeats.py::"
    "test_conversations_that_repeat_the_prompt_hold_it_once",
    "prompt_doubled_text": "data/test_repeats.py::test_a_text_that_both_responses_begin_with_is_the_prompt_once",
    "resume_names_the_difference": "test_identity.py::test_an_option_that_differs_is_named_alone",
    "rows_content_parts": "data/test_repeats.py::test_content_in_parts_of_text_is_the_text",
    "rows_null_response_dropped": "scores/test_in_memory.py::test_rows_that_cannot_be_read_obey_the_policy",
    "rows_single_message": "data/test_labels.py::test_turns_of_any_shape_mean_the_same_pair",
    "template_reads_the_clock": "data/test_template.py::test_a_clock_is_refused_until_it_is_pinned",
    "tokenizer_sentencepiece_alone": "data/test_tokenize.py::test_without_the_package_the_message_names_sentencepiece",
    "weights_bool_mask_buffers": "models/test_readings.py::test_it_is_read_as_transformers_reads_it",
    "weights_single_file_and_old_index": "models/test_readings.py::test_the_old_index_beside_a_single_file_is_reported",
    "weights_tied_config_other_head": "models/test_readings.py::test_a_head_that_differs_is_reported_and_stays_apart",
}
"""Case -> a test of its right value on rows, logs or files that are written here; it needs nothing of ``../shared``."""


@pytest.mark.parametrize("case", KINDS)
def test_the_right_value_of_a_case_is_a_test_of_its_own(case: str):
    file, name = KINDS[case].split("::")
    tree = ast.parse((ROOT / "tests" / file).read_text(encoding="utf-8"))
    assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_every_case_is_of_a_kind_that_is_tested(shared: Path):
    assert {path.name for path in (shared / "cases").iterdir() if path.is_dir()} <= set(KINDS)


@pytest.mark.slow
@pytest.mark.parametrize("case", KINDS)
def test_the_check_of_a_case_passes(case: str, shared: Path, tmp_path: Path):
    if not (shared / "cases" / case / "check.sh").is_file():
        pytest.skip(f"needs the case {case} of the reference material in ../shared")
    ches = tmp_path / "ches"
    ches.write_text(f"#!{sys.executable}\nimport sys\n\nfrom ches_jax.__main__ import run\n\nsys.exit(run())\n")
    ches.chmod(0o755)
    env = {**os.environ, "CHES": str(ches), "PY": sys.executable, "SHARED": str(shared), "PYTHONPATH": str(ROOT)}
    checked = subprocess.run(
        ["bash", "check.sh"], cwd=shared / "cases" / case, env=env, capture_output=True, text=True, timeout=1800
    )
    assert checked.returncode == 0, checked.stdout[-2000:] + checked.stderr[-2000:]
