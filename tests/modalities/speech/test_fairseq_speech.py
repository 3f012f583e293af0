"""Test reading and writing fairseq speech checkpoints: names, shapes and refusals."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from d2v_fast.commands.console import main
from d2v_fast.config import SpeechConfig, SpeechModelConfig, check_d2v
from d2v_fast.interop.sources import fill
from d2v_fast.modalities.speech import fairseq as fairseq_speech
from d2v_fast.modalities.speech.encoder import SpeechModel
from d2v_fast.modalities.speech.fairseq import (
    load_fairseq_speech,
    parse_layers,
    read_fairseq_speech,
    save_fairseq_speech,
)
from d2v_fast.modalities.speech.huggingface import import_speech
from d2v_fast.modalities.speech.layout import speech_layout
from d2v_fast.objectives.build import build_model, build_objective
from tests.helpers.fairseq_reference import Data2VecAudio
from tests.helpers.fairseq_speech_files import LAYERS, pretrained, saved, shapes
from tests.helpers.speech_models import make_config, make_pair
from tests.helpers.speech_reference import randomize_


@pytest.mark.parametrize("head", ["final_proj", "final_proj.0"])
@pytest.mark.parametrize("weights", ["student", "teacher"])
def test_hand_made_checkpoint(head: str, weights: str, tmp_path: Path) -> None:
    content = pretrained(head)
    given = content["model"]
    model, found_head, config = load_fairseq_speech(saved(content, tmp_path), weights=weights)
    assert config == SpeechModelConfig(
        sample_rate=8_000,
        conv_width=8,
        width=32,
        depth=2,
        heads=4,
        mlp_ratio=1.5,
        dropout=0.2,
        attention_dropout=0.0,
        activation_dropout=0.05,
        input_dropout=0.3,
        layer_drop=0.1,
        position_in_teacher="averaged",
    )
    assert found_head is not None
    assert torch.equal(found_head["weight"], given[f"{head}.weight"])
    assert torch.equal(found_head["bias"], given[f"{head}.bias"])
    factor = 2 if weights == "teacher" else 1
    state = model.state_dict()
    assert torch.equal(state["front_end.mask_token"], given["mask_emb"])
    first = given["feature_extractor.conv_layers.1.0.weight"]
    assert torch.equal(state["front_end.convolutions.weights.1"], first.permute(0, 2, 1))
    assert torch.equal(state["context.positions.convolutions.4.bias"], factor * given["encoder.pos_conv.4.0.bias"])
    assert torch.equal(state["context.norm.weight"], factor * given["encoder.layer_norm.weight"])
    layer = "encoder.layers.1.self_attn"
    q, k, v = (given[f"{layer}.{name}_proj.weight"] for name in "qkv")
    assert torch.equal(state["context.encoder.blocks.1.attention.qkv.weight"], factor * torch.cat([q, k, v]))
    assert torch.equal(state["context.encoder.blocks.1.fc2.weight"], factor * given["encoder.layers.1.fc2.weight"])
    assert all(parameter.requires_grad for parameter in model.parameters())


@torch.no_grad()
def test_a_model_of_fairseqs_build_fits(tmp_path: Path) -> None:
    """Load strictly by name and shape, and compute the same features."""
    config = make_config(position_in_teacher="averaged")
    model, average = make_pair(config)
    teacher = model.student.with_averaged(average).eval()
    save_fairseq_speech(model.student, model.head, teacher, config, tmp_path / "a.pt")
    raw = torch.load(tmp_path / "a.pt", weights_only=True)
    cfg = raw["cfg"]["model"]
    theirs = Data2VecAudio(cfg, parse_layers(cfg["conv_feature_layers"])).eval()
    ema = raw["model"].pop("_ema")
    theirs.load_state_dict(raw["model"])
    waveforms = torch.randn(2, 700)
    student = model.student.eval()
    torch.testing.assert_close(theirs(waveforms), student(waveforms).last_hidden, rtol=0, atol=1e-5)
    theirs.encoder.load_state_dict(ema)
    torch.testing.assert_close(theirs(waveforms), teacher(waveforms).last_hidden, rtol=0, atol=1e-5)

    randomize_(theirs)
    torch.save({"model": theirs.state_dict(), "cfg": raw["cfg"]}, tmp_path / "b.pt")
    ours, _, _ = load_fairseq_speech(tmp_path / "b.pt")
    torch.testing.assert_close(ours.eval()(waveforms).last_hidden, theirs(waveforms), rtol=0, atol=1e-5)


def test_names_and_shapes_of_the_base_size() -> None:
    config = SpeechModelConfig()
    with torch.device("meta"):
        model = SpeechModel(config)
    layout = speech_layout(config, fairseq_speech.NAMES)
    state = {name: value.shape for name, value in model.state_dict().items()}
    found = {}
    for name, their_names in layout.names.items():
        for their_name in their_names:
            found[their_name] = tuple(layout._their_shape(their_name, list(state[name]), len(their_names)))
    assert found == shapes(512, 768, 3072, 12)
    assert sum(torch.Size(shape).numel() for shape in found.values()) == 93_164_288
    average = {name: shape for name, shape in found.items() if name.startswith("encoder.")}
    assert len(average) == 204
    assert sum(torch.Size(shape).numel() for shape in average.values()) == 88_561_920


def test_without_cfg_sizes_come_from_the_tensors(tmp_path: Path) -> None:
    content = pretrained(width=128)
    del content["cfg"]
    # a teacher that shares the positions stores a copy of them
    for name in list(content["model"]["_ema"]):
        if name.startswith("pos_conv."):
            content["model"]["_ema"][name] = content["model"][f"encoder.{name}"]
    path = saved(content, tmp_path)
    _, _, config = load_fairseq_speech(path)
    published = {"conv_width": 8, "width": 128, "depth": 2, "heads": 2, "mlp_ratio": 0.375}
    assert config == SpeechModelConfig(**published)
    assert load_fairseq_speech(path, heads=8)[2].heads == 8
    wanted = SpeechModelConfig(**{**published, "heads": 4, "dropout": 0.0})
    assert load_fairseq_speech(path, config=wanted)[2] == wanted
    content["model"] = {n: v[:, :, :1] if "conv_layers.6.0" in n else v for n, v in content["model"].items()}
    with pytest.raises(ValueError, match=r"`d2v.model.conv_strides` must be given for .*convolutions have the kernels"):
        load_fairseq_speech(saved(content, tmp_path))


def test_low_precision_and_an_average_of_everything(tmp_path: Path) -> None:
    content = pretrained()
    own = {name: value.half() for name, value in content["model"].items() if name != "_ema"}
    content["model"] = {**own, "_ema": {name: 3 * value.float() for name, value in own.items()}}
    found = read_fairseq_speech(saved(content, tmp_path))
    assert found.teacher is not None
    for student, teacher in zip(found.student.parameters(), found.teacher.parameters(), strict=True):
        assert student.dtype == teacher.dtype == torch.float32
        assert torch.equal(teacher, 3 * student)


def test_fine_tuned_model(tmp_path: Path) -> None:
    content = pretrained()
    encoder = {n: v for n, v in content["model"].items() if not n.startswith(("_ema", "final_proj"))}
    model = {f"w2v_encoder.w2v_model.{name}": value for name, value in encoder.items()}
    model |= {"w2v_encoder.proj.weight": torch.randn(40, 32), "w2v_encoder.proj.bias": torch.randn(40)}
    path = saved({"model": model, "cfg": {"model": {"w2v_args": content["cfg"], "dropout": 0.9}}}, tmp_path)
    student, head, config = load_fairseq_speech(path)
    assert head is None
    assert (config.heads, config.dropout) == (4, 0.2)
    assert torch.equal(student.front_end.mask_token, content["model"]["mask_emb"])
    with pytest.raises(ValueError, match=r"`weights` must be student with .* which holds no average `_ema`"):
        load_fairseq_speech(path, weights="teacher")
    # it goes on training, with new letters
    section = {
        "modality": "speech",
        "objective": "ctc",
        "finetune": {"source": str(path)},
        "labels": ["<pad>", "|", "a"],
    }
    settings, problems = check_d2v(fill(section))
    assert problems == []
    model = build_objective(settings)
    model.begin()
    state = student.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in model.student.state_dict().items())


@pytest.mark.parametrize("where", ["shared", "averaged"])
def test_round_trip_is_exact(where: str, tmp_path: Path) -> None:
    config = make_config(position_in_teacher=where)
    model, average = make_pair(config)
    teacher = model.student.with_averaged(average)
    save_fairseq_speech(model.student, model.head, teacher, config, tmp_path / "a.pt", num_updates=12)
    found = read_fairseq_speech(tmp_path / "a.pt")
    assert found.config == config.model
    assert found.teacher is not None
    assert found.head is not None
    for ours, theirs in ((model.student, found.student), (teacher, found.teacher)):
        expected = ours.state_dict()
        assert expected.keys() == theirs.state_dict().keys()
        assert all(torch.equal(value, expected[name]) for name, value in theirs.state_dict().items())
    assert all(torch.equal(value, found.head[name]) for name, value in model.head.state_dict().items())

    raw = torch.load(tmp_path / "a.pt", weights_only=True)
    assert {value.dtype for name, value in raw["model"].items() if name != "_ema"} == {torch.float32}
    assert raw["cfg"]["model"]["conv_pos"] == config.model.position_kernel * config.model.position_depth
    assert raw["cfg"]["model"]["ema_layers_only"] == (where == "shared")
    assert [path.name for path in tmp_path.iterdir()] == ["a.pt"]
    # write what was read, and read it again
    save_fairseq_speech(found.student, found.head, found.teacher, config, tmp_path / "b.pt", num_updates=12)
    again = torch.load(tmp_path / "b.pt", weights_only=True)
    for part, other in ((raw["model"], again["model"]), (raw["model"].pop("_ema"), again["model"].pop("_ema"))):
        assert part.keys() == other.keys()
        assert all(torch.equal(value, other[name]) for name, value in part.items())


def test_hand_made_checkpoint_comes_back_as_it_was(tmp_path: Path) -> None:
    content = pretrained()
    found = read_fairseq_speech(saved(content, tmp_path))
    config = SpeechConfig(model=found.config, target=make_config().target)
    save_fairseq_speech(found.student, found.head, found.teacher, config, tmp_path / "back.pt")
    back = torch.load(tmp_path / "back.pt", weights_only=True)["model"]
    for part, other in ((back.pop("_ema"), content["model"].pop("_ema")), (back, content["model"])):
        assert part.keys() == other.keys()
        assert all(torch.equal(value, other[name]) for name, value in part.items())
    save_fairseq_speech(found.student, None, None, config, tmp_path / "bare.pt")
    bare = read_fairseq_speech(tmp_path / "bare.pt")
    assert bare.head is None
    assert bare.teacher is None


@pytest.mark.parametrize(("name", "value"), [("position_depth", 1), ("position_kernel", 1)])
def test_positions_that_fairseq_does_not_have(name: str, value: int, tmp_path: Path) -> None:
    config = make_config(**{name: value})
    model = build_model(config)
    with pytest.raises(ValueError, match=rf"`d2v.model.{name}` must be >= \d for fairseq, but is 1 instead"):
        save_fairseq_speech(model.student, model.head, None, config, tmp_path / "a.pt")
    assert not list(tmp_path.iterdir())


def drop(*names: str) -> Callable[[dict[str, Any]], None]:
    def change(content: dict[str, Any]) -> None:
        for name in names:
            holder = content["model"]["_ema"] if name.startswith("_ema.") else content["model"]
            del holder[name.removeprefix("_ema.")]

    return change


def put(**values: Any) -> Callable[[dict[str, Any]], None]:
    return lambda content: content["model"].update({name.replace("__", "."): value for name, value in values.items()})


def options(**values: Any) -> Callable[[dict[str, Any]], None]:
    return lambda content: content["cfg"]["model"].update(values)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop("mask_emb"), r"is no data2vec speech model of 2 blocks of width 32:\n  `mask_emb` is missing$"),
        (drop("encoder.layers.1.fc1.bias"), r"`encoder.layers.1.fc1.bias` is missing"),
        (drop("_ema.layers.0.fc1.bias"), r"`_ema.layers.0.fc1.bias` is missing"),
        (
            put(encoder__layer_norm__bias=torch.zeros(3)),
            r"`encoder.layer_norm.bias` must be \[32\], but is \[3\] instead",
        ),
        (
            put(encoder__pos_conv__2__0__weight=torch.zeros(32, 2)),
            r"pos_conv.2.0.weight` must be \[32, 2, 19\], but is \[32, 2\]",
        ),
        (put(encoder__extra=torch.zeros(3)), r"`encoder.extra` has no place in this encoder"),
        (
            put(final_proj__weight=torch.zeros(4, 32)),
            r"`final_proj.weight` must be \[32, 32\], but is \[4, 32\] instead",
        ),
        (put(final_proj__2__weight=torch.zeros(32, 32)), r"`final_proj.2.weight` has no place"),
        (put(mask_emb=[1.0, 2.0]), r"`mask_emb` is no tensor"),
        (
            put(encoder__sentence_encoder__version=torch.zeros(1)),
            r"holds a text model: `encoder.sentence_encoder.version`",
        ),
        (
            put(modality_encoders__AUDIO__x=torch.zeros(1)),
            r"holds a model of data2vec 2.0: `modality_encoders.AUDIO.x`",
        ),
        (put(patch_embed__proj__weight=torch.zeros(1)), r"holds an image model: `patch_embed.proj.weight`"),
        (put(quantizer__vars=torch.zeros(1)), r"holds a model of wav2vec 2.0: `quantizer.vars`"),
        (options(layer_norm_first=True), r"`layer_norm_first` in the `cfg` of .* must be false, but is true instead"),
        (options(extractor_mode="default"), r'`extractor_mode` in .* must be "layer_norm", but is "default" instead'),
        (options(encoder_attention_heads=5), r"`heads` must divide `width`"),
        (options(conv_feature_layers="__import__('os').abort()"), r"`conv_feature_layers` must be of the form"),
        (options(conv_feature_layers="[(512, 10, 5)]"), r"`conv_strides` must hold as many values as `conv_kernels`"),
    ],
)
def test_what_does_not_fit_is_named(change: Callable[[dict[str, Any]], None], message: str, tmp_path: Path) -> None:
    content = pretrained()
    change(content)
    with pytest.raises(ValueError, match=message):
        load_fairseq_speech(saved(content, tmp_path))


def test_long_lists_are_cut(tmp_path: Path) -> None:
    content = pretrained()
    for name in [name for name in content["model"] if name.startswith("feature_extractor.")]:
        del content["model"][name]
    with pytest.raises(ValueError, match=r"\n  and 11 more$") as caught:
        load_fairseq_speech(saved(content, tmp_path))
    assert len(str(caught.value).splitlines()) == 12
    assert len(caught.value.problems) == 21  # type: ignore[attr-defined]


class Executed:
    """An object whose unpickling would write a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_code_is_refused_with_a_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # a user has not set this variable, but an earlier test in this process may have
    monkeypatch.delenv("TORCH_FORCE_WEIGHTS_ONLY_LOAD", raising=False)
    content = {**pretrained(), "args": argparse.Namespace(arch="data2vec_audio")}
    path = saved(content, tmp_path)
    with pytest.raises(ValueError, match=r"needs argparse\.Namespace, and reading that could execute code") as caught:
        load_fairseq_speech(path)
    exec(str(caught.value).partition("\n\n")[2], {})
    stripped, _, config = load_fairseq_speech(tmp_path / "checkpoint-weights.pt")
    assert torch.equal(stripped.front_end.mask_token, content["model"]["mask_emb"])
    assert (config.heads, config.layer_drop, config.sample_rate) == (4, 0.1, 8_000)

    marker = tmp_path / "executed"
    with pytest.raises(ValueError, match="could execute code"):
        load_fairseq_speech(saved({**pretrained(), "cfg": Executed(marker)}, tmp_path))
    assert not marker.exists()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda content: content[: len(content) // 2], r"cannot be read: .*not a zip file \(was it copied completely"),
        (lambda content: b"", "cannot be read: ValueError pickle exhausted"),
        (lambda content: b"hello, this is a text", "that torch.save wrote, but is a file of another kind"),
        (lambda content: b"%PDF-1.4\n", "that torch.save wrote, but is a file of another kind"),
        (lambda content: b"\x80\x02 and no more", "cannot be read"),
        (lambda content: content[:120] + b"\xff" * 64 + content[184:], "cannot be read"),
    ],
)
def test_damaged_files(damage: Callable[[bytes], bytes], message: str, tmp_path: Path) -> None:
    path = saved(pretrained(), tmp_path)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=message):
        load_fairseq_speech(path)


