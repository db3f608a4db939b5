"""What a stranger meets first: names that are there, cost nothing until used, and say how they are used."""

import importlib
import inspect
import subprocess
import sys

import pytest

import ches_jax
from ches_jax.cli import main
from ches_jax.cli.commands import COMMANDS
from ches_jax.cli.help import EXAMPLES
from ches_jax.cli.options import ORDER, help_texts, options_of
from ches_jax.cli.suggest import DIFFERENT, SAME, corrected

HEAVY = {"jax", "jaxlib", "flax", "optax", "orbax", "transformers", "datasets", "pyarrow", "matplotlib", "torch"}
PUBLIC = {
    "load_model",
    "load_tokenizer",
    "bundled",
    "score_pairs",
    "pair_statistics",
    "ches",
    "ln_ches",
    "head_score",
    "displacement_summary",
    "get_loss",
    "incentives",
    "score",
    "ScoreConfig",
    "select",
    "SelectConfig",
    "train",
    "TrainConfig",
    "diagnose",
    "DiagnoseConfig",
    "generate",
    "GenerateConfig",
    "judge",
    "JudgeConfig",
    "report",
    "doctor",
    "DoctorConfig",
    "convert",
    "ConvertConfig",
    "verify",
    "ChesError",
    "__version__",
}
VERBS = ("score", "select", "train", "diagnose", "generate", "judge", "report", "doctor", "convert", "verify")


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=300)
    return done.stdout


def loaded_by(code: str) -> set[str]:
    """Packages that a fresh interpreter has loaded after the code."""
    last = python(f"{code}\nimport sys; print(*{{m.split('.')[0] for m in sys.modules}})").splitlines()[-1]
    return set(last.split())


# ---- the package -----------------------------------------------------------------------------------------------------


def test_the_public_surface():
    assert set(ches_jax.__all__) >= PUBLIC and set(ches_jax.__all__) <= set(dir(ches_jax))
    for name in ches_jax.__all__:
        assert getattr(ches_jax, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = ches_jax.nothing  # type: ignore[attr-defined]


def test_importing_the_package_loads_nothing():
    assert not loaded_by("import ches_jax") & (HEAVY | {"numpy", "tyro"})
    configs = ", ".join(sorted(name for name in PUBLIC if name.endswith("Config")))
    assert not loaded_by(f"from ches_jax import {configs}") & HEAVY


@pytest.mark.parametrize("verb", VERBS)
def test_a_verb_is_a_function_whatever_was_imported_before(verb):
    """Names of verbs are names of packages too."""
    module = {"score": "scores", "judge": "judges", "diagnose": "displacement"}.get(verb, verb)
    if module == verb or verb == "diagnose":
        inner = importlib.import_module(f"ches_jax.{module}")
        assert callable(getattr(inner, verb))
    function = getattr(ches_jax, verb)
    assert callable(function)
    assert inspect.signature(function).parameters


def test_train_is_a_package_and_a_verb_in_any_order():
    """Each order as in a new interpreter: the modules of before are forgotten, but not those of other packages."""
    code = """import sys
for first in "import ches_jax as cj; cj.train", "import ches_jax.train.loop", "from ches_jax.train import TrainConfig":
    for name in [name for name in sys.modules if name.partition(".")[0] == "ches_jax"]:
        del sys.modules[name]
    exec(first)
    import ches_jax
    from ches_jax.train import train
    from ches_jax import train as verb
    from ches_jax.errors import ChesError
    for call in (train, verb, ches_jax.train):
        try:
            call(ches_jax.TrainConfig(dtype="int8", out="nowhere"))
        except ChesError as error:
            print(error)
"""
    assert python(code).count("--dtype 'int8'") == 9


@pytest.mark.parametrize(
    "line",
    [
        "from ches_jax import score",
        "from ches_jax.models import load_model",
        "from ches_jax.scores import ches",
        "from ches_jax.train import train",
    ],
)
def test_the_imports_that_everyone_tries(line):
    names: dict[str, object] = {}
    exec(line, names)
    assert callable(names[line.rpartition(" ")[2]])


# ---- the command -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words",
    [["--help"], [], ["--version"], ["train", "--help"], ["select", "--help"], ["scrore"], ["score", "--modle"]],
)
def test_help_and_usage_errors_load_no_jax(words):
    code = f"from ches_jax.cli import main; main({words!r})"
    assert not loaded_by(code) & HEAVY


def run(capsys, *words):
    code = main([*words])
    out, err = capsys.readouterr()
    return code, out, err


def test_help_loads_little():
    """What help costs is what it imports: about 100 modules beyond tyro and numpy, half of them ours."""
    count = "import sys; print(len(sys.modules))"
    peer = int(python(f"import tyro, numpy; {count}"))
    ours = int(python(f"from ches_jax.cli import main; main(['train', '--help']); {count}").splitlines()[-1])
    assert ours < peer + 150


def test_bare_ches_is_help_with_every_verb(capsys):
    bare, help_text = run(capsys), run(capsys, "--help")
    assert bare == help_text and bare[0] == 0 and not bare[2]
    assert all(f"  {verb} " in bare[1] for verb in COMMANDS)
    assert run(capsys, "--version")[1].startswith(f"ches-jax {ches_jax.__version__}")
    assert run(capsys, "help", "score") == run(capsys, "score", "--help")


