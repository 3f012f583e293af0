"""What is read of DeepSpeed's internals: each attribute exists in the installed version, a missing one is an error that
names it, and no other file reads any."""

from __future__ import annotations

import ast
import copy
import importlib
import inspect
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from d2v_fast.config import parse_config
from d2v_fast.distributed import deepspeed_internals as internals
from d2v_fast.distributed import deepspeed_start as start
from d2v_fast.distributed.shards import find_shards
from d2v_fast.distributed.world import World
from d2v_fast.teacher import Teacher
from d2v_fast.training.engine import check_engine_available
from tests.helpers.marks import needs_deepspeed
from tests.helpers.places import ROOT
from tests.helpers.runs import TINY, in_processes
from tests.helpers.small_net import SCHEDULE, SMALL_BUCKETS, Net, adamw, initialize

LOCATED = {description.path: description for description in internals._Located.__subclasses__()}
DESCRIPTIONS = [*LOCATED.values(), internals._Parameter3, internals._Partition3]
READ = [(description, name) for description in DESCRIPTIONS for name in description.__annotations__]
# attributes of parameters, partitions and modules, which DeepSpeed sets from outside
SET_FROM_OUTSIDE = (
    "deepspeed.runtime.zero.partition_parameters",
    "deepspeed.runtime.zero.parameter_offload",
    "deepspeed.runtime.zero.stage_1_and_2",
)
# names that others have as well, as `str.partition`
COMMON = {"partition", "all_gather", "_config"}
PRIVATE = {name for _, name in READ} | {name for names in internals.SCALERS.values() for name in names}
PRIVATE |= {"ds_id", "is_zero_param", "raise_error_at_min_scale", "__compatible_ops__", "adam_update"}
PRIVATE |= {"loss_scaler", "loss_scale_config"}
PRIVATE |= {internals.LINKED, internals.HOOKED}


def parse(module: str) -> ast.Module:
    return ast.parse(inspect.getsource(importlib.import_module(module)))


def stored(tree: ast.AST, owner: str | None = None) -> set[str]:
    """Attributes that a source assigns, of `owner` or of anything."""
    return {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and isinstance(node.ctx, ast.Store)
        and (owner is None or (isinstance(node.value, ast.Name) and node.value.id == owner))
    }


def members(path: str) -> set[str]:
    """Attributes and methods of a DeepSpeed class and its bases, by their source."""
    module, _, name = path.rpartition(".")
    found: set[str] = set()
    for one in getattr(importlib.import_module(module), name).__mro__:
        if one.__module__.startswith("deepspeed."):
            tree = ast.parse(inspect.getsource(one))
            found |= stored(tree, "self") | set(vars(one)) | set(getattr(one, "__annotations__", {}))
    return found


@needs_deepspeed
@pytest.mark.parametrize("path", LOCATED)
def test_the_installed_version_has_every_attribute(path: str) -> None:
    missing = set(LOCATED[path].__annotations__) - members(path)
    assert not missing, f"{path} lacks {missing}"


@needs_deepspeed
def test_the_installed_version_sets_every_mark() -> None:
    found: set[str] = set()
    for module in SET_FROM_OUTSIDE:
        found |= stored(parse(module))
    wanted = {*internals._Parameter3.__annotations__, *internals._Partition3.__annotations__, "ds_id"}
    assert wanted | {internals.LINKED, internals.HOOKED} <= found
    assert "is_zero_param" in vars(importlib.import_module("deepspeed.runtime.zero.utils"))
    for name in ("stage_1_and_2.DeepSpeedZeroOptimizer", "stage3.DeepSpeedZeroOptimizer_Stage3"):
        assert "loss_scaler" in members(f"deepspeed.runtime.zero.{name}")
    for name in ("unfused_optimizer.FP16_UnfusedOptimizer", "fused_optimizer.FP16_Optimizer"):
        assert "loss_scale_config" in members(f"deepspeed.runtime.fp16.{name}")
    for name, state in internals.SCALERS.items():
        assert set(state) <= members(f"deepspeed.runtime.fp16.loss_scaler.{name}")
    assert "raise_error_at_min_scale" in members("deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler")
    scalers = {name for name in vars(importlib.import_module("deepspeed.runtime.fp16.loss_scaler")) if "Scale" in name}
    assert scalers >= set(internals.SCALERS)


