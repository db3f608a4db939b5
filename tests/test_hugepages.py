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
@pytest.mark.parametrize("tunables", ["", "glibc.malloc.tcache_count=3", "glibc.malloc.hugetlb=0"])
def test_one_process_from_beginning_to_end(tunables):
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, "a b", "--c"],
        stdout=subprocess.PIPE, text=True, env={**os.environ, "GLIBC_TUNABLES": tunables},
    )  # fmt: skip
    (line,) = process.communicate()[0].splitlines()
    pid, setting, words = json.loads(line)
    assert process.returncode == 0 and pid == process.pid and words == ["a b", "--c"]
    kept = tunables if "hugetlb" in tunables else ":".join(filter(None, (tunables, "glibc.malloc.hugetlb=1")))
    assert setting == kept
