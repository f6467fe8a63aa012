"""Each example beside the same script before SPARK; run where its library is installed."""

import difflib
import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
LIBRARIES = {
    "plain_pytorch": "onnxruntime",
    "torchao_pt2e": "torchao",
    "brevitas_qat": "brevitas",
    "nncf_qat": "nncf",
    "lightning_qat": "lightning",
    "accelerate_qat": "accelerate",
}


def lines(name: str) -> list[str]:
    return [line for line in (EXAMPLES / f"{name}.py").read_text("utf-8").splitlines() if line]


def test_every_example_is_listed():
    scripts = {path.stem for path in EXAMPLES.glob("*.py")} - {"pipeline", "fakequant"}
    assert scripts == {f"{name}{end}" for name in LIBRARIES for end in ("", "_before")}


@pytest.mark.parametrize("name", LIBRARIES)
def test_is_short_and_differs_in_six_lines(name):
    before, after = lines(f"{name}_before"), lines(name)
    assert len((EXAMPLES / f"{name}.py").read_text("utf-8").splitlines()) <= 60
    changed = [line for line in difflib.ndiff(before, after) if line.startswith("+ ")]
    assert 1 <= len(changed) <= 6, changed
    dropped = [line for line in difflib.ndiff(before, after) if line.startswith("- ")]
    assert len(dropped) <= 2, dropped
    assert not any("spark" in line.lower() for line in before if "sparkir" not in line)


@pytest.mark.slow
@pytest.mark.parametrize("end", ["_before", ""])
@pytest.mark.parametrize("name", LIBRARIES)
def test_runs(name, end):
    if find_spec(LIBRARIES[name]) is None:
        pytest.skip(f"needs {LIBRARIES[name]}")
    command = [sys.executable, f"{name}{end}.py", "--steps", "9"]
    done = subprocess.run(command, cwd=EXAMPLES, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    told = json.loads(done.stdout.splitlines()[-1])
    assert LIBRARIES[name] in told["versions"]
    for trained, exported in zip(told["psnr_db"]["qat"], told["psnr_db"]["export"], strict=True):
        assert trained > 25  # bicubic is at 30
        assert exported == pytest.approx(trained, abs=0.3)
