"""`d2v-fast import`: turn another library's weights into a Transformers folder, or into the beginning of a run.

    d2v-fast import audio_base_ls.pt --to exported                    # fairseq -> Transformers
    d2v-fast import beit_base_checkpoint.pth --to exported            # of images -> Transformers
    d2v-fast import nlp_base.pt --tokenizer roberta --to exported     # of text, with its tokenizer
    d2v-fast import audio_base_ls.pt --to runs/more --ds_config configs/speech_base.json
    python d2v_fast/train.py --run more --resume                      # pre-training continues from these weights

A run that begins with given weights looks like one that was saved before its first step: it has student, head and
teacher, but no optimizer moments, and its schedules are at their beginning.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from d2v_fast.checkpoints.shard_files import Kept
from d2v_fast.checkpoints.store import Checkpoints
from d2v_fast.command_lines import path_words, resume_command, tool_command
from d2v_fast.config import PretrainConfig, RunConfig, load_config
from d2v_fast.config.errors import ConfigError, Section, show
from d2v_fast.config.file import apply_overrides
from d2v_fast.config.model_paths import explain
from d2v_fast.distributed.shards import find_shards
from d2v_fast.distributed.world import World
from d2v_fast.errors import OptionError
from d2v_fast.files.outputs import require_free
from d2v_fast.interop.fairseq_files import chosen
from d2v_fast.interop.fairseq_recipe import Settings
from d2v_fast.interop.formats import Pretrained, forms_of
from d2v_fast.interop.huggingface import export_model, import_model, options_of_run
from d2v_fast.interop.published import open_published, read_published
from d2v_fast.modalities import modality_of, modality_of_model
from d2v_fast.models.student import Student
from d2v_fast.objectives.build import build_model
from d2v_fast.objectives.data2vec import Data2Vec
from d2v_fast.teacher import Teacher
from d2v_fast.training.resume_rules import changed_model
from d2v_fast.training.run_folder import RunFolder
from d2v_fast.training.run_state import DataIdentity, RunSaver

# suffixes of files that belong to a folder
_PARTS = (".json", ".model", ".safetensors", ".txt")


def import_folder(
    source: Path,
    to: Path,
    *,
    weights: str = "student",
    heads: int | None = None,
    tokenizer: Path | None = None,
    overrides: Iterable[str] = (),
    overwrite: bool = False,
) -> str:
    """Write a Transformers folder from a checkpoint of the published code; returns lines for the user.

    Args:
        source: The `.pt` file of fairseq, or the `.pth` file of the published vision code.
        to: The folder to write.
        weights, heads: See `load_published`.
        tokenizer: The tokenizer to copy into the folder of a text model, since a `.pt` holds none.
        overrides: `d2v.model.KEY=VALUE` each. They have precedence over the checkpoint.
        overwrite: Replace the files of an earlier export in `to`.
    Raises:
        ValueError: See `load_published`; the source is a folder; or the tokenizer cannot be read, or is not the
            model's.
        ConfigError: An override is of another section, or its value is refused.
    """
    _require_weights(source)
    if source.is_dir():
        raise OptionError(f"`--ds_config` must be given with `{source}`, which is a Transformers folder already.")
    require_free(to, overwrite)
    settings = Settings.of(_model_overrides(overrides), heads)
    form, found = open_published(source, settings)
    model, config = chosen(found.student, found.teacher, weights, source, form.average), found.config
    options: dict[str, Any] = {}
    if tokenizer is not None:
        load = modality_of_model(config).tokenizer
        if load is None:
            raise OptionError(f"`--tokenizer` is for text, but `{source}` holds another model.")
        options["tokenizer"] = load(None, tokenizer, None, str(source))
    export_model(model, config, to, info={"weights": weights, "from": "a checkpoint of the published code"}, **options)
    return f"import: {to} ({weights} of {source.name}, for Transformers){_told(source, found.assumed)}"


def start_run(
    source: Path, to: Path, ds_config: Path, *, overrides: Iterable[str] = (), heads: int | None = None
) -> str:
    """Make the folder of a run whose first checkpoint, `step-0`, holds given weights; returns a line for the user.

    Args:
        source: A `.pt` of fairseq or a `.pth` of the published vision code, whose head and average are used; or a
            Transformers folder, which has neither: then the head is new and the teacher is a copy of the student. If
            the folder holds a `tokenizer.json`, the run refuses another tokenizer.
        to: The folder of the run, `DIR/NAME`; it must not exist.
        ds_config, overrides: The configuration of the run. It also says which parts teacher and student share.
        heads: Attention heads, if a `.pt` does not say.
    Raises:
        ValueError: The source cannot be read, or its encoder differs from the configuration's.
        RunError: The run exists.
    """
    named = [f"d2v.run.dir={json.dumps(str(to.parent))}", f"d2v.run.name={json.dumps(to.name)}"]
    config = load_config(ds_config, [*overrides, *named])
    modality = modality_of(config.d2v)
    if not isinstance(config.d2v, PretrainConfig):
        raise OptionError(
            f'`--ds_config` must be of pre-training, but `d2v.objective` in {ds_config} is "{config.d2v.objective}": '
            f"`{tool_command('finetune', path_words(source), '--ds_config', path_words(ds_config))}` begins such a run."
        )
    if not forms_of(modality):
        raise ValueError(
            f'`import` has no format for runs of modality "{modality.name}": no other library has such an encoder. '
            f"`{tool_command('train', path_words(ds_config))}` begins with new weights."
        )
    _require_weights(source)
    weights = _read(source, heads, config.d2v)
    config = _with_open_sizes(config, weights.config)
    _require_same(config.d2v.model, weights.config, source, ds_config)
    model, average = _networks(config.pretraining, weights)
    _write_run(config, to, model, average, _vocabulary(source, weights.config))
    beside = "its own teacher" if weights.teacher is not None else "the student as teacher"
    if weights.pending_decay is not None:
        beside += f", after the update of decay {weights.pending_decay:.6g} that it lacked"
    line = f"import: {to} begins with {source.name} ({beside}); to train: {resume_command(to)}"
    return line + _told(source, weights.assumed)


def _networks(config: PretrainConfig, weights: Pretrained) -> tuple[Data2Vec, Teacher]:
    """Return a model and its teacher with given weights; what these lack is new."""
    torch.manual_seed(config.run.seed)
    model = build_model(config)
    model.student.load_state_dict(_arranged(weights.student.state_dict(), model.student))
    if weights.head is not None:
        model.head.load_state_dict(weights.head)
    average = Teacher(model.student.averaged, config.teacher)
    if weights.teacher is not None:
        whole = _arranged(weights.teacher.state_dict(), model.student)
        prefix = model.student.averaged_prefix()
        for shard in average.shards:
            value = shard.master.copy_(whole[prefix + shard.name].view(-1))
            if weights.pending_decay is not None:
                own = model.student.get_parameter(prefix + shard.name).detach().view(-1)
                value.lerp_(own, 1 - weights.pending_decay)
        average.refresh(0)
    return model, average


def _write_run(config: RunConfig, to: Path, model: Data2Vec, average: Teacher, vocabulary: str | None) -> None:
    """Write the folder of a run that is saved before its first step.

    Raises:
        RunError: The run exists, or the folder cannot be written.
    """
    world = World("cpu", False)
    try:
        is_new = not to.exists()
        folder = RunFolder.create(to.parent, to.name, to.name)
        try:
            checkpoints = Checkpoints(folder.path / "checkpoints", config.d2v.run.keep, world)
            data = DataIdentity(vocabulary, None)
            RunSaver(config, world, average, _Unstarted(model), checkpoints, data).save(0)
            folder.write_config(config)
        except BaseException:
            # a half-made folder is of no use
            if is_new:
                shutil.rmtree(folder.path, ignore_errors=True)
            raise
        finally:
            folder.close()
    finally:
        world.close()


class _Weights(NamedTuple):
    """Weights that a run begins with; see `Pretrained`."""

    student: Student
    teacher: Student | None
    head: dict[str, Tensor] | None
    config: Section
    assumed: tuple[str, ...] = ()
    pending_decay: float | None = None


class _Unstarted:
    """Stand in for an engine when a model is saved that no optimizer has stepped."""

    def __init__(self, model: Data2Vec) -> None:
        self._model = model

    def kept(self) -> list[Kept]:
        return [Kept("student", shard) for shard in find_shards(self._model.named_parameters(), None)]

    def state(self) -> dict[str, Any]:
        return {"optimizer_step": 0}

    def signature(self) -> dict[str, Any]:
        return {"engine": None, "processes": None, "zero_stage": None, "optimizer": None}


def _require_weights(source: Path) -> None:
    """Refuse a path that can be neither a checkpoint nor a Transformers folder; the error says what it is."""
    is_pickle = source.suffix == ".bin" and (source.parent / "config.json").is_file()
    if source.is_dir() or (source.is_file() and (source.suffix in _PARTS or is_pickle)):
        reason = explain(source)
        if reason is not None:
            raise ValueError(
                f"`SOURCE` must be a Transformers folder, or a .pt or .pth file of the published code. {reason}"
            )


def _read(source: Path, heads: int | None, run: PretrainConfig) -> Pretrained:
    """Read a checkpoint or a Transformers folder for a run that is to begin with it."""
    wanted = run.model
    if not source.is_dir():
        return read_published(source, Settings.of(None, heads)._replace(run=wanted.model_dump()))
    model, config = import_model(source, **options_of_run(source, wanted))
    return _Weights(model, None, None, config)


def _model_overrides(overrides: Iterable[str]) -> Mapping[str, Any]:
    """Return the values of `d2v.model` in the overrides.

    Raises:
        ConfigError: An override is of another section.
    """
    overrides = list(overrides)
    for override in overrides:
        key = override.partition("=")[0].strip()
        if not key.startswith("d2v.model."):
            problem = f"`--set {override}` must name a key of `d2v.model`, unless `--ds_config` names a configuration."
            raise ConfigError([problem], "command line")
    return apply_overrides({}, overrides).get("d2v", {}).get("model", {})


def _told(source: Path, assumed: Sequence[str]) -> str:
    """Return further lines for the user that list the assumptions about a model."""
    if not assumed:
        return ""
    lines = "".join(f"\n  {phrase}" for phrase in assumed)
    return f"\n{source.name} does not say all of it. Assumed, unless `--set d2v.model.KEY=VALUE` says otherwise:{lines}"


def _with_open_sizes(config: RunConfig, found: Section) -> RunConfig:
    """Fill in what the run's model section leaves open, such as the vocabulary, from the weights."""
    model = config.d2v.model
    if type(found) is not type(model):
        return config
    model = model.model_copy(update={key: getattr(found, key) for key, value in model if value is None})
    return config.model_copy(update={"d2v": config.d2v.model_copy(update={"model": model})})


