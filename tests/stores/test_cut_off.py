"""Two hosts on this machine, each a network namespace, whose link is cut in the middle of a training; slow.

Whoever runs the tests must be allowed to make namespaces.
"""

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers import finish
from tests.stores.commands import ches, wait_for, without_devices
from tests.train.test_processes import lines, same_to_rounding

pytestmark = pytest.mark.slow
TRAIN = (
    "train", "--quiet", "--limit", "12", "--holdout", "4", "--batch-size", "4", "--optimizer", "sgd", "--lr", "1e-2",
    "--mesh", "data=2,fsdp=2", "--steps", "40", "--eval-every", "20", "--save-every", "4",
)  # fmt: skip
ADDRESSES = ("10.77.0.1", "10.77.0.2")
MINUTE = 60.0


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


class Hosts:
    """Two namespaces and the link between them."""

    def __init__(self):
        self.names = [f"ches-{os.getpid()}-{i}" for i in range(2)]

    def link(self, state: str) -> None:
        """``up`` or ``down``."""
        ip("-n", self.names[0], "link", "set", "link0", state)

    def start(self, *words: str) -> list[subprocess.Popen[str]]:
        """A verb with a process on each host."""
        environment = {**without_devices(), "JAX_NUM_CPU_DEVICES": "2"}
        return [
            subprocess.Popen(
                ["ip", "netns", "exec", name, sys.executable, "-m", "ches_jax", *words,
                 "--distributed", f"{ADDRESSES[0]}:7777,2,{i}"],
                text=True, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, env=environment,
            )
            for i, name in enumerate(self.names)
        ]  # fmt: skip


@pytest.fixture
def hosts() -> Iterator[Hosts]:
    found = Hosts()
    own = [Path("/etc/netns", name) for name in found.names]
    try:
        try:
            for name, address, folder in zip(found.names, ADDRESSES, own, strict=True):
                ip("netns", "add", name)
                ip("-n", name, "link", "set", "lo", "up")
                folder.mkdir(parents=True)  # what "ip netns exec" shows as /etc/hosts: where others find this host
                (folder / "hosts").write_text(f"127.0.0.1 localhost\n{address} {socket.gethostname()}\n")
            one, other = found.names
            ip("-n", one, "link", "add", "link0", "type", "veth", "peer", "name", "link1", "netns", other)
            for i, (name, address) in enumerate(zip(found.names, ADDRESSES, strict=True)):
                ip("-n", name, "addr", "add", f"{address}/24", "dev", f"link{i}")
                ip("-n", name, "link", "set", f"link{i}", "up")
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"needs iproute2 and the right to make network namespaces ({error})")
        yield found
    finally:
        for name, folder in zip(found.names, own, strict=True):
            subprocess.run(["ip", "netns", "del", name], capture_output=True)
            shutil.rmtree(folder, ignore_errors=True)


def test_a_cut_link_ends_both_and_they_go_on_when_it_is_mended(hosts, tiny_model, tmp_path):
    whole, out = tmp_path / "whole", tmp_path / "run"
    devices = {**without_devices(), "JAX_NUM_CPU_DEVICES": "4"}
    ches(*TRAIN, "--model", str(tiny_model), "--out", str(whole), environment=devices)
    words = (*TRAIN, "--model", str(tiny_model), "--out", str(out))
    processes = hosts.start(*words)
    wait_for(out / "checkpoints" / "4" / "_CHECKPOINT_METADATA", *processes)
    hosts.link("down")
    cut = time.monotonic()
    codes, said = finish(processes, MINUTE)
    print(f"\nboth ended {time.monotonic() - cut:.0f} s after the link was cut")
    assert codes == [2, 2], said
    assert all(text.startswith("ches: ") and text.strip().count("\n") == 0 for text in said), said
    assert not (out / "run.json").exists()
    hosts.link("up")
    codes, said = finish(hosts.start(*words, "--resume"), 600)
    assert codes == [0, 0], said
    assert [e["step"] for e in lines(out)] == [e["step"] for e in lines(whole)], "nothing twice, nothing lost"
    same_to_rounding(out, whole)
