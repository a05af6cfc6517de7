"""The examples run as a user runs them; the training demo in a tiny version, with its check."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).parent.parent / "examples"


def run(script: str, *flags: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(EXAMPLES / script), *flags]
    return subprocess.run(command, cwd=cwd, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=900)


def test_op_example(tmp_path):
    result = run("ffa.py", cwd=tmp_path)
    assert result.returncode == 0, result.stdout


def test_compiled_block_has_one_graph(tmp_path):
    result = run("compiled_block.py", cwd=tmp_path)
    assert result.returncode == 0, result.stdout
    assert result.stdout.count("1 graph") == 4, result.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="the demo would take the GPUs")
def test_training_equals_one_process(tmp_path):
    # 501 tokens: no rank count and no chunk divides them, so that every step has padding rows.
    flags = ["--cp=2", "--steps=4", "--check-steps=3", "--tokens=501", "--layers=2", "--width=64", "--heads=4"]
    result = run("train.py", *flags, cwd=tmp_path)
    assert result.returncode == 0, result.stdout
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["passed"] and all(check["ok"] for check in report["checks"].values())
    assert report["checks"]["losses, relative"]["value"] <= 1e-4
    assert report["checks"]["parameters, absolute"]["value"] <= 1e-4
    assert report["graphs_by_rank"] == [1, 1] and [step["graphs"] for step in report["steps"]] == [1] * 4
    assert report["summary"]["distinct_masks"] == 4
    assert max(step["remote_rows"] for step in report["steps"]) > 0
    for name in "mask.png", "plan.png", "loss.png":
        assert (tmp_path / "out" / name).stat().st_size > 5000


def test_the_check_can_fail(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import train_report

    weight = torch.ones(3)
    step = {"loss": 2.0, "graphs": 1}
    good = {"steps": [step], "parameters": {"w": weight}, "graphs": [1, 1], "graph_breaks": 0}

    def ok(**changes):
        return all(c["ok"] for c in train_report.check({**good, **changes}, ([2.0], {"w": weight}), False).values())

    assert ok()
    assert not ok(steps=[{**step, "loss": 2.0 * (1 + 2e-4)}])
    assert not ok(steps=[{**step, "loss": float("nan")}])
    assert not ok(parameters={"w": weight + torch.tensor([0.0, float("nan"), 0.0])})
    assert not ok(parameters={"w": weight + torch.tensor([0.0, 2e-4, 0.0])})
    assert not ok(graphs=[1, 2])
    assert not ok(graph_breaks=1)


def test_bad_flags_are_named(tmp_path):
    result = run("train.py", "--tp", "3", cwd=tmp_path)
    assert result.returncode == 2 and "--tp 3 must divide 8 query heads" in result.stdout
