"""The scores that `bench.two_versions` draws."""

from __future__ import annotations

import json
from pathlib import Path

from bench.two_versions import Group, Panel, scores_of
from tests.helpers.small_engine import config


def test_scores_by_step(tmp_path: Path) -> None:
    """A curve starts at the untrained network and has the steps after which every seed was probed."""

    def run(name: str, by_step: dict[int, float]) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        entries = [
            {"step": step, "word": {"untrained": {"linear": 5.0}, "student": {"linear": score}}}
            for step, score in by_step.items()
        ]
        (folder / "probe.json").write_text(json.dumps(entries))
        return folder

    runs = [
        scores_of(run("a", {20: 7.0, 10: 6.0}), {}),
        scores_of(run("b", {20: 9.0}), {15: {"word": {"linear": 8.0}}}),
    ]
    assert [list(scores) for scores in runs] == [[0, 10, 20], [0, 15, 20]]
    group = Group(config(), runs)
    assert group.scores(Panel("text", "word", "linear", "")) == {0: [5.0, 5.0], 20: [7.0, 9.0]}
