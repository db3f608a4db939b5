"""Templates that cost too much: an error in words within seconds, in whatever thread they are written."""

import threading
import time

import pytest

from ches_jax.data import template as templates
from ches_jax.data import time_limit as limits
from ches_jax.data.template import ChatTemplate
from ches_jax.data.time_limit import TooLong, time_limit
from ches_jax.data.tokenize import load_tokenizer
from ches_jax.errors import DataError

TALK = [{"role": "user", "content": "a"}]
COSTLY = {
    "loops in loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "a macro that calls itself": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "a macro that doubles": "{% macro m(n) %}{% if n %}{{ m(n-1) }}{{ m(n-1) }}{% endif %}{% endmacro %}{{ m(60) }}",
    "too much text": "{% for i in range(99999) %}aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa{% endfor %}",
    "no such memory": "{{ 'a' * 10**15 }}",
    "nothing to divide by": "{{ 1 / 0 }}",
    "too large a power": "{{ 10.0 ** 400 }}",
}


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(templates, "SECONDS", 0.2)
    monkeypatch.setattr(templates, "LETTERS", 1_000_000)
    monkeypatch.setattr(limits, "_PAUSE", 0.05)


# An end that comes while garbage is collected is swallowed there, which Python tells, and comes again.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("what", COSTLY)
def test_a_template_that_costs_too_much_is_refused(impatient, what):
    tokenizer = load_tokenizer("bundled")
    tokenizer.chat_template = COSTLY[what]
    with pytest.raises(DataError, match="chat template"):
        ChatTemplate(tokenizer).write(TALK)


def test_a_block_that_ends_in_time_is_left_alone_afterwards(impatient):
    for _ in range(50):
        with time_limit(1.0):
            pass
    time.sleep(1.2)  # nothing is raised here


def test_other_threads_go_on(impatient):
    ended, gone_on = [], []

    def too_long():
        with pytest.raises(TooLong), time_limit(0.1):
            while True:
                pass
        ended.append(True)

    def quick():
        until = time.monotonic() + 0.5
        while time.monotonic() < until:
            with time_limit(60):
                pass
        gone_on.append(True)

    threads = [threading.Thread(target=work) for work in (too_long, quick)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert ended and gone_on
