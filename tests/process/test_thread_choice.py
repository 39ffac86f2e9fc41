"""The number of threads follows the measured time of computations, on a simulated machine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest

from erllama.engine.backends.thread_choice import Choices, ThreadChoice, ladder

Speed = Callable[[int], tuple[float, float]]
"""Returns, for a number of threads, the seconds of a decode, and the part in which the calling thread computes."""


def idle(n: int) -> tuple[float, float]:
    return 0.016 / n, 1.0


def crowded(n: int) -> tuple[float, float]:
    """One thread has a core; more wait for each other."""
    return (0.016, 1.0) if n == 1 else (0.040, 0.5)


@dataclass
class Machine:
    """A simulated machine. Its clock moves only while it computes, or by `rest`."""

    speed: Speed = idle
    now: float = 0.0

    def rest(self, seconds: float) -> None:
        self.now += seconds

    def choice(self, n: int = 2, choices: Choices | None = None, **options: bool) -> ThreadChoice:
        return ThreadChoice(
            n,
            n,
            "2 cores",
            **{"adapts": True, "same_bits": True, **options},
            choices=choices or Choices(),
            clock=lambda: self.now,
        )

    def decode(self, choice: ThreadChoice, times: int = 1, n_rows: int = 1) -> list[int]:
        """Compute, and return the numbers of threads."""
        numbers = []
        for _ in range(times):
            n = choice.begin(n_rows)
            seconds, computing = self.speed(n)
            seconds *= n_rows if n_rows > 16 else 1
            self.now += seconds
            choice.end()
            choice.record(seconds, computing * seconds)
            numbers.append(n)
        return numbers


def test_an_idle_machine_uses_all_threads_at_every_decode() -> None:
    machine = Machine()
    choice = machine.choice(8)
    assert set(machine.decode(choice, 5000)) == {8}
    assert (choice.n_threads, choice.n_threads_batch, choice.reason) == (8, 8, "2 cores")


def test_beside_other_programs_fewer_threads_are_used_if_they_are_faster() -> None:
    machine = Machine(crowded)
    choice = machine.choice()
    machine.decode(choice, 20)
    assert choice.n_threads == 1
    assert choice.n_threads_batch == 2, "prefill has its own measurements"
    assert "fewer in use" in choice.reason
    numbers = machine.decode(choice, 2000)
    assert numbers.count(2) < 0.05 * len(numbers), "trials of more threads are rare"


def test_all_threads_return_soon_after_the_other_programs_end() -> None:
    machine = Machine(crowded)
    choice = machine.choice()
    machine.decode(choice, 1000)
    machine.speed = idle
    began = machine.now
    while choice.n_threads == 1:
        machine.decode(choice)
    assert machine.now - began < 3
    assert set(machine.decode(choice, 1000)) == {2}


def test_waiting_threads_stay_if_fewer_are_slower() -> None:
    machine = Machine(lambda n: (0.016 / n**0.5, 0.7))
    choice = machine.choice()
    numbers = machine.decode(choice, 2000)
    assert choice.n_threads == 2
    assert numbers.count(1) < 0.08 * len(numbers)


def test_a_far_lower_number_is_found() -> None:
    # Six of eight processors are busy: each thread beyond the second waits, and all others wait for it.
    machine = Machine(lambda n: (0.016 / n, 1.0) if n <= 2 else (0.016 * 2 / n + 0.02, 0.5))
    choice = machine.choice(8)
    machine.decode(choice, 3000)
    assert choice.n_threads == 2


def test_prefill_has_its_own_number() -> None:
    machine = Machine(crowded)
    choice = machine.choice()
    machine.decode(choice, 30, n_rows=512)
    assert (choice.n_threads, choice.n_threads_batch) == (2, 1)


def test_a_stopped_computation_does_not_count() -> None:
    machine = Machine()
    choice = machine.choice()
    for _ in range(100):
        choice.begin(1)
        machine.rest(5.0)
        choice.end()
    assert set(machine.decode(choice, 100)) == {2}


def test_explicit_numbers_never_change() -> None:
    machine = Machine(crowded)
    choice = machine.choice(4, adapts=False)
    other = machine.choice(choices=choice._choices)
    other.begin(1)
    assert set(machine.decode(choice, 500)) == {4}
    assert (choice.n_threads, choice.reason) == (4, "2 cores")


def test_a_fixed_computation_uses_the_configured_number() -> None:
    machine = Machine(crowded)
    choice = machine.choice(same_bits=False)
    machine.decode(choice, 20)
    assert (choice.n_threads, choice.as_in_recipe) == (1, False)
    choice.fixed = True
    assert machine.decode(choice, 3) == [2, 2, 2]
    assert choice.as_in_recipe
    choice.fixed = False
    assert machine.decode(choice) == [1]


def test_models_that_compute_at_once_divide_the_cores() -> None:
    machine = Machine()
    choices = Choices()
    first, second = machine.choice(8, choices), machine.choice(8, choices)
    assert machine.decode(first) == [8]
    assert machine.decode(second) == [4], "the first one decodes again in a moment"
    assert machine.decode(first) == [4]
    assert "shared by 2 models" in first.reason
    machine.rest(1.0)
    assert machine.decode(first) == [8]
    machine.decode(second)
    second.close()
    assert machine.decode(first) == [8]
    second.close()
    third = machine.choice(8, choices)
    machine.decode(third)
    assert machine.decode(first) == [4]
    del third
    assert machine.decode(first) == [8], "a model that was dropped does not count"


@pytest.mark.parametrize("n", range(1, 200))
def test_the_ladder_reaches_from_one_to_all(n: int) -> None:
    steps = ladder(n)
    assert (steps[0], steps[-1]) == (1, n)
    assert max(n - 1, 1) in steps
    assert len(steps) <= 25
