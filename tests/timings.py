"""CPU seconds of each file of tests, told at the end of a run with ``--timings``.

Processor time, not the clock: it is the same on a busy machine. Processes that a test started and waited for are counted
to it, and so is a fixture to the test that asked for it first. What a worker spends before its first test (imports and
collection) is told on a line of its own.
"""

import json
import os
import resource
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest


def cpu_seconds() -> float:
    """Of this process and of the children it has waited for."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in used)


class Timings:
    """In a worker: measures the phases of each test. In the process that reports: adds them up."""

    def __init__(self, config: pytest.Config, path: str) -> None:
        self.config, self.path = config, path
        self.phase = 0.0
        self.tests: Counter[str] = Counter()
        self.before: Counter[str] = Counter()

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        self.phase = cpu_seconds()
        return (yield)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item) -> Iterator[None]:
        report = yield
        now = cpu_seconds()
        report.cpu_seconds, self.phase = now - self.phase, now
        return report

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self.before[os.environ.get("PYTEST_XDIST_WORKER", "main")] = cpu_seconds()

    def pytest_sessionfinish(self) -> None:
        if hasattr(self.config, "workeroutput"):
            self.config.workeroutput["cpu_before"] = dict(self.before)

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node) -> None:
        self.before.update(node.workeroutput.get("cpu_before", {}))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.tests[report.nodeid] += getattr(report, "cpu_seconds", 0.0)

    def pytest_terminal_summary(self, terminalreporter) -> None:
        files: Counter[str] = Counter()
        for nodeid, seconds in self.tests.items():
            files[nodeid.partition("::")[0]] += seconds
        write = terminalreporter.write_line
        terminalreporter.section("CPU seconds")
        for file, seconds in files.most_common():
            write(f"{seconds:8.1f}  {file}")
        write(f"{sum(self.before.values()):8.1f}  imports and collection of {len(self.before)} process(es)")
        write(f"{sum(files.values()) + sum(self.before.values()):8.1f}  together")
        if self.path != "-":
            Path(self.path).write_text(json.dumps({"before": self.before, "tests": self.tests}, indent=1))
