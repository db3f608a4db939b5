"""The command starts itself again once, as the same process with the same words."""

import json
import os
import subprocess
import sys

import pytest

SCRIPT = (
    "import json, os, sys; before = os.environ.get('GLIBC_TUNABLES'); "
    "from ches_jax.hugepages import with_large_pages; with_large_pages(); "
    "print(json.dumps([os.getpid(), before, sys.argv[1:]]))"
)


@pytest.mark.skipif(sys.platform != "linux", reason="large pages are asked for through the C library of Linux")
@pytest.mark.parametrize("told", ["", "glibc.malloc.tcache_count=3", "glibc.malloc.hugetlb=0"])
def test_one_process_from_beginning_to_end(told):
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, "a b", "--c"],
        stdout=subprocess.PIPE, text=True, env={**os.environ, "GLIBC_TUNABLES": told},
    )  # fmt: skip
    (line,) = process.communicate()[0].splitlines()
    pid, setting, words = json.loads(line)
    assert process.returncode == 0 and pid == process.pid and words == ["a b", "--c"]
    kept = told if "hugetlb" in told else ":".join(filter(None, (told, "glibc.malloc.hugetlb=1")))
    assert setting == kept
