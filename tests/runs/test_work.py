"""What a run cost is counted where it happens: programs, the cache, seconds that leave nothing out."""

import time

import jax
import jax.numpy as jnp

from ches_jax.runs.work import Work


def test_programs_are_counted_and_seconds_add_up_to_the_whole():
    work = Work()
    with work.on_device():
        jax.jit(lambda x: jnp.sin(x) * time.perf_counter())(1.0).block_until_ready()
        time.sleep(0.02)
    time.sleep(0.03)
    before, facts, after = work.elapsed(), work.facts(positions=7), work.elapsed()
    assert facts["programs"] >= 1 and facts["programs_from_cache"] <= facts["programs"] and facts["positions"] == 7
    seconds = facts["seconds"]
    assert seconds["compiling"] > 0 and seconds["device"] >= 0.02 and seconds["host"] >= 0.03
    assert before - 0.002 <= sum(seconds.values()) <= after + 0.002
    again = Work().facts()
    assert again["programs"] == 0 and again["seconds"]["compiling"] == 0


def test_a_program_is_counted_once_and_one_that_is_there_not_again():
    double, three = jax.jit(lambda x: 2 * x), jnp.float32(3.0)
    work = Work()
    double(three)
    assert work.facts()["programs"] == 1
    double(3.0)
    work = Work()
    with work.on_device():
        double(4.0)
    assert work.facts()["programs"] == 0
