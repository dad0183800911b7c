"""The adaptive example: a smoke run as a user starts it, and what its table is made of."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
sys.path.insert(0, str(EXAMPLES))

pytest.importorskip("matplotlib")
pytest.importorskip("PIL")
import adaptive_glyphs as example  # noqa: E402


def test_a_smoke_run_leaves_table_numbers_and_picture(tmp_path):
    program = [sys.executable, EXAMPLES / "adaptive_glyphs.py", "--quick", "--threads", "1"]
    run = subprocess.run([*program, "--out", tmp_path], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    report = json.loads((tmp_path / "adaptive_glyphs.json").read_text())
    assert (tmp_path / "adaptive_glyphs.png").stat().st_size > 10_000
    assert "| adaptive, delta = 0.1 |" in run.stdout
    histories = {
        line["name"]: [each["history"] for each in line["runs"]] for line in report["lines"]
    }
    # from the same start: until rows are learnt the adaptive loss is the dense one
    for dense, adaptive in zip(histories["dense"], histories["adaptive"], strict=True):
        assert dense[0]["learnt"] == 0
        assert adaptive[0]["training_loss"] == pytest.approx(dense[0]["training_loss"], rel=1e-4)
        assert dense[-1]["training_loss"] < dense[0]["training_loss"]


def test_the_way_to_an_accuracy_is_linear_between_evaluations():
    history = [{"top1": 0.2, "seconds": 10.0}, {"top1": 0.6, "seconds": 30.0}]
    assert example.way_to(0.1, history, "seconds") == pytest.approx(5)
    assert example.way_to(0.5, history, "seconds") == pytest.approx(25)
    with pytest.raises(ValueError, match="expected one that the run reaches"):
        example.way_to(0.7, history, "seconds")


@pytest.mark.parametrize("option", ["--epochs", "--seeds", "--threads"])
def test_numbers_too_small_are_named(option, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["adaptive_glyphs.py", option, "0"])
    with pytest.raises(SystemExit):
        example.parse_arguments()
    assert f"{option}: expected at least" in capsys.readouterr().err
