"""The files of a run without its model: config, chunks with dropped rows, end, join, summary; killed everywhere.

python -m tests.crash.small_run FOLDER
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path

from ches_jax.runs import chunks
from ches_jax.runs.directory import RUN, open_run, write_summary
from ches_jax.runs.lock import RunLock
from tests.crash.enumerate_kills import enumerated


def small_run(resume: bool) -> Callable[[], int]:
    """Three chunks, as ``ches generate`` and ``ches judge`` write them."""

    def act() -> int:
        out = Path("out")
        with RunLock(out) as lock:
            lock.take()
            open_run(out, "judge", {"config": {}}, resume)
            if not (out / RUN).exists():
                (out / chunks.FOLDER).mkdir(exist_ok=True)
                for number in sorted({0, 1, 2} - set(map(int, chunks.done(out)))):
                    chunks.write(out, number, [{"n": number}], [{"row": number}] * (number % 2))
                chunks.end_of_data(out, 3, range(3), lambda: None)
                chunks.join(out, "rows.jsonl")
                write_summary(out, {"rows": 3})
            chunks.clear(out)
        return 0

    return act


if __name__ == "__main__":
    start = Path(sys.argv[1]) / "start"
    start.mkdir()
    operations, problems = enumerated(start, small_run(False), small_run(True))
    print(json.dumps({"operations": operations, "problems": problems}))