def _vocabulary(source: Path, config: Section) -> str | None:
    """Return the digest of the tokenizer that lies beside a model; None if there is none."""
    made = modality_of_model(config).huggingface
    return None if made is None else made().vocabulary(source)


def _require_same(wanted: Section, found: Section, source: Path, ds_config: Path) -> None:
    """Refuse weights whose encoder differs from the run's; the error lists every difference."""
    if type(wanted) is not type(found):
        theirs, own = modality_of_model(found), modality_of_model(wanted)
        key, value = ("modality", theirs.name) if theirs.name != own.name else ("objective", theirs.objective)
        raise ValueError(f'`d2v.{key}` in {ds_config} must be "{value}" as in {source}, but is another.')
    lines = [
        f"`d2v.model.{key}` must be {show(value)}, but is {show(mine)} instead"
        for key, value, mine in changed_model(found.model_dump(mode="json"), wanted.model_dump(mode="json"))
    ]
    if lines:
        raise ValueError(f"{source} is of another encoder than {ds_config} says:\n  " + "\n  ".join(lines))


def _arranged(state: Mapping[str, Tensor], model: Student) -> dict[str, Tensor]:
    """Rename the positional convolutions for a model that has them in the averaged part, or before it."""
    expected = model.state_dict().keys()
    prefix = model.averaged_prefix()
    arranged = {}
    for name, value in state.items():
        other = name.removeprefix(prefix) if name.startswith(prefix) else prefix + name
        arranged[name if name in expected else other] = value
    return arranged