@pytest.mark.parametrize(("description", "name"), READ, ids=lambda value: getattr(value, "__name__", value))
def test_a_missing_attribute_is_named(description: type, name: str) -> None:
    whole = SimpleNamespace(**dict.fromkeys(description.__annotations__, None))
    assert internals._described(whole, description) is whole  # type: ignore[comparison-overlap]
    delattr(whole, name)
    with pytest.raises(start.InternalsError, match=rf"lacks {name}\. Install a supported version: `pip install"):
        internals._described(whole, description)


@needs_deepspeed
def test_a_renamed_attribute_takes_no_other_branch(tmp_path: Path) -> None:
    """Each attribute in turn is taken off a live engine: the ranges are not found, and none is found elsewhere."""

    def work(world: World, folder: Path) -> Any:
        found = {}
        cases: dict[str, tuple[int, dict[str, Any]]] = {
            "0": (0, {"bf16": {"enabled": True}}),
            "1": (1, {}),
            "2": (2, {}),
            "3": (3, {}),
        }
        for case, (stage, changes) in cases.items():
            net = Net()
            engine = initialize(net, stage, **changes)
            assert len(find_shards(net.named_parameters(), engine)) == 6
            read = {"0": internals._Unfused, "3": internals._ZeroOptimizer3}.get(case, internals._ZeroOptimizer12)
            for name in set(read.__annotations__) & set(vars(engine.optimizer)):
                value = vars(engine.optimizer).pop(name)
                try:
                    find_shards(net.named_parameters(), engine)
                    found[f"{case}, {name}"] = "was accepted"
                except start.InternalsError as error:
                    found[f"{case}, {name}"] = str(error)
                vars(engine.optimizer)[name] = value
            internals.write_low_precision(engine)
            if stage in (1, 2):
                mark = vars(net.first.weight).pop(internals.LINKED)
                try:
                    Teacher(net, SCHEDULE, module=Net(), engine=engine)
                    found[f"{case}, mark"] = "was accepted"
                except start.InternalsError as error:
                    found[f"{case}, mark"] = str(error)
                vars(net.first.weight)[internals.LINKED] = mark
        return found

    (found,) = in_processes(1, tmp_path, work)
    assert len(found) >= 2 + 5 + 5 + 4 + 2
    for case, said in found.items():
        name = case.partition(", ")[2]
        assert f"lacks {internals.LINKED if name == 'mark' else name}." in said, (case, said)


@needs_deepspeed
def test_an_engine_may_be_configured_by_a_file(tmp_path: Path) -> None:
    """As with `deepspeed.initialize(config="file.json")`, where the engine's `config` is a path."""

    def work(world: World, folder: Path) -> Any:
        import deepspeed

        file = folder / f"{world.rank}.json.config"
        zero = {"stage": 3, "stage3_prefetch_bucket_size": 1234, **SMALL_BUCKETS}
        settings = {"train_micro_batch_size_per_gpu": 4, "zero_allow_untested_optimizer": True}
        file.write_text(json.dumps({**settings, "zero_optimization": zero}))
        net = Net()
        copied = copy.deepcopy(net)
        engine, *_ = deepspeed.initialize(model=net, optimizer=adamw(net), config=str(file))
        teacher = Teacher(net, SCHEDULE, module=copied, engine=engine)
        assert internals.given_settings(engine)["zero_optimization"]["stage3_prefetch_bucket_size"] == 1234
        return len(teacher.shards)

    assert in_processes(1, tmp_path, work) == [6]


