"""Configurations that are accepted, and the messages for all others."""

from __future__ import annotations

import copy
import json
import re
import string
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from d2v_fast.config import (
    ConfigError,
    RunConfig,
    SpeechConfig,
    VisionConfig,
    VisionModelConfig,
    apply_overrides,
    changed_keys,
    load_config,
    parse_config,
)
from d2v_fast.modalities import all_modalities
from tests.helpers.places import ROOT

CONFIGS = ROOT / "configs"
MINIMAL: dict[str, Any] = {
    "train_batch_size": 8,
    "optimizer": {"params": {"lr": 1e-3}},
    "d2v": {"data": {"kind": "images", "path": "/images"}},
}


def parse(world_size: int = 1, **changes: Any) -> RunConfig:
    """The minimal file with dotted keys (`__` for the dot) changed."""
    overrides = [f"{key.replace('__', '.')}={json.dumps(value)}" for key, value in changes.items()]
    return parse_config(apply_overrides(MINIMAL, overrides), world_size)


def problems(world_size: int = 1, **changes: Any) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as caught:
        parse(world_size, **changes)
    return caught.value.problems


def problems_of(overrides: list[str]) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as caught:
        parse_config(apply_overrides(MINIMAL, overrides))
    return caught.value.problems


def test_import_is_light() -> None:
    code = "import sys, d2v_fast.config.schema; print(sorted({'torch', 'numpy', 'deepspeed'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


def test_defaults_are_the_published_base_run() -> None:
    shipped = load_config(CONFIGS / "vision_base.json", ["d2v.data.path=/images"])
    d2v, published = shipped.d2v, VisionConfig()
    assert d2v.model == published.model
    assert (d2v.target, d2v.loss, d2v.teacher) == (published.target, published.loss, published.teacher)
    assert d2v.mask.num_patches == published.mask.num_patches == 120
    assert d2v.schedule.epochs == published.schedule.epochs == 800
    assert d2v.schedule.final_lr_ratio * shipped.deepspeed.optimizer.params.lr == pytest.approx(1e-5)
    assert shipped.deepspeed.batch_split(16) == (2048, 128, 1, 16)
    assert shipped.deepspeed.batch_split(1) == (2048, 128, 16, 1)


def test_speech_defaults_are_the_published_base_run() -> None:
    shipped = load_config(CONFIGS / "speech_base.json", ["d2v.data.path=/recordings"])
    d2v, published = shipped.d2v, SpeechConfig()
    for section in ("model", "mask", "target", "loss", "teacher", "schedule"):
        assert getattr(d2v, section) == getattr(published, section), section
    assert shipped.deepspeed.batch_split(16) == (512, 32, 1, 16)


def test_sections_of_another_modality_are_refused() -> None:
    must = '`d2v.modality` must be "vision" or "speech" or "text", but is'
    assert problems(d2v__modality="speach") == (f'{must} "speach" instead. Did you mean "speech"?',)
    for name in ("points", 3, ["speech"], {"name": "speech"}):
        [found] = problems(d2v__modality=name)
        assert found == f"{must} {json.dumps(name)} instead. If a package defines it, install that package."
    found = problems(d2v__modality="speech", d2v__data={"kind": "audio", "path": "/x"}, d2v__model={"patch_size": 4})
    assert any("`d2v.model.patch_size` (value 4) is not a known key" in text for text in found)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"model": {"heads": 7}}, "`d2v.model.heads` must divide `width` (768), but is 7 instead"),
        ({"model": {"position_groups": 5}}, "`d2v.model.position_groups` must divide `width` (768), but is 5"),
        (
            {"model": {"conv_strides": [5, 2]}},
            "`d2v.model.conv_strides` must hold as many values as `conv_kernels`",
        ),
        ({"target": {"top_k": 13}}, "`d2v.target.top_k` must be in [1, 12], but is 13 instead"),
        ({"data": {"min_seconds": 30.0}}, "`d2v.data.max_seconds` must be >= `min_seconds` (30.0), but is 20.0"),
        ({"data": {"min_seconds": 0.04}}, "`d2v.data.min_seconds` must be >= 0.045 (two frames), but is 0.04 instead"),
        ({"data": {"max_batch_seconds": 5}}, "`d2v.data.max_batch_seconds` must be >= `max_seconds` (20.0), but is 5"),
        ({"data": {"kind": "audio"}}, '`d2v.data.path` must be a folder or a .tsv manifest with `kind` "audio"'),
    ],
)
def test_speech_sections(changes: dict[str, Any], sentence: str) -> None:
    raw = {**MINIMAL, "d2v": {"modality": "speech", **changes}}
    with pytest.raises(ConfigError) as caught:
        parse_config(raw)
    assert any(sentence in problem for problem in caught.value.problems), caught.value.problems


