"""The optimizers that a file can name: when each is accepted, why it is not, and that DeepSpeed's own do what torch's
does and are restored bit for bit."""

from __future__ import annotations

import copy
import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from d2v_fast.config import ConfigError, RunConfig, parse_config
from d2v_fast.distributed.world import World
from d2v_fast.errors import RunError
from d2v_fast.training import optimizers
from d2v_fast.training.optimizers import check_optimizer_available, make_optimizer, optimizer_step
from tests.helpers.marks import needs_deepspeed
from tests.helpers.runs import TINY, figures, import_deepspeed, in_processes, run_forked, run_here, tiny_file
from tests.helpers.sharded_trial import Trial, run_config, worst
from tests.helpers.small_engine import restore, saved_state

ON_HOST = {"offload_optimizer": {"device": "cpu"}}


def parsed(kind: str, stage: int, **zero: Any) -> RunConfig:
    raw = copy.deepcopy(TINY)
    raw["optimizer"]["type"] = kind
    raw["zero_optimization"] = {"stage": stage, **zero}
    return parse_config(raw, 2)


@pytest.mark.parametrize(
    ("kind", "stages", "zero"),
    [
        ("AdamW", (0, 1, 2, 3), {}),
        ("AdamW", (1, 2, 3), ON_HOST),
        ("FusedAdam", (1, 2, 3), {}),
        ("CPUAdam", (1, 2, 3), ON_HOST),
        ("ApexFusedAdam", (1, 2), {}),
    ],
)
def test_accepted(kind: str, stages: tuple[int, ...], zero: dict[str, Any]) -> None:
    for stage in stages:
        assert parsed(kind, stage, **zero).deepspeed.optimizer.type == kind


@pytest.mark.parametrize(
    ("kind", "stage", "zero", "words"),
    [
        ("FusedAdam", 0, {}, "Without ZeRO, only torch's AdamW can skip a step with a non-finite gradient"),
        ("CPUAdam", 0, {}, "Without ZeRO, only torch's AdamW can skip a step with a non-finite gradient"),
        ("ApexFusedAdam", 0, {}, "Without ZeRO, only torch's AdamW can skip a step with a non-finite gradient"),
        ("CPUAdam", 2, {}, 'Set `zero_optimization.offload_optimizer.device` to "cpu", or choose another type'),
        ("FusedAdam", 2, ON_HOST, 'Its kernels run on a GPU: use "CPUAdam" or "AdamW"'),
        ("ApexFusedAdam", 1, ON_HOST, 'Its kernels run on a GPU: use "CPUAdam" or "AdamW"'),
        ("ApexFusedAdam", 3, {}, "It counts steps per parameter group, and ZeRO-3 steps a group in several parts"),
    ],
)
def test_refused(kind: str, stage: int, zero: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=r"`optimizer\.type` must be") as caught:
        parsed(kind, stage, **zero)
    assert words in str(caught.value)


def test_apex_without_a_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    file = tiny_file(tmp_path, optimizer__type="ApexFusedAdam", zero_optimization__stage=1)
    assert run_here("--ds_config", file, "--run", "r") == 1
    said = capsys.readouterr().err
    assert '`optimizer.type` "ApexFusedAdam" needs a CUDA device, and there is none. Use "AdamW".' in said
    assert "Traceback" not in said


WRONG_APEX = {
    # as PyPI's: a library for web sites
    "PyPI's": ({"__init__.py": "from pyramid_of_nobody import session"}, "No module named 'pyramid_of_nobody'"),
    "PyPI's, with what it needs": ({"__init__.py": ""}, "No module named 'apex.optimizers'"),
    "written for another Python": ({"__init__.py": "print 'apex'"}, "Missing parentheses"),
    "broken": ({"__init__.py": "raise TypeError('no such build')"}, "no such build"),
    "without its kernels": ({"__init__.py": "", "optimizers.py": ""}, "has no attribute 'FusedAdam'"),
}


@pytest.fixture
def apex(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Return an empty folder that `import apex` finds, on a machine that seems to have a GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.syspath_prepend(str(tmp_path))
    before = {name: module for name, module in sys.modules.items() if name.partition(".")[0] == "apex"}
    for name in before:
        del sys.modules[name]
    (tmp_path / "apex").mkdir()
    yield tmp_path / "apex"
    for name in [name for name in sys.modules if name.partition(".")[0] == "apex"]:
        del sys.modules[name]
    sys.modules.update(before)


@pytest.mark.parametrize("kind", WRONG_APEX)
def test_wrong_apex(kind: str, apex: Path) -> None:
    files, reason = WRONG_APEX[kind]
    for name, code in files.items():
        (apex / name).write_text(code)
    with pytest.raises(RunError) as caught:
        check_optimizer_available(parsed("ApexFusedAdam", 1).deepspeed.optimizer)
    said = str(caught.value)
    assert said.startswith('`optimizer.type` "ApexFusedAdam" needs NVIDIA\'s apex (that of PyPI is another project)')
    assert reason in said
    assert said.endswith('Use "AdamW".')


def test_right_apex(apex: Path) -> None:
    """NVIDIA's apex is accepted and asked for decoupled weight decay."""
    (apex / "__init__.py").write_text("")
    (apex / "optimizers.py").write_text(
        "import torch\n"
        "class FusedAdam(torch.optim.SGD):\n"
        "    def __init__(self, params, lr, betas, eps, adam_w_mode):\n"
        "        super().__init__(params, lr)\n"
        "        self.asked = (betas, eps, adam_w_mode)\n"
    )
    check_optimizer_available(parsed("ApexFusedAdam", 1).deepspeed.optimizer)
    made: Any = make_optimizer(
        parsed("ApexFusedAdam", 1).deepspeed.optimizer, [{"params": [nn.Parameter(torch.ones(1))]}]
    )
    assert made.asked == ((0.9, 0.999), 1e-8, True)


def test_failed_build_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any, **__: Any) -> None:
        try:
            raise FileNotFoundError("No such file or directory: 'g++'")
        except OSError as error:
            raise RuntimeError("requires the cpu_adam op, which failed to build/load.") from error

    monkeypatch.setattr(optimizers, "_optimizer_class", lambda config: fails)
    with pytest.raises(RunError) as caught:
        make_optimizer(parsed("CPUAdam", 2, **ON_HOST).deepspeed.optimizer, [])
    assert str(caught.value) == (
        "`optimizer.type` \"CPUAdam\" cannot be built here: No such file or directory: 'g++'. "
        'Use "AdamW", which is not compiled.'
    )