def test_files_that_are_something_else(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is a folder instead"):
        load_fairseq_speech(tmp_path)
    with pytest.raises(ValueError, match=r"with a `model`, but holds optimizer, epoch\\n instead"):
        load_fairseq_speech(saved({"optimizer": {}, "epoch\n": 3}, tmp_path))
    with pytest.raises(ValueError, match=r"`weights` must be student or teacher, but is ema instead"):
        load_fairseq_speech(saved(pretrained(), tmp_path), weights="ema")


@pytest.mark.parametrize(
    ("text", "layers"),
    [
        (LAYERS, [(512, 10, 5), *[(512, 3, 2)] * 4, (512, 2, 2), (512, 2, 2)]),
        ("[(8,9,4), (8, 3, 2)]*2", [(8, 9, 4), (8, 3, 2)] * 2),
    ],
)
def test_layers_are_read_without_evaluating_them(text: str, layers: list[tuple[int, int, int]]) -> None:
    assert parse_layers(text) == layers


@pytest.mark.parametrize(
    "text", ["", "[]", "[(1, 2)]", "[(8, 9, 4)] * 4 * 4", "[(8, 9, 4)] * 1000", "[(8, 9, 4)].x", "()"]
)
def test_layers_of_another_form(text: str) -> None:
    with pytest.raises(ValueError, match="`conv_feature_layers` must be of the form"):
        parse_layers(text)


@pytest.mark.parametrize("weights", ["student", "teacher"])
def test_import_to_transformers(weights: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = pretrained()
    path = saved(content, tmp_path)
    assert main(["import", str(path), "--to", str(tmp_path / "out"), "--weights", weights]) == 0
    assert f"({weights} of checkpoint.pt, for Transformers)" in capsys.readouterr().out
    model, config = import_speech(tmp_path / "out")
    assert (config.heads, config.layer_drop) == (4, 0.1)
    factor = 2 if weights == "teacher" else 1
    assert torch.equal(model.context.norm.bias, factor * content["model"]["encoder.layer_norm.bias"])
    card = (tmp_path / "out" / "README.md").read_text()
    assert "How it was pre-trained" not in card
    assert main(["import", str(tmp_path / "out"), "--to", str(tmp_path / "again")]) == 2
    assert "which is a Transformers folder already" in capsys.readouterr().err
    assert main(["import", str(path), "--to", str(tmp_path / "none"), "--heads", "5"]) == 2
    assert "`heads` must divide `width`" in capsys.readouterr().err
