"""The files of ``examples/launch`` with fake launchers: what reaches the hosts are commands of today."""

import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from ches_jax.cli import _parsed
from ches_jax.cli.commands import COMMANDS

FOLDER = Path(__file__).parents[1] / "examples" / "launch"
STAND_INS = ("gcloud", "xpk", "srun", "ches")
SETTINGS = {
    "ZONE": "z", "BUCKET": "gs://pod", "CLUSTER": "c", "IMAGE": "i", "MODEL": "gs://pod/m", "PAIRS": "gs://pod/p.jsonl",
    "OUT": "gs://pod/out", "SLURM_JOB_NODELIST": "n[0-1]", "SLURM_NNODES": "2", "SLURM_NODEID": "0",
    "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2", "SKYPILOT_NUM_NODES": "2", "SKYPILOT_NODE_RANK": "1",
}  # fmt: skip


def typed(script: str, folder: Path, *words: str) -> list[list[str]]:
    """The words of the ``ches`` commands that a script of bash would have run."""
    log = folder / "log"
    for name in STAND_INS:
        (folder / name).write_text(f'#!/bin/bash\necho {name} "$@" >> {log}\n')
    (folder / "scontrol").write_text("#!/bin/bash\necho n0\necho n1\n")
    for file in folder.iterdir():
        file.chmod(0o755)
    environment = {**os.environ, **SETTINGS, "PATH": f"{folder}:{os.environ['PATH']}"}
    subprocess.run(["bash", "-c", script, "bash", *words], env=environment, check=True, capture_output=True)
    found = re.findall(r"\bches ((?:score|merge) [^\n]*)", log.read_text())
    return [shlex.split(line.replace("\\", "")) for line in found]


def options(words: list[str]) -> dict:
    """A command as the command line reads it, without the parts that a host fills in."""
    words = [re.sub(r"\$SLURM_NNODES,\$SLURM_NODEID", "2,0", word) for word in words]
    return vars(_parsed(words[0], COMMANDS[words[0]], words[1:]))


@pytest.mark.parametrize(
    ("name", "words", "distributed"),
    [
        ("gcloud.sh", ("run",), "auto"),
        ("gcloud.sh", ("resume",), "auto"),
        ("xpk.sh", (), "auto"),
        ("slurm.sbatch", (), "n0:8476,2,0"),
        ("skypilot.yaml", (), "10.0.0.1:8476,2,1"),
    ],
)
def test_every_launcher_starts_a_run_that_can_be_started_again(tmp_path, name, words, distributed):
    script = (FOLDER / name).read_text(encoding="utf-8")
    if name.endswith(".yaml"):
        script = re.sub(r"^  ", "", script.partition("run: |\n")[2], flags=re.MULTILINE)
    commands = typed(script, tmp_path, *words)
    read = options(commands[0])
    assert read["resume"] and read["distributed"] == distributed and read["out"].startswith("gs://pod/")
    assert commands[1:] == ([["merge", "gs://pod/out"]] if name == "slurm.sbatch" else [])


def test_the_file_for_ray_compiles():
    compile((FOLDER / "ray_job.py").read_text(encoding="utf-8"), "ray_job.py", "exec")
