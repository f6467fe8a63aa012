"""Bars in a terminal, and under a cell: one output that is replaced, not a line for each event."""

import io
import sys
import time
import types

import pytest
from rich.console import Console

from sparkir.report.progress import follow

STEPS = 500


class Cell:
    """As much of IPython as a notebook's progress needs: what a cell shows, and how often."""

    def __init__(self):
        self.shown, self.updates = [], 0

    def display(self, thing, display_id=False):
        self.shown.append(thing._repr_mimebundle_(include=[], exclude=[]))
        place = len(self.shown) - 1
        return types.SimpleNamespace(update=lambda thing: self.update(place, thing))

    def update(self, place, thing):
        self.updates += 1
        self.shown[place] = thing._repr_mimebundle_(include=[], exclude=[])


@pytest.fixture
def cell(monkeypatch):
    made = Cell()
    module = types.ModuleType("IPython.display")
    module.display = made.display
    monkeypatch.setitem(sys.modules, "IPython", types.ModuleType("IPython"))
    monkeypatch.setitem(sys.modules, "IPython.display", module)
    return made


def tell(shown, *, until=STEPS):
    shown({"kind": "stage", "name": "train QAT", "steps": STEPS})
    for step in range(1, until + 1):
        shown({"kind": "step", "step": step, "loss": 1 / step})


def test_a_notebook_has_one_output_with_the_last_state(cell):
    with follow(out=Console(force_jupyter=True)) as shown:
        tell(shown)
    assert len(cell.shown) == 1
    assert f"{STEPS}/{STEPS}" in cell.shown[0]["text/html"]
    assert "loss 0.00200" in cell.shown[0]["text/html"]


def test_a_notebook_is_not_told_of_every_event(cell):
    with follow(out=Console(force_jupyter=True)) as shown:
        tell(shown)
        # It took a fraction of a second; each message to the browser is a few kB.
        assert cell.updates < STEPS / 10


def test_a_notebook_follows(cell, monkeypatch):
    with follow(out=Console(force_jupyter=True)) as shown:
        tell(shown, until=7)
        now = time.monotonic()
        monkeypatch.setattr(time, "monotonic", lambda: now + 1)
        shown({"kind": "step", "step": 8, "loss": 1.0})
        assert f"8/{STEPS}" in cell.shown[0]["text/html"]


def test_a_notebook_shows_where_it_failed(cell):
    with pytest.raises(ZeroDivisionError), follow(out=Console(force_jupyter=True)) as shown:
        tell(shown, until=7)
        _ = 1 / 0
    assert f"7/{STEPS}" in cell.shown[0]["text/html"]


def test_warnings_stand_beside_the_bars(cell):
    with follow(out=Console(force_jupyter=True)) as shown:
        shown({"kind": "warning", "message": "grey [images]"})
    assert "grey [images]" in cell.shown[1]["text/plain"]


def test_a_file_gets_the_last_state_alone():
    out = io.StringIO()
    with follow(out=Console(file=out, width=100)) as shown:
        tell(shown)
    assert out.getvalue().count("train QAT") == 1
    assert f"{STEPS}/{STEPS}" in out.getvalue()


def test_what_is_over_does_not_look_busy():
    with follow(out=Console(file=io.StringIO())) as shown:
        shown({"kind": "stage", "name": "export", "steps": 0})
        assert shown.progress.tasks[0].total is None
        shown({"kind": "stage", "name": "measure", "steps": 2})
        assert shown.progress.tasks[0].finished
        assert not shown.progress.tasks[1].finished
