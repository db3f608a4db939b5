"""The card of a model: what it says it came from is what it came from, and its numbers are those of its own step."""

from ches_jax.runs.model_card import CARD, converted_card, trained_card, write_card

RUN = {
    "config": {"model": "models/my base", "pairs": "pairs.jsonl", "lr": 1e-6, "batch_size": 4, "seed": 0},
    "loss": "dpo(beta=0.1)",
    "optimizer": {"name": "rmsprop", "alpha": 0.99},
    "reference": "initial",
    "model_fingerprint": "abc",
    "counts": {"updates": 20, "train": 8, "held_out": 4},
    "versions": {"jax": "0.10.2"},
}


def test_numbers_stand_at_the_pairs_they_are_of():
    numbers = {
        "displacement/dlogp_chosen": 1.5,
        "eval_displacement/dlogp_chosen": -2.5,
        "eval_displacement/margin": 0.25,
        "eval_displacement/lld_rate": 0.75,
    }
    text = trained_card(RUN, 10, numbers)
    assert "| held-out pairs | -2.500 |  | +0.250 | 75% |" in text
    assert "| watched training pairs | +1.500 |  |  |  |" in text
    assert "| updates | 10 of 20 |" in text
    assert "| optimizer | name rmsprop, alpha 0.99 |" in text and "| versions | jax 0.10.2 |" in text


def test_the_head_says_what_it_is_and_what_loads_it():
    whole, adapter = trained_card(RUN, 10, {}), trained_card(RUN, 10, {}, "peft")
    assert "# models/my base, trained\n" in whole and whole.startswith("---\nlibrary_name: transformers\n")
    assert adapter == whole.replace("library_name: transformers", "library_name: peft")
    assert "# base, converted\n" in converted_card("/somewhere/base", None, None)


def test_a_step_without_numbers_says_so_and_how_to_get_them():
    assert "Not measured at this step" in trained_card(RUN, 10, {})


def test_no_path_of_the_machine_is_in_a_card():
    assert "models/" not in trained_card({**RUN, "config": {**RUN["config"], "model": "/home/me/models/base"}}, 1, {})
    assert "/home" not in converted_card("/home/me/models/base", "/home/me/adapter", None)


def test_a_hub_name_is_the_base_model_of_the_card():
    assert "base_model: owner/name\n" in converted_card("owner/name", None, "bfloat16")
    assert "base_model" not in converted_card("bundled", None, None)


def test_a_card_that_is_there_is_left_alone(tmp_path):
    (tmp_path / CARD).write_text("mine")
    write_card(tmp_path, "other")
    assert (tmp_path / CARD).read_text() == "mine"
