import pytest

from sparkir.compare import clock
from sparkir.compare.clock import StepClock, cost_of


@pytest.fixture
def now(monkeypatch):
    """A clock that the test winds; CPU time runs twice as fast, as on two cores."""
    time = [0.0]
    monkeypatch.setattr(clock, "_now", lambda: (time[0], 2 * time[0]))
    return time


def test_only_steps_count_and_the_first_ones_do_not(now):
    asks = StepClock(lambda: False)
    logged = []

    def step(number: int, seconds: float, *, log=False, evaluates=False, saves=False):
        """The loop's order: step, line of the log, evaluation, question, checkpoint."""
        now[0] += seconds
        if log:
            logged.append(asks.timed({"kind": "step", "step": number}))
        if evaluates:
            now[0] += 50.0
            asks.timed({"kind": "evaluation"})
        asks()
        if saves:
            now[0] += 70.0
            asks.timed({"kind": "checkpoint"})

    for number in range(3):
        step(number, 10.0, saves=number == 2)
    step(3, 1.0)
    step(4, 1.0, evaluates=True, saves=True)
    step(5, 4.0)
    step(6, 1.0, log=True)  # of the steps before it, 3 and 5
    step(7, 1.0, log=True)  # of step 6
    assert [event.get("timed_steps") for event in logged] == [2, 1]
    assert cost_of(logged) == {"step_ms": 2000.0, "step_cpu_ms": 4000.0}


def test_the_question_is_passed_on(now):
    answers = iter([False, True])
    asks = StepClock(lambda: next(answers))
    assert [asks(), asks()] == [False, True]


def test_nothing_timed_costs_nothing_known():
    assert cost_of([{"kind": "step", "step": 1}]) == {}
