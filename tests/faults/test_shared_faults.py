"""Faults provoked on the command from outside, one script a fault: each exits 0 where the command behaves right.

The scripts lie in ``../shared/faults``. What the same kinds of fault do elsewhere is tested in the files of ``KINDS``.
"""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import SHARED

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted((SHARED / "faults").glob("*.sh"))
CARRIED_OVER = {
    "damaged_arrow_crashes": "tests/data/test_files.py::test_damaged_tables_are_read_or_reported_in_words",
    "rendezvous_stranger": "tests/test_rendezvous.py::test_a_stranger_does_not_hold_process_0_beyond_its_deadline",
}
"""Scripts that import modules by names of before, and the test that does the same."""

KINDS = {
    "a whole is known to be whole": [
        "tests/runs/test_chunks.py::test_a_run_that_lost_its_tail_is_not_joined",
        "tests/runs/test_chunks.py::test_a_chunk_that_is_not_as_it_was_written_is_reported_and_computed_again",
        "tests/runs/test_chunks.py::test_a_part_of_another_run_is_named",
        "tests/runs/test_chunks.py::test_chunks_computed_from_data_that_changed_are_not_done",
        "tests/scores/test_run.py::test_two_processes_take_turns_and_merge_into_the_same_bytes",
        "tests/forecast/test_stages.py::test_a_part_that_is_damaged_is_written_again_and_one_that_is_whole_is_not",
        "tests/label/test_label.py::test_a_file_that_changes_while_it_is_read_makes_no_labels",
        "tests/scores/test_table.py::test_until_a_run_has_its_summary_its_table_is_made_again",
        "tests/train/test_checkpoints.py::test_what_a_stopped_run_has_exported_is_exported_again",
        "tests/forecast/test_stages.py::test_a_digit_of_what_is_known_of_a_direction_does_not_flip_unseen",
    ],
    "the identity of a run is all that it opened": [
        "tests/test_identity.py::test_any_file_that_a_run_opened_is_named_when_it_is_another_one_now",
        "tests/test_identity.py::test_a_file_that_was_not_there_counts_too",
        "tests/test_identity.py::test_other_versions_are_reported_before_any_work_and_can_be_accepted",
        "tests/train/test_reference.py::test_a_cache_of_another_identity_names_the_differences",
    ],
    "every error leaves by one door": [
        "tests/test_one_door.py::test_what_the_user_can_mend_is_one_message",
        "tests/test_one_door.py::test_a_mistake_of_ours_is_two_lines_and_a_file",
        "tests/runs/test_files.py::test_json_that_is_none",
        "tests/runs/test_files.py::test_damaged_parquet_is_one_message",
        "tests/data/test_files.py::test_what_is_no_data_is_an_error_in_words",
        "tests/train/test_bad_input.py::test_a_disk_that_is_full_leaves_the_last_checkpoint_whole",
        "tests/train/test_checkpoints.py::test_a_damaged_checkpoint_is_told_in_words_where_it_is_converted",
        "tests/runs/test_chunks.py::test_a_stranger_among_the_records_is_no_chunk",
        "tests/test_recipe.py::test_a_damaged_record_of_stages_is_told",
    ],
    "one writer at a time, and nothing of the dead stays": [
        "tests/runs/test_lock.py::test_the_second_is_told_who_the_first_is_and_a_dead_one_holds_nothing",
        "tests/runs/test_lock.py::test_half_written_files_of_the_dead_go_and_those_of_the_living_stay",
        "tests/runs/test_lock.py::test_two_writers_of_one_directory_end_in_words",
        "tests/runs/test_lock.py::test_temporary_names_are_never_the_same_twice",
        "tests/runs/test_lock.py::test_a_lock_that_is_a_link_or_a_pipe_empties_nothing_and_holds_nobody",
        "tests/forecast/test_stages.py::test_two_at_once_are_not_let_in",
    ],
    "what a stranger's file may cost is bounded": [
        "tests/models/test_readings.py::test_sizes_beyond_all_models_are_refused_at_once",
        "tests/models/test_lora.py::test_a_pattern_that_would_take_for_ever_is_refused",
        "tests/data/test_time_limit.py::test_a_template_that_costs_too_much_is_refused",
        "tests/runs/test_files.py::test_json_of_any_size_is_not_read_into_memory",
        "tests/test_pipes.py::test_of_a_command",
        "tests/test_pipes.py::test_of_a_directory",
        "tests/test_rendezvous.py::test_a_stranger_at_the_port_changes_nothing",
        "tests/displacement/test_log_variants.py::test_a_log_that_is_larger_than_any_is_not_read_into_memory",
        "tests/runs/test_chunks.py::test_a_number_of_chunks_that_nobody_has_is_told_without_counting_to_it",
    ],
    "a row of data does not decide how it is read": [
        "tests/data/test_template.py::test_a_row_sets_variables_of_the_template_and_nothing_else",
        "tests/data/test_template.py::test_variables_reach_the_template_and_those_it_does_not_read_do_nothing",
        "tests/data/test_template.py::test_arguments_that_nothing_reads_are_refused",
    ],
    "a terminal shows text and obeys none": [
        "tests/test_one_door.py::test_text_of_files_reaches_the_terminal_escaped_and_json_as_json",
        "tests/test_one_door.py::test_letters_of_all_scripts_stay",
        "tests/report/test_page.py::test_markup_in_the_data_stays_text",
    ],
    "what cannot be written is refused before the work": [
        "tests/data/test_files.py::test_other_columns_can_always_be_written_again",
        "tests/runs/test_json_text.py::test_whatever_a_row_holds_is_a_line_of_json",
        "tests/select/test_select.py::test_odd_contents_become_json",
    ],
    "who survives ends in words": [
        "tests/test_supervise.py::test_how_a_child_ended_is_reported_by_its_parent",
        "tests/test_supervise.py::test_a_child_does_not_outlive_its_parent",
        "tests/train/test_processes.py::test_a_process_that_dies_makes_the_other_exit_within_a_minute",
        "tests/scores/test_run.py::test_one_of_two_processes_that_is_killed_takes_the_other_not_with_it",
    ],
    "the restart in large pages ends": [
        "tests/test_hugepages.py::test_a_setting_that_is_lost_on_the_way_does_not_start_it_again_and_again",
        "tests/test_hugepages.py::test_what_the_command_starts_does_not_get_the_setting",
        "tests/test_hugepages.py::test_a_program_with_more_rights_than_its_user_and_a_script_from_a_pipe_stay_as_they_are",
    ],
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_of_fault_has_three_tests_beside_its_script(kind):
    assert len(KINDS[kind]) >= 3
    for name in [*KINDS[kind], *CARRIED_OVER.values()]:
        file, _, function = name.partition("::")
        tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
        assert function in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, name


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_a_fault_is_reported_or_mended(script, shared, tmp_path):
    if script.stem in CARRIED_OVER:
        pytest.skip(f"imports modules by names of before; carried over: {CARRIED_OVER[script.stem]}")
    command = tmp_path / "ches"
    # the scripts take the interpreter from the first line
    command.write_text(f"#!{sys.executable}\nimport sys\nfrom ches_jax.__main__ import run\nsys.exit(run())\n")
    command.chmod(0o755)
    plain = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}  # of the tests: eight devices
    env = {**plain, "CHES": str(command), "SHARED": str(shared), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(["bash", str(script)], env=env, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