@pytest.mark.parametrize("name", ["digits", "speech", "text"])
def test_a_sample_set_takes_no_path(name: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(CONFIGS / f"{name}.json", ["d2v.data.path=/my/own"])
    kind, own, preset = {
        "digits": ("digits", "images", "images_small"),
        "speech": ("speech", "audio", "speech_small"),
        "text": ("docs", "text", "text_small"),
    }[name]
    [found] = caught.value.problems
    assert f'`d2v.data.path` must be null with `kind` "{kind}", a sample set, but is "/my/own" instead.' in found
    assert re.search(rf'`kind` "{own}",.* the preset `{preset}`', found)
    own_data = ["d2v.data.path=/my/own", "d2v.data.tokenizer=/tokenizer"][: 2 if name == "text" else 1]
    assert load_config(CONFIGS / f"{preset}.json", own_data).d2v.data.kind == own


def test_keys_of_another_kind_have_no_effect() -> None:
    idle = parse(d2v__data__rotation_degrees=5, d2v__data__zoom=0.0, d2v__data__flip_prob=0.0)
    assert idle.without_effect(1) == ['no effect of `d2v.data.rotation_degrees`: `d2v.data.kind` is "images"']
    digits = parse(d2v__data={"kind": "digits", "mean": [0.5], "std": [1.0], "zoom": 0.1}, d2v__model__channels=1)
    assert digits.without_effect(1) == []
    changed = {"kind": "digits", "mean": [0.5], "std": [1.0], "flip_prob": 0.0, "strict": True}
    found = parse(d2v__data=changed, d2v__model__channels=1, d2v__guard={"nonfinite": "stop", "nonfinite_patience": 9})
    assert list(found.d2v.without_effect()) == ["d2v.data.flip_prob", "d2v.data.strict", "d2v.guard.nonfinite_patience"]
    constant = parse(d2v__schedule={"kind": "constant", "steps": 5, "hold_ratio": 0.5, "final_lr_ratio": 0.5})
    assert list(constant.d2v.without_effect()) == ["d2v.schedule.hold_ratio", "d2v.schedule.final_lr_ratio"]
    for modality in all_modalities():
        section = modality.config
        data = section.model_fields["data"].default
        assert {key for keys in data.only_for.values() for key in keys} <= set(type(data).model_fields)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.json")), ids=lambda path: path.stem)
def test_shipped_files_are_valid(path: Path) -> None:
    raw = json.loads(path.read_text())
    kind = raw["d2v"]["data"]["kind"]
    overrides = ["d2v.data.path=/data"] if kind in ("images", "audio", "text", "table") else []
    config = load_config(path, overrides + (["d2v.data.tokenizer=/tokenizer"] if kind == "text" else []))
    # what is written to the run folder means the same
    again = parse_config(json.loads(json.dumps(config.to_dict())))
    assert again.to_dict() == config.to_dict()
    assert again.digest() == config.digest()


def test_geometry() -> None:
    model = VisionModelConfig(image_size=48, patch_size=16)
    assert (model.grid_size, model.num_patches) == (3, 9)


def test_unknown_keys_name_the_nearest() -> None:
    found = problems(d2v__model__dpeth=3, train_bach_size=8, optimizer__params__weight_decy=0.1, d2v__lr=1)
    assert "`train_bach_size` (value 8) is not a known key. Did you mean `train_batch_size`?" in found
    assert any("`optimizer.params.weight_decy` (value 0.1)" in text for text in found)
    assert any("Did you mean `optimizer.params.weight_decay`?" in text for text in found)
    assert "`d2v.model.dpeth` (value 3) is not a known key. Did you mean `d2v.model.depth`?" in found
    assert "`d2v.lr` (value 1) is not a known key. Did you mean `optimizer.params.lr`?" in found
    [found] = problems(d2v__model__zzz=1)
    assert "Known here: image_size, patch_size" in found
    [found] = problems(zero_optimization__offload_optimizer__pin_memry=True)
    assert "Did you mean `zero_optimization.offload_optimizer.pin_memory`?" in found


def test_every_problem_is_listed_at_once() -> None:
    found = problems(
        d2v__model__heads=5,
        d2v__model__nonsense=1,
        d2v__target__top_k="three",
        optimizer__params__lr=-1,
        gradient_clipping=None,
    )
    assert len(found) == 5
    for key in (
        "gradient_clipping",
        "d2v.model.heads",
        "d2v.model.nonsense",
        "d2v.target.top_k",
        "optimizer.params.lr",
    ):
        assert any(f"`{key}`" in text for text in found), key


@pytest.mark.parametrize(
    ("key", "value", "sentence"),
    [
        ("d2v__model__heads", 7, "must divide `width` (768), but is 7 instead. The nearest divisor is"),
        ("d2v__model__image_size", 230, "must be a multiple of `patch_size` (16), but is 230 instead"),
        ("d2v__mask__num_patches", 300, "must be in [1, 195], but is 300 instead"),
        ("d2v__mask__num_patches", 196, "must be in [1, 195], but is 196 instead"),
        ("d2v__probe__grid", 15, "must be in [1, 14], but is 15 instead"),
        ("d2v__mask__min_patches", 121, "must be <= `num_patches` (120), but is 121 instead"),
        ("d2v__target__top_k", 13, "must be in [1, 12], but is 13 instead"),
        ("d2v__target__layer_norm", "lyer", "must be 'none', 'layer', 'instance' or 'batch', but is \"lyer\" instead"),
        ("d2v__model__drop_path", 1.0, "must be in [0, 1), but is 1.0 instead"),
        ("d2v__model__depth", 1.5, "must be an integer, but is 1.5 instead"),
        ("d2v__model__depth", True, "must be an integer, but is true instead"),
        ("d2v__model__depth", "6", 'must be an integer, but is "6" instead'),
        ("d2v__run__profile", 1, "must be true or false, but is 1 instead"),
        ("d2v__data__mean", [0.5, 0.5], "must hold 3 values, but is [0.5, 0.5] instead"),
        ("d2v__data__std", [0.5, 0.0, 1.0], "must be > 0 in every channel"),
        ("d2v__data__crop_scale", [0.9, 0.5], "must be [low, high] with 0 < low <= high <= 1"),
        ("d2v__data__path", None, 'must be a folder with `kind` "images", but is null instead'),
        ("d2v__teacher__decay_end", 0.9999, "`d2v.teacher.decay_steps` must be >= 1 while"),
        ("d2v__schedule", {}, "`d2v.schedule.epochs` must be given, or `steps`, and not both"),
        ("d2v__schedule", {"epochs": 1, "steps": 1}, "`d2v.schedule.epochs` must be given, or `steps`, and not both"),
        ("d2v__schedule", {"steps": 5, "warmup_steps": 6}, "must be <= `steps` (5), but is 6 instead"),
        ("d2v__schedule", {"steps": 5, "kind": "tri_stage"}, "must be > 0 with `kind` tri_stage"),
        ("d2v__run__name", "../x", "must be letters, digits"),
        ("d2v__run__name", "..", "must be letters, digits"),
        ("d2v__run__name", "/tmp/x", "must be letters, digits"),
        ("d2v__run__name", "a\n", "must be letters, digits"),
        ("d2v__run__name", "", "must be letters, digits"),
        ("d2v__run__dir", "a\0", "`d2v.run.dir` must be a path that the system can hold"),
        ("d2v__data__path", "a\0", "`d2v.data.path` must be a path that the system can hold"),
        ("d2v__data__max_image_pixels", 10**9, "must be in [1, 178956970], but is 1000000000 instead"),
        ("d2v__data__min_image_side", 0, "must be in [1, 65536], but is 0 instead"),
        ("d2v__model__width", 10**12, "must be in [1, 65536], but is 1000000000000 instead"),
        ("d2v__run", 3, "`d2v.run` must be a section {...}, but is 3 instead"),
        ("d2v", [], "`d2v` must be a section {...}, but is [] instead"),
        ("optimizer__type", "Lamb", "'ApexFusedAdam', but is \"Lamb\" instead"),
        ("optimizer__params__betas", [0.9, 1.0], "`optimizer.params.betas.1` must"),
        ("optimizer__params", {}, "`optimizer.params.lr` is required, but missing"),
        ("bf16__enabled", "maybe", 'must be true, false or "auto", but is "maybe" instead'),
        ("zero_optimization__offload_param", {"device": "nvme"}, 'must be "cpu" or "none", but is "nvme" instead'),
        ("zero_optimization__offload_param", {"device": "cpu"}, "must be 3 with `offload_param`, but is 0 instead"),
        ("zero_optimization__stage", 5, "must be in [0, 3], but is 5 instead"),
        ("scheduler", {"type": "WarmupLR"}, "The learning-rate schedule is `d2v.schedule`"),
        ("fp16__enabled", True, "must be false without DeepSpeed"),
        ("train_batch_size", 0, "must be in [1, 1000000000], but is 0 instead"),
        ("bf16__check_grad_overflow", False, "`bf16.check_grad_overflow` must be true, but is false instead"),
        ("optimizer__type", "FusedAdam", 'must be "AdamW" without ZeRO, but is "FusedAdam" instead'),
    ],
)
def test_impossible_values(key: str, value: Any, sentence: str) -> None:
    [found] = problems(**{key: value})
    assert sentence in found


def test_offload_needs_a_stage_that_shards() -> None:
    offload = {"device": "cpu"}
    [found] = problems(zero_optimization__offload_optimizer=offload)
    assert "`zero_optimization.stage` must be 1, 2 or 3 with `offload_optimizer`" in found
    accepted = parse(zero_optimization={"stage": 2, "offload_optimizer": offload, "reduce_bucket_size": 5e8})
    assert accepted.deepspeed.zero_optimization.reduce_bucket_size == 500_000_000
    assert accepted.deepspeed.needs_deepspeed(1)


def test_when_deepspeed_is_needed() -> None:
    assert not parse().deepspeed.needs_deepspeed(1)
    assert parse().deepspeed.needs_deepspeed(2)
    assert parse(zero_optimization__stage=1).deepspeed.needs_deepspeed(1)


@pytest.mark.parametrize(
    ("given", "world_size", "expected"),
    [
        ({"train_batch_size": 48}, 4, (48, 12, 1, 4)),
        ({"train_batch_size": 48, "gradient_accumulation_steps": 3}, 4, (48, 4, 3, 4)),
        ({"train_batch_size": 48, "train_micro_batch_size_per_gpu": 6}, 4, (48, 6, 2, 4)),
        ({"train_batch_size": None, "train_micro_batch_size_per_gpu": 6}, 4, (24, 6, 1, 4)),
    ],
)
def test_batch_split(given: dict[str, Any], world_size: int, expected: tuple[int, ...]) -> None:
    assert parse(world_size, **given).deepspeed.batch_split(world_size) == expected


def test_batch_sizes_that_do_not_multiply() -> None:
    [found] = problems(3, train_batch_size=256)
    assert "(85 x 1 x 3 = 255), but is 256 instead. Set it to 255 or 258" in found
    [found] = problems(2, train_batch_size=100, train_micro_batch_size_per_gpu=16, gradient_accumulation_steps=2)
    assert "(16 x 2 x 2 = 64), but is 100 instead. Set it to 64 or 128" in found
    [found] = problems(train_batch_size=None)
    assert "`train_batch_size` must be the number of samples per optimizer step" in found


def test_overrides_are_json(tmp_path: Path) -> None:
    file = tmp_path / "c.json"
    file.write_text(json.dumps(MINIMAL))
    config = load_config(
        file, ["d2v.model.depth=8", "optimizer.params.lr=2e-3", "d2v.data.path=/a=b", 'd2v.schedule={"steps": 7}']
    )
    assert config.d2v.model.depth == 8
    assert config.deepspeed.optimizer.params.lr == 2e-3
    assert config.d2v.data.path == "/a=b"
    assert config.d2v.schedule.steps == 7
    for wrong in ("d2v.model.depth", "=3", "d2v..depth=3", "train_batch_size.x=3"):
        with pytest.raises(ConfigError, match="--set"):
            load_config(file, [wrong])


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (
            '{"train_batch_size": 8, "train_batch_size": 9}',
            "`train_batch_size` appears twice in one section (8, then 9)",
        ),
        ('{"gradient_clipping": NaN}', "`NaN` is not a JSON number"),
        ('{"gradient_clipping": -Infinity}', "`-Infinity` is not a JSON number"),
        ("{\n  'a': 1}", "not valid JSON: Expecting property name enclosed in double quotes at line 2, column 3"),
        ("[1]", "must hold one section {...}, but holds [1] instead"),
        ("[" * 100_000, "nested too deeply"),
        ('{"d2v": ' + "[" * 40 + "]" * 40 + "}", "nested too deeply: more than 32 levels"),
        ('{"train_batch_size": ' + "9" * 5000 + "}", "holds 999999999999999999..., an integer of more than 18 digits"),
        ('{"d2v": {}}' + " " * 1_000_000, "longer than 1,000,000 bytes"),
        ('{"\\ud800": 1, "d2v": {}}', "`\\ud800` is not a known key"),
        ('{"\\u001b[2Jx": 1, "d2v": {}}', "`\\x1b[2Jx` is not a known key"),
        ("{}", "`d2v` is required, but missing"),
    ],
)
def test_files_that_are_no_configuration(text: str, sentence: str, tmp_path: Path) -> None:
    file = tmp_path / "c.json"
    file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_config(file)
    assert sentence in str(caught.value)
    assert str(file) in str(caught.value)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="must be a readable JSON file"):
        load_config(tmp_path / "none.json")
    with pytest.raises(ConfigError, match="must be a readable JSON file"):
        load_config(tmp_path)


