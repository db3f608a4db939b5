"""Ray: one task a host, each of which holds the host's chips; `python ray_job.py HOSTS -- score --out gs://... ...`.

Of score, generate and judge whose processes took chunks in turn, `ches merge OUT` on any machine then makes one run.
"""

import socket
import subprocess
import sys

import ray

PORT = 8476


@ray.remote(max_retries=0)
class Host:
    """One host of the slice."""

    def address(self) -> str:
        """Where the others find it."""
        return socket.gethostbyname(socket.gethostname())

    def ches(self, words: list[str], first: str, count: int, number: int) -> int:
        """Run the command; the exit code."""
        where = f"{first}:{PORT},{count},{number}"
        return subprocess.call(["ches", *words, "--distributed", where])


def main() -> int:
    """Start every host's process and wait for all."""
    count, words = int(sys.argv[1]), sys.argv[3:]
    ray.init(address="auto")
    hosts = [Host.options(resources={"TPU": 4}).remote() for _ in range(count)]
    first = ray.get(hosts[0].address.remote())
    codes = ray.get([host.ches.remote(words, first, count, i) for i, host in enumerate(hosts)])
    return max(codes)


if __name__ == "__main__":
    sys.exit(main())