@pytest.mark.parametrize(
    ("betas", "step", "calls"),
    [((0.9, 0.999), 5, range(1, 6)), ((0.9, 0.999), 1_000_000, [1_000_000]), ((0.9, 0.98), 10**9, [10**9])],
)
def test_few_steps_are_made_again_on_resume(
    betas: tuple[float, float], step: int, calls: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of them while a bias correction depends on how the product was rounded, then the last one only."""
    value = nn.Parameter(torch.ones(1))
    optimizer, found = torch.optim.SGD([value]), []
    optimizer.param_groups[0]["betas"] = betas
    monkeypatch.setattr(optimizers, "cpu_adam_step", lambda optimizer: found.append)
    optimizers.restore_optimizer(optimizer, [value], step)
    assert found == list(calls)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Compile DeepSpeed's two optimizers, which takes minutes, for every process that is forked from here."""
    import_deepspeed()
    from deepspeed.ops.adam import DeepSpeedCPUAdam, FusedAdam

    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if "TORCH_EXTENSIONS_DIR" not in os.environ:
            patch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path_factory.mktemp("extensions")))
        for kind in (DeepSpeedCPUAdam, FusedAdam):
            kind([nn.Parameter(torch.ones(1))])


SLOW_CASES = {
    **{f"FusedAdam, {stage}": ("FusedAdam", {"stage": stage}) for stage in (1, 2, 3)},
    **{f"CPUAdam, {stage}": ("CPUAdam", {"stage": stage, **ON_HOST}) for stage in (1, 2, 3)},
    "CPUAdam, 3 with parameters": ("CPUAdam", {"stage": 3, **ON_HOST, "offload_param": {"device": "cpu"}}),
}


@needs_deepspeed
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_same_as_torch_and_restored(compiled: None, tmp_path: Path) -> None:
    """Two processes match torch's AdamW after 8 steps, and bit for bit themselves when restored after 5."""

    def run(kind: str, zero: dict[str, Any], world: World) -> Trial:
        config = run_config({"zero_optimization": zero}, world.size)
        raw = {**config.deepspeed.asked_for(), "d2v": config.d2v.model_dump(mode="json", exclude_unset=True)}
        raw["optimizer"]["type"] = kind
        return Trial(parse_config(raw, world.size), world)

    def state_of(trial: Trial) -> dict[str, torch.Tensor]:
        return saved_state(trial.engine)[0] | trial.teacher.state_dict()["average"]

    def work(world: World, folder: Path) -> Any:
        report = {}
        for name, (kind, zero) in SLOW_CASES.items():
            expected, trial, again = (run(k, zero, world) for k in ("AdamW", kind, kind))
            for step in range(1, 9):
                assert expected.step(step)
                if step == 6:
                    saved, teacher = copy.deepcopy(saved_state(trial.engine)), copy.deepcopy(trial.teacher.state_dict())
                assert trial.step(step)
            restore(again.engine, saved)
            again.teacher.load_state_dict(teacher)
            for step in range(6, 9):
                assert again.step(step)
            one, other = state_of(trial), state_of(again)
            steps = [
                optimizer_step(t.engine.optimizer, [shard.stepped for shard in t.engine.shards()])
                for t in (trial, again)
            ]
            student, torchs = trial.student(), expected.student()
            report[name] = {
                "type": type(trial.engine.optimizer).__name__,
                "steps": steps,
                "differing": [key for key, value in one.items() if not torch.equal(value, other[key])],
                "kept": len(one),
                "from torch": worst(student, torchs)[0] if world.is_first else 0.0,
            }
        return report

    for found in in_processes(2, tmp_path, work, timeout_s=600):
        for name, report in found.items():
            assert report["type"] == {"F": "FusedAdam", "C": "DeepSpeedCPUAdam"}[name[0]]
            assert report["steps"] == [8, 8], name
            assert report["differing"] == [], name
            assert report["kept"] > 0
            assert report["from torch"] <= 1e-5, (name, report)


@needs_deepspeed
@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("case", ["FusedAdam, 3", "CPUAdam, 2"])
def test_resumed_run_is_bit_exact(case: str, compiled: None, tmp_path: Path) -> None:
    kind, zero = SLOW_CASES[case]
    file = tiny_file(tmp_path, optimizer__type=kind, zero_optimization=zero, d2v__schedule__kind="constant")
    output, arguments = tmp_path / "output", ["--ds_config", file, "--run"]
    assert run_forked(*arguments, "whole", output=output, num_processes=2) == [0, 0], output.read_text()
    shorter = ["--set", "d2v.schedule.steps=6"]
    assert run_forked(*arguments, "r", *shorter, output=output, num_processes=2) == [0, 0], output.read_text()
    assert run_forked(*arguments, "r", "--resume", output=output, num_processes=2) == [0, 0], output.read_text()
    assert figures(tmp_path, "r") == figures(tmp_path, "whole")