def test_override_beyond_the_limits_is_text() -> None:
    for value in ("9" * 5000, "[" * 100_000):
        [found] = problems_of([f"d2v.model.depth={value}"])
        assert "`d2v.model.depth` must be an integer, but is" in found


def test_nan_in_an_override_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"`optimizer\.params\.lr` must be a finite number, but is NaN instead"):
        parse_config(apply_overrides(MINIMAL, ["optimizer.params.lr=NaN"]))


def test_digest_tells_what_decides_the_numbers() -> None:
    digest = parse().digest()
    assert digest == parse(d2v__run__name="x", d2v__run__log_every=3, d2v__data__num_workers=7).digest()
    assert digest == parse(d2v__run__dir="y", d2v__run__keep=1, d2v__run__cuda_graph_shapes=2).digest()
    assert digest != parse(d2v__run__seed=1).digest()
    assert digest != parse(d2v__run__kept_samples="fixed").digest()
    assert digest != parse(d2v__run__cuda_graph=False).digest()
    assert digest != parse(optimizer__params__lr=2e-3).digest()


def test_changed_keys() -> None:
    old, new = parse().to_dict(), parse(d2v__model__depth=6, gradient_clipping=1.0).to_dict()
    assert changed_keys(old, new) == ["d2v.model.depth: 12 -> 6", "gradient_clipping: null -> 1.0"]
    assert changed_keys(old, old) == []


