"""What each file of tests costs, printed at the end of a run with ``--timings``: CPU seconds, and programs compiled.

Processor time, not the clock: it is nearly the same on a busy machine. Processes that a test started and waited for are
counted to it, and so is a fixture to the test that used it first. A program counts when jax requests it, compiled
or found in the cache: many in one test are arrays handled one operation at a time, outside ``jax.jit``.
"""

import json
import os
import resource
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import pytest

PROGRAM = "/jax/core/compile/backend_compile_duration"


def cpu_seconds() -> float:
    """Of this process and of the children it has waited for."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in used)


class Timings:
    """In a worker: measures the phases of each test. In the process that reports: adds them up."""

    def __init__(self, config: Any, path: str) -> None:
        self.config, self.path = config, path
        self.asked = 0
        self.phase = (0.0, 0)
        self.seconds: dict[str, float] = defaultdict(float)
        self.programs: Counter[str] = Counter()
        self.imports: dict[str, float] = {}
        jax.monitoring.register_event_duration_secs_listener(self._count)

    def _count(self, event: str, duration_secs: float, **_: Any) -> None:
        self.asked += event == PROGRAM

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        self.phase = cpu_seconds(), self.asked
        return (yield)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item) -> Iterator[None]:
        report: Any = yield
        seconds, programs = self.phase
        self.phase = cpu_seconds(), self.asked
        report.cost = self.phase[0] - seconds, self.phase[1] - programs
        return report

    def pytest_collection_finish(self) -> None:
        self.imports[os.environ.get("PYTEST_XDIST_WORKER", "main")] = cpu_seconds()

    def pytest_sessionfinish(self) -> None:
        if hasattr(self.config, "workeroutput"):
            self.config.workeroutput["imports"] = dict(self.imports)

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any) -> None:
        self.imports.update(getattr(node, "workeroutput", {}).get("imports", {}))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        seconds, programs = getattr(report, "cost", (0.0, 0))
        self.seconds[report.nodeid] += seconds
        self.programs[report.nodeid] += programs

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        seconds: dict[str, float] = defaultdict(float)
        programs: Counter[str] = Counter()
        for test, spent in self.seconds.items():
            file = test.partition("::")[0]
            seconds[file] += spent
            programs[file] += self.programs[test]
        imports, write = sum(self.imports.values()), terminalreporter.write_line
        terminalreporter.section("CPU seconds, programs")
        for file in sorted(seconds, key=lambda f: -seconds[f]):
            write(f"{seconds[file]:8.1f} {programs[file]:6d}  {file}")
        write(f"{imports:8.1f}         imports and collection of {len(self.imports)} processes")
        write(f"{sum(seconds.values()) + imports:8.1f} {programs.total():6d}  together")
        if self.path != "-":
            found = {"imports": self.imports, "tests": self.seconds, "programs": self.programs}
            Path(self.path).write_text(json.dumps(found, indent=1))
