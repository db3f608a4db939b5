"""The command starts itself again once, as the same process with the same words."""

import array
import gc
import io
import json
import os
import subprocess
import sys
import warnings

import pytest

from ches_jax import __main__ as command
from ches_jax import hugepages

SCRIPT = (
    "import json, os, sys; before = os.environ.get('GLIBC_TUNABLES'); "
    "from ches_jax.hugepages import with_large_pages; with_large_pages(); "
    "print(json.dumps([os.getpid(), before, sys.argv[1:]]))"
)


@pytest.mark.skipif(sys.platform != "linux", reason="large pages are requested through the C library of Linux")
@pytest.mark.parametrize("tunables", ["", "glibc.malloc.tcache_count=3", "glibc.malloc.hugetlb=0"])
def test_one_process_from_beginning_to_end(tunables):
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, "a b", "--c"],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "GLIBC_TUNABLES": tunables},
    )
    (line,) = process.communicate()[0].splitlines()
    pid, setting, words = json.loads(line)
    assert process.returncode == 0 and pid == process.pid and words == ["a b", "--c"]
    kept = tunables if "hugetlb" in tunables else ":".join(filter(None, (tunables, "glibc.malloc.hugetlb=1")))
    assert setting == kept


def test_a_setting_that_is_lost_on_the_way_does_not_start_it_again_and_again():
    lost = SCRIPT.replace("from ches_jax", "os.environ.pop('GLIBC_TUNABLES', None); from ches_jax", 1)
    done = subprocess.run([sys.executable, "-c", lost], capture_output=True, text=True, timeout=300, check=True)
    assert len(done.stdout.splitlines()) == 1


def test_what_the_command_starts_does_not_get_the_setting():
    shown = SCRIPT.replace("sys.argv[1:]", "os.environ.get('GLIBC_TUNABLES')")
    done = subprocess.run([sys.executable, "-c", shown], capture_output=True, text=True, timeout=300, check=True)
    assert "hugetlb" not in (json.loads(done.stdout)[2] or "")


@pytest.mark.parametrize(("secure", "words", "may"), [(0, [], True), (1, [], False), (0, ["-"], False)])
def test_a_program_with_more_rights_than_its_user_and_a_script_from_a_pipe_stay_as_they_are(
    monkeypatch, tmp_path, secure, words, may
):
    vector = array.array("L", [3, 7, 23, secure, 0, 0]).tobytes()
    monkeypatch.setattr("builtins.open", lambda *args, **options: io.BytesIO(vector))
    monkeypatch.setattr(sys, "orig_argv", ["python", *words])
    assert hugepages._may_restart() is may


def test_python_searches_for_garbage_seldom_and_not_at_the_end(monkeypatch, capsys):
    said = []
    monkeypatch.setattr(gc, "set_threshold", said.append)
    monkeypatch.setattr(gc, "freeze", lambda: said.append("freeze"))
    monkeypatch.setattr(command, "with_large_pages", lambda: said.append("pages"))
    monkeypatch.setattr(sys, "argv", ["ches", "--version"])
    with warnings.catch_warnings():
        assert command.run() == 0
    assert said == ["pages", command.MORE_OBJECTS, "freeze"] and "ches-jax" in capsys.readouterr().out
