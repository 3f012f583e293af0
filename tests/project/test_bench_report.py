"""The benchmark suite compares the right peers, reports what is slower, and writes the result files."""

from __future__ import annotations

import fnmatch
import json
import subprocess
import sys

import pytest
import torch

from bench import bench_step, report
from bench.measure import Compiled, Contest, compared, run_contest
from tests.helpers.places import ROOT


def row(**changes):
    peer = {"p20_s": 0.019, "p50_s": 0.02, "p80_s": 0.03, "peak_bytes": 4_000_000, "compile_s": 12.0}
    peer["ratio"] = {"p20": 1.5, "p50": 2.0, "p80": 2.5}
    figures = {"op": "op", "case": "size A, fp32", "device": "A Machine (tm) 9000", "threads": 2, "torch": "2.13"}
    figures |= {"device_type": "cpu"}
    figures |= {"p20_s": 0.009, "p50_s": 0.01, "p80_s": 0.012, "bytes": 2_000_000, "gb_per_s": 20.0}
    figures |= {"line_gb_per_s": 25.0, "percent_of_line": 80.0, "peak_bytes": 1_000_000, "missing": {"apex": "absent"}}
    return figures | {"peers": {"published": peer}} | changes


def goal(**changes):
    base = {"op": "op", "case": "size A*", "metric": "ratio:published", "want": "at_least"}
    base |= {"device_type": "cpu"}
    return base | {"goal": 1.9, "expected": 1.8, "tolerance": 0.1} | changes


@pytest.mark.parametrize(
    ("changes", "holds", "reached"),
    [
        ({}, True, True),
        ({"goal": 2.5}, True, False),
        ({"expected": 2.2}, True, True),
        ({"expected": 2.3}, False, True),
        ({"metric": "peak:published", "goal": 3.0, "expected": 4.0}, True, True),
        ({"metric": "percent_of_line", "goal": 85, "expected": 81}, True, False),
        ({"metric": "percent_of_line", "want": "at_most", "goal": 85, "expected": 75}, True, True),
        ({"metric": "percent_of_line", "want": "at_most", "goal": 70, "expected": 70}, False, False),
    ],
)
def test_judge(changes, holds, reached):
    (verdict,) = report.judge([row()], [goal(**changes)])
    assert (verdict.holds, verdict.reached) == (holds, reached)


@pytest.mark.parametrize(
    "changes", [{"op": "other"}, {"case": "size B*"}, {"metric": "ratio:nobody"}, {"device_type": "cuda"}]
)
def test_what_was_not_measured_is_not_judged(changes):
    assert not list(report.judge([row()], [goal(**changes)]))