def touches(source: str) -> list[str]:
    """Private attributes of DeepSpeed that a source reads or writes, also by name."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and node.attr in PRIVATE - COMMON:
            found.append(node.attr)
        if (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Name)
            and node.func.id in ("getattr", "hasattr", "setattr", "delattr")
        ):
            names = [one.value for one in node.args if isinstance(one, ast.Constant)]
            found += [name for name in names if name in PRIVATE]
    return found


def test_no_other_file_touches_a_private_attribute() -> None:
    assert touches("optimizer.fp16_groups; hasattr(p, 'ds_id'); name.partition('.')") == ["fp16_groups", "ds_id"]
    own = Path(internals.__file__)
    assert touches(own.read_text())
    files = [path for folder in ("d2v_fast", "bench") for path in (ROOT / folder).rglob("*.py") if path != own]
    assert len(files) > 100
    found = {str(path.relative_to(ROOT)): names for path in files if (names := touches(path.read_text()))}
    assert not found


@pytest.mark.parametrize("version", ["0.19.7", "0.19.8", "0.19.9+cu128", "0.19.10.dev1"])
def test_supported_versions(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(start.metadata, "version", lambda name: version)
    start.check_version()


@pytest.mark.parametrize("version", ["0.18.9", "0.19.6", "0.20.0", "1.19.8", "unknown"])
@needs_deepspeed
def test_other_versions_are_refused(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(start.metadata, "version", lambda name: version)
    expected = (
        f"DeepSpeed {version} is installed, but only 0.19.7 and later 0.19 are supported (tested: 0.19.7 and 0.19.8): "
        "ZeRO's internal layout, which is read here, differs. Install a supported version: "
        "`pip install 'deepspeed>=0.19.7,<0.20'`."
    )
    raw = {**TINY, "zero_optimization": {"stage": 1}}
    for check in (
        lambda: check_engine_available(parse_config(raw, 1).deepspeed, 1),
        lambda: start.load(torch.device("cpu")),
        lambda: Teacher(nn.Linear(1, 1), SCHEDULE, module=nn.Linear(1, 1), engine=object()),  # type: ignore[arg-type]
    ):
        with pytest.raises(start.InternalsError) as caught:
            check()
        assert str(caught.value) == expected
    # a run without it needs no version
    check_engine_available(parse_config(TINY, 1).deepspeed, 1)


def test_without_deepspeed_every_version_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> str:
        raise start.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(start.metadata, "version", absent)
    start.check_version()


def test_pyproject_has_the_same_range() -> None:
    first, last = (".".join(map(str, version)) for version in (start.FIRST, start.NOT_TRIED[:2]))
    text = (ROOT / "pyproject.toml").read_text()
    assert f"\"deepspeed>={first},<{last}; sys_platform == 'linux'\"" in text
    assert f"deepspeed>={first},<{last}" in start.INSTALL
    assert f"deepspeed=={start.TESTED[1]}\n" in (ROOT / "constraints.txt").read_text()


@pytest.fixture
def broken_apex(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    (tmp_path / "apex.py").write_text("raise TypeError('no such build')")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "apex", raising=False)
    yield
    sys.modules.pop("apex", None)


def test_a_broken_apex_is_hidden_from_deepspeed_only(broken_apex: None) -> None:
    with start._without_broken_apex(), pytest.raises(ImportError):
        importlib.import_module("apex")
    assert "apex" not in sys.modules
    with pytest.raises(TypeError, match="no such build"):
        importlib.import_module("apex")


def test_the_accelerator_is_named_for_the_import_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    with start._accelerator(torch.device("cpu")):
        assert os.environ["DS_ACCELERATOR"] == "cpu"
    assert "DS_ACCELERATOR" not in os.environ
    with start._accelerator(torch.device("cuda")):
        assert "DS_ACCELERATOR" not in os.environ
    monkeypatch.setenv("DS_ACCELERATOR", "xpu")
    with start._accelerator(torch.device("cpu")):
        assert os.environ["DS_ACCELERATOR"] == "xpu"
    assert os.environ["DS_ACCELERATOR"] == "xpu"


@pytest.mark.parametrize("before", [None, {"deepspeed_shm_comm": True}])
def test_the_table_of_operations_is_put_back(before: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    ops = SimpleNamespace() if before is None else SimpleNamespace(__compatible_ops__=before)
    monkeypatch.setitem(sys.modules, "deepspeed.ops", ops)
    with internals.without_compiling(torch.device("cuda")):
        assert vars(ops).get("__compatible_ops__") is before
    with internals.without_compiling(torch.device("cpu")):
        assert vars(ops)["__compatible_ops__"]["deepspeed_shm_comm"] is False
    assert vars(ops).get("__compatible_ops__") is before