def leaves(section: dict[str, Any], prefix: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    found = []
    for key, value in section.items():
        found += leaves(value, (*prefix, key)) if isinstance(value, dict) else [(*prefix, key)]
    return found


FULL = load_config(CONFIGS / "digits.json").to_dict()


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(leaves(FULL)), st.data())
def test_any_edit_of_a_key_is_noticed(path: tuple[str, ...], data: st.DataObject) -> None:
    """One inserted, dropped or changed letter in any key is refused, by its name."""
    key = path[-1]
    place = data.draw(st.integers(0, len(key)))
    letter = data.draw(st.sampled_from(string.ascii_lowercase + "_"))
    drop = data.draw(st.booleans())
    typo = key[:place] + ("" if drop else letter) + key[place + drop :]
    raw = copy.deepcopy(FULL)
    section = raw
    for part in path[:-1]:
        section = section[part]
    value = section.pop(key)
    if typo in section or typo == key:
        return
    section[typo] = value
    with pytest.raises(ConfigError) as caught:
        parse_config(raw)
    assert f"`{'.'.join([*path[:-1], typo])}` (value" in str(caught.value)


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(leaves(FULL)),
    st.sampled_from(["text", -1, 1.5, 10**9, True, None, [], {}, [1, 2, 3], float("inf")]),
)
def test_any_value_is_accepted_or_refused_in_words(path: tuple[str, ...], value: Any) -> None:
    raw = copy.deepcopy(FULL)
    section = raw
    for part in path[:-1]:
        section = section[part]
    section[path[-1]] = value
    try:
        json.dumps(parse_config(raw).to_dict(), allow_nan=False)
    except ConfigError as error:
        said = error.problems
        # every sentence names a key
        if not said or any(text.count("`") < 2 for text in said):
            raise