@pytest.mark.parametrize("verb", COMMANDS)
def test_help_of_a_verb_has_groups_texts_and_examples(capsys, verb):
    code, out, err = run(capsys, verb, "--help")
    assert (code, err) == (0, "") and "\033" not in out
    options, texts = options_of(verb, COMMANDS[verb]), help_texts(COMMANDS[verb])
    for option in options:
        assert texts[option.field], option.name
        assert option.group in out.splitlines() and option.group in ORDER
        assert option.positional or any(f in out for f in option.flags)
    assert len(EXAMPLES[verb]) in (2, 3) and all(f"  {example}\n" in f"{out}\n" for example in EXAMPLES[verb])


@pytest.mark.parametrize("verb", COMMANDS)
def test_the_examples_of_help_parse(verb):
    import shlex

    import tyro

    for example in EXAMPLES[verb]:
        words = shlex.split(example)[2:]
        assert tyro.cli(COMMANDS[verb], args=corrected(verb, COMMANDS[verb], words))


def test_colour_is_for_terminals_that_want_it(capsys, monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert "\033[1m" in run(capsys, "--help")[1]
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\033" not in run(capsys, "--help")[1]


MISTYPED = {
    ("scrore",): "no verb is named 'scrore'; did you mean score",
    ("--pairs", "x"): "options come after the verb",
    ("score", "--modle", "x"): "no option --modle; did you mean --model",
    ("score", "--by", "chess"): "--by 'chess': expected one of ches, head_score; did you mean ches",
    ("score", "--limit", "ten"): "--limit 'ten': expected a whole number",
    ("score", "--limit"): "--limit takes a value",
    ("score", "pairs.jsonl"): "'pairs.jsonl' belongs to no option; did you mean --pairs pairs.jsonl?",
    ("select", "runs/s"): "did you mean --scores runs/s?",
    ("diagnose", "log", "--tasks", "x"): "ches diagnose: no option --tasks; ches diagnose --help names all",
    ("verify", "--limit", "4", "F1"): "did you mean --claims F1?",
    ("diagnose", "base", "trained"): "takes one path, and 'base' and 'trained' are two",
    ("score", "--dtype", "bf16"): "did you mean bfloat16",
    ("score", "--batch-size", "8"): "--batch-tokens",
    ("select", "--out", "x"): "--scores must be given",
    ("train", "--beta", "0.1"): "--loss 'dpo(beta=0.1)', or given as --loss-args beta=0.1",
    ("train", "--per_device_train_batch_size", "4"): "--batch-size N",
    ("train", "--loss", "ipo"): "ipo_mean",
    ("train", "--lr", "fast"): "--lr 'fast': expected a number",
    ("train", "--loss", "dpo", "--loss=simpo"): "--loss dpo and simpo are both given: write the option once",
    ("score", "--model", "a", "--model_name_or_path", "b"): "--model a and b are both given",
    ("score", "--columns", "chosen=a", "--columns", "rejected=b"): "once, all its values after it",
    ("train", "--remat", "--no-remat"): "--remat and --no-remat are both given",
}


@pytest.mark.parametrize("words", MISTYPED, ids=" ".join)
def test_a_mistake_is_answered_with_the_right_word(capsys, words):
    code, out, err = run(capsys, *words)
    assert (code, out) == (2, "") and MISTYPED[words] in err and len(err.splitlines()) == 1


def test_names_of_other_trainers_work():
    words = ["--model_name_or_path", "m", "--dataset-name=d", "--output_dir", "o", "--learning-rate", "1e-5"]
    words += ["--num_train_epochs", "2", "--gradient-checkpointing"]
    ours = ["--model", "m", "--pairs=d", "--out", "o", "--lr", "1e-5", "--epochs", "2", "--remat"]
    assert corrected("train", COMMANDS["train"], words) == ours
    assert corrected("generate", COMMANDS["generate"], ["--dataset-name", "d"]) == ["--prompts", "d"]
    models = ["--base-model", "b", "--trained", "t", "--eval-dataset", "e"]
    assert corrected("diagnose", COMMANDS["diagnose"], models) == ["--before", "b", "--after", "t", "--pairs", "e"]


def test_claims_may_stand_first_without_the_name_of_their_option():
    words = ["--claims", "t4", "T5", "--out", "v"]
    assert corrected("verify", COMMANDS["verify"], words[1:]) == corrected("verify", COMMANDS["verify"], words) == words


def test_an_option_may_be_given_again_where_nothing_changes():
    for words in (["--pairs", "d", "--pairs=d"], ["--quiet", "--quiet"], ["--columns", "chosen=a", "rejected=b"]):
        assert corrected("score", COMMANDS["score"], words) == words
    trackers = ["--model", "m", "--pairs", "d", "--out", "o", "--tracker", "wandb", "--tracker", "tensorboard"]
    assert corrected("train", COMMANDS["train"], trackers) == trackers


@pytest.mark.parametrize("words", [["--trl-log", "x"], ["--run", "x"], ["--run=x"], ["--logging_dir", "x"]])
def test_a_name_that_is_gone_is_answered_with_the_new_spelling(words, capsys):
    assert corrected("diagnose", COMMANDS["diagnose"], [*words, "--beta", "0.1"]) == ["x", "--beta", "0.1"]
    assert "ches diagnose PATH" in capsys.readouterr().err


def test_every_name_of_other_trainers_leads_to_an_option():
    every = [o for verb, command in COMMANDS.items() for o in options_of(verb, command)]
    names = {option.name for option in every if not option.positional}
    assert {ours for targets in SAME.values() for ours in targets.split()} <= names
    assert not SAME.keys() & DIFFERENT.keys() and not SAME.keys() & names