def test_command_line(tmp_path, capsys, monkeypatch):
    """Files are written; a lost ratio, and a file without figures, are told by the exit status."""
    measured = tmp_path / "bench.json"
    measured.write_text(json.dumps({"benchmarks": [{"extra_info": row()}, {"extra_info": {}}]}))

    command = [sys.executable, str(ROOT / "bench" / "report.py"), str(measured), "--out", str(tmp_path / "results")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    names = {path.name.removeprefix("a-machine-tm-9000-2-threads") for path in (tmp_path / "results").iterdir()}
    assert names == {".json", ".md", "-speedup.png", "-bandwidth.png"}
    table = (tmp_path / "results" / "a-machine-tm-9000-2-threads.md").read_text()
    assert "**2.00** (1.50 to 2.50), 4.0 MB, compiles 12 s" in table
    assert "Not measured: apex (absent)." in table
    # nothing that the goals name was measured: that is no pass
    monkeypatch.setattr(sys, "argv", ["report", str(measured), "--check"])
    assert report.main() == 1
    assert "NOT MEASURED" in capsys.readouterr().out
    empty = tmp_path / "empty.json"
    empty.write_text('{"benchmarks": []}')
    monkeypatch.setattr(sys, "argv", ["report", str(empty)])
    assert report.main() == 2
    assert "make bench" in capsys.readouterr().err


def test_short_table(tmp_path, capsys, monkeypatch):
    """On a GPU with times of the device; the last line of a program that was stopped may be half written."""
    on_gpu = {"device_type": "cuda", "device_s": 0.008, "device_percent_of_line": 55.0, "host_s": 0.001, "op": "masks"}
    step = row(op="step", case="base, batch 4", percent_of_gemm=90.0, units_per_s=1234.5, host_s=0.1) | on_gpu
    rows = [row() | on_gpu, step | {"op": "step"}]
    rows[0]["peers"]["published"]["device_s"] = 0.024
    measured, goals = tmp_path / "figures.jsonl", tmp_path / "goals.json"
    measured.write_text("".join(json.dumps(line) + "\n" for line in rows) + '{"op": "ma')
    wanted = {"op": "masks", "device_type": "cuda"}
    missed = goal(metric="device_percent_of_line", goal=85, expected=70, **wanted)
    goals.write_text(json.dumps([missed, goal(goal=1.0, **wanted)]))
    monkeypatch.setattr(report, "GOALS", goals)
    monkeypatch.setattr(sys, "argv", ["report", str(measured), "--brief"])
    assert report.main() == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split() == ["masks:", "size", "A,", "fp32", "8", "ms", "55", "%", "1", "ms", "published", "3.00"]
    assert lines[3].split() == [
        "base,",
        "batch",
        "4",
        "10",
        "ms",
        "1,234",
        "90",
        "%",
        "0.00",
        "GB",
        "published",
        "2.00",
    ]
    assert lines[4:] == [
        "goals (bench/goals.json): 1 of 2 reached; measured, where not:",
        "  masks: size A*, device_percent_of_line >= 85: 55 LOST",
    ]


def test_goal_of_a_slow_benchmark(capsys, monkeypatch, tmp_path):
    """It may be absent, but not lost; a typing error in another one is told."""
    goals = tmp_path / "goals.json"
    monkeypatch.setattr(report, "GOALS", goals)

    def checked(*entries):
        goals.write_text(json.dumps([goal(), *entries]))
        return report.check([row()]), capsys.readouterr().out

    status, said = checked(goal(case="size B*", slow=True))
    assert status == 0
    assert "size B* | ratio:published: left out: `make bench` measures it" in said
    assert checked(goal(case="size B*"))[0] == 1
    assert checked(goal(expected=2.3, slow=True))[0] == 1


def test_goals_are_well_formed():
    goals = json.loads(report.GOALS.read_text())
    assert goals
    for entry in goals:
        assert entry.keys() - {"slow"} == goal().keys()
        if entry.get("slow"):
            # nobody else would notice that its case has another name
            assert any(fnmatch.fnmatch(f"{case}, batch 1", entry["case"]) for case in bench_step.LONG), entry["case"]
        assert entry["want"] in ("at_least", "at_most")
        assert 0 < entry["tolerance"] < 1


class Benchmark:
    """As much of pytest-benchmark's fixture as a contest needs."""

    def __init__(self):
        self.extra_info, self.group, self.stats = {}, None, None

    def pedantic(self, run, setup, rounds):
        for _ in range(rounds):
            setup()
            run()


def contest(peer, **changes):
    x = torch.arange(4.0)
    return Contest(op="double", case="4", ours=lambda: (2 * x,), peers={"peer": peer}, model_bytes=32, **changes)


def test_a_peer_that_disagrees_fails():
    x = torch.arange(4.0)
    with pytest.raises(AssertionError, match="peer"):
        run_contest(contest(lambda: (2 * x + 1,)), Benchmark(), torch.device("cpu"))


def test_a_peer_that_cannot_run_is_named_and_the_others_go_on():
    calls = []

    def broken():
        calls.append(1)
        raise RuntimeError("no such operator")

    run_contest(contest(broken, seconds=0.01), Benchmark(), torch.device("cpu"))
    assert len(calls) == 1


def test_compile_time_is_the_first_call():
    peer = Compiled(lambda: 3)
    assert peer.compile_s is None
    assert peer() == 3
    first = peer.compile_s
    assert first is not None
    assert peer() == 3
    assert peer.compile_s == first


def test_ratios_are_of_rounds():
    assert compared([2.0, 8.0, 3.0], [1.0, 2.0, 3.0])["ratio"]["p50"] == 2.0
