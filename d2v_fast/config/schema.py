"""The configuration of a run: one JSON file with DeepSpeed's keys and a `"d2v"` section for everything else.

`load_config` reads the file, applies `--set` overrides, and reports all unknown keys, wrong types and impossible values
in one error. Sections of one modality are in `modalities.<name>.config`; the registry of modalities names the class of
the `"d2v"` section. Nothing here imports torch, so that a wrong file is refused at once.
"""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, ValidationError, model_validator
from typing_extensions import Self

from d2v_fast.config.deepspeed import REFUSED_KEYS, BatchSplit, DeepSpeedConfig, refused
from d2v_fast.config.errors import (
    MAX_SIZE,
    MAX_STEPS,
    ConfigError,
    Problem,
    Section,
    check,
    known_keys,
    refuse_if,
    say,
)
from d2v_fast.config.file import apply_overrides, changed_keys, configuration_file, read_sections
from d2v_fast.config.file import section as raw_section
from d2v_fast.config.guard import GuardConfig, StepGuardConfig
from d2v_fast.config.probe import ProbeConfig
from d2v_fast.config.run import RunSection
from d2v_fast.config.schedule import ScheduleConfig
from d2v_fast.files.reading import NotRegularError, read_text
from d2v_fast.modalities import BUILT_IN, ModalityError, modality_named, modality_names

__all__ = [
    "EARLIER_VALUES",
    "BatchSplit",
    "ConfigError",
    "D2VConfig",
    "DataSection",
    "DeepSpeedConfig",
    "GuardConfig",
    "LossConfig",
    "ModelSection",
    "PretrainConfig",
    "ProbeConfig",
    "RunConfig",
    "RunSection",
    "ScheduleConfig",
    "StepGuardConfig",
    "TargetConfig",
    "TeacherConfig",
    "apply_overrides",
    "changed_keys",
    "check_d2v",
    "load_config",
    "parse_config",
]

MAX_FILE_BYTES = 1_000_000
# keys of `d2v` that older runs lack -> value that those runs used
EARLIER_VALUES = {"decay_1d": False, "objective": "data2vec"}
# modality of a file without the key `d2v.modality`
DEFAULT_MODALITY = "vision"
# objective of a file without the key `d2v.objective`
DEFAULT_OBJECTIVE = "data2vec"


class ModelSection(Section):
    """The sizes of an encoder. A modality's class defines the fields, because the saved file has them in its order.

    Attributes:
        width: Channels of the encoder.
        depth: Transformer blocks.
    """

    required: ClassVar[tuple[str, ...]] = ("width", "depth")
    if TYPE_CHECKING:
        width: int
        depth: int

    def num_places(self, shape: Sequence[int]) -> int:
        """Return the places of each sample in a batch whose inputs have this shape, padding included."""
        raise NotImplementedError

    def without_skipping(self) -> Self:
        """Return the section with which no sample skips a block or a branch: a step then needs the most memory."""
        return self


class DataSection(Section):
    """Where the samples come from. A modality's class defines the fields, because the saved file has them in its order.

    Attributes:
        only_for: By value of `kind`, the keys that a run reads with this kind only.
        kind: Kind of the data set.
        on_change: When a run is resumed on other samples than its checkpoint was trained on: "refuse" ends it with an
            error, "accept" logs the difference and continues.
        num_workers: Loader processes per training process; 0 loads in the training process.
        max_bad_fraction: The run stops when more than this share of the samples is unreadable.
        strict: Stop at the first unreadable sample.
    """

    required: ClassVar = ("kind", "on_change", "num_workers", "max_bad_fraction", "strict")
    only_for: ClassVar[dict[str, tuple[str, ...]]] = {}
    if TYPE_CHECKING:
        kind: str
        on_change: Literal["refuse", "accept"]
        num_workers: int
        max_bad_fraction: float
        strict: bool


class TargetConfig(Section):
    """What the student regresses: the normalized mean of the teacher's last blocks.

    Attributes:
        top_k: Number of blocks, counted from the last, whose outputs are averaged; at most `d2v.model.depth`.
        layer_norm: Normalization of each block's output: "layer" over channels, "instance" over the places of a sample,
            "batch" over the places of all samples.
        final_norm: Normalization of the mean.
        eps: Added to every variance.
    """

    top_k: int = Field(default=6, ge=1, le=MAX_SIZE)
    layer_norm: Literal["none", "layer", "instance", "batch"] = "layer"
    final_norm: Literal["none", "layer", "instance"] = "layer"
    eps: float = Field(default=1e-5, gt=0, le=1)


class LossConfig(Section):
    """Smooth L1 between prediction and target, averaged over the masked places.

    Attributes:
        beta: Error at which the loss turns from quadratic to linear; 0 is the squared error.
        channel_reduction: A place's loss is the "sum" over the channels, their "mean", or the sum over the root of
            their number ("rsqrt").
        scale: Factor of the loss. With an optimizer that scales gradients itself, as AdamW, and without clipping, it
            changes only what is logged.
    """

    beta: float = Field(default=2.0, ge=0, le=1e6)
    channel_reduction: Literal["mean", "rsqrt", "sum"] = "mean"
    scale: float = Field(default=1.0, gt=0, le=1e6)

    def divisor(self, width: int) -> float:
        """Return the divisor of the sum over `width` channels, with `scale`."""
        return {"mean": width, "rsqrt": width**0.5, "sum": 1}[self.channel_reduction] / self.scale


class TeacherConfig(Section):
    """Decay of the moving average, linear over the first steps and then constant.

    Attributes:
        decay_start: Decay of the first update; 1 freezes the teacher.
        decay_end: Decay from optimizer step `decay_steps` on.
        decay_steps: Optimizer steps over which the decay changes.
    """

    decay_start: float = Field(default=0.9998, ge=0, le=1)
    decay_end: float = Field(default=0.9998, ge=0, le=1)
    decay_steps: int = Field(default=0, ge=0, le=MAX_STEPS)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.decay_start != self.decay_end and self.decay_steps == 0:
            must = f"be >= 1 while `decay_start` ({self.decay_start}) and `decay_end` ({self.decay_end}) differ"
            refuse_if([Problem("decay_steps", must, 0)])
        return self


class D2VConfig(Section):
    """The `"d2v"` section of any run. Each objective of a modality has a subclass with its own sections and defaults.

    Attributes:
        modality: Kind of the data, which decides the encoder and the sections below.
        objective: What the run learns, which decides them as well: "data2vec" (arXiv 2202.03555) and "data2vec2"
            (arXiv 2212.07525) pre-train an encoder; the others fine-tune one.
        decay_1d: Apply `optimizer.params.weight_decay` to 1-D parameters (biases, norms, LayerScale, the class token),
            as the published speech and text recipes do.
        model: The encoder.
        schedule: Learning rate and length of the run.
        data: The data set.
        guard: When a run stops itself.
        run: The run folder, checkpoints and time-outs.
    """

    hints: ClassVar[dict[str, str]] = {
        "compile": "`d2v.run.compile` compiles the blocks.",
        "finetune": "An objective that fine-tunes has it, such as that of the presets `finetune_...`.",
    }

    modality: str
    objective: str = DEFAULT_OBJECTIVE
    decay_1d: bool = False
    model: ModelSection
    schedule: ScheduleConfig
    data: DataSection
    guard: StepGuardConfig = StepGuardConfig()
    run: RunSection = RunSection()

    @classmethod
    def chosen(cls, raw: Mapping[str, Any]) -> type[Self]:
        """Return the class of a section with these keys: this one, or a subclass."""
        return cls

    @model_validator(mode="after")
    def _check(self) -> Self:
        refuse_if(self.problems_across({name: getattr(self, name) for name in type(self).model_fields}))
        return self

    @classmethod
    def problems_across(cls, sections: Mapping[str, Any]) -> Iterator[Problem]:
        """Yield problems between `sections`, which are valid themselves and given by name."""
        yield from ()

    def problems_of_a_run(self) -> list[Problem]:
        """Return problems that matter only for training."""
        return []

    def without_effect(self) -> dict[str, str]:
        """Return the dotted keys that differ from their defaults but have no effect, each with the reason."""
        data, schedule, guard = self.data, self.schedule, self.guard
        kind = f'`d2v.data.kind` is "{data.kind}"'
        idle: list[tuple[str, Section, str, str]] = [
            ("data", data, key, kind) for other, keys in data.only_for.items() if other != data.kind for key in keys
        ]
        shape = f'`d2v.schedule.kind` is "{schedule.kind}"'
        if schedule.kind != "tri_stage":
            idle.append(("schedule", schedule, "hold_ratio", shape))
        if schedule.kind == "constant":
            idle.append(("schedule", schedule, "final_lr_ratio", shape))
        if guard.nonfinite == "stop":
            idle.append(("guard", guard, "nonfinite_patience", '`d2v.guard.nonfinite` is "stop"'))
        return {
            f"d2v.{name}.{key}": reason
            for name, section, key, reason in idle
            if getattr(section, key) != type(section).model_fields[key].default
        }


class PretrainConfig(D2VConfig):
    """The `"d2v"` section of pre-training.

    Attributes:
        mask: Which places the student does not see.
        target: What the student regresses.
        loss: How prediction and target are compared.
        teacher: The moving average.
        probe: How the features are probed.
    """

    mask: Section
    target: TargetConfig
    loss: LossConfig
    teacher: TeacherConfig
    guard: GuardConfig = GuardConfig()
    probe: ProbeConfig = ProbeConfig()

    @classmethod
    def problems_across(cls, sections: Mapping[str, Any]) -> Iterator[Problem]:
        """See `D2VConfig`."""
        yield from super().problems_across(sections)
        model, target = sections.get("model"), sections.get("target")
        if model and target and target.top_k > model.depth:
            hint = "The model has no more blocks to average: lower it, or raise `d2v.model.depth`."
            yield Problem("target.top_k", f"be in [1, {model.depth}]", target.top_k, hint)


def check_d2v(raw: Any, also: Iterable[str] = ()) -> tuple[D2VConfig | None, list[str]]:
    """Return the `"d2v"` section of a file, or None, and every problem as a sentence; `also` as for `check`."""
    section, problems = _section_of(raw)
    if section is None:
        return None, problems
    config, problems = check(section, raw, "d2v", also=also)
    return config, problems + (_more_problems(section, raw) if config is None else [])


def _section_of(raw: Any) -> tuple[type[D2VConfig] | None, list[str]]:
    """Return the class of a section by its `modality` and `objective`, or None and what is wrong with these."""
    given = raw if isinstance(raw, dict) else {}
    name, objective = given.get("modality", DEFAULT_MODALITY), given.get("objective", DEFAULT_OBJECTIVE)
    if name not in BUILT_IN and name not in modality_names():
        names = [f'"{known}"' for known in modality_names()]
        near = difflib.get_close_matches(name, modality_names(), n=1) if isinstance(name, str) else []
        hint = f'Did you mean "{near[0]}"?' if near else "If a package defines it, install that package."
        return None, [say(Problem("d2v.modality", f"be {' or '.join(names)}", name, hint))]
    try:
        objectives = modality_named(name).objectives
        if isinstance(objective, str) and objective in objectives:
            return objectives[objective].config.chosen(given), []
        known = " or ".join(f'"{one}"' for one in objectives)
        return None, [say(Problem("d2v.objective", f'be {known} with modality "{name}"', objective))]
    except ModalityError as error:
        return None, [f"`d2v.modality`: {error}"]


# keys that change no number of a run
_WITHOUT_RESULT = {
    "run": (
        "dir",
        "name",
        "log_every",
        "save_every",
        "keep",
        "background_save",
        "timeout_minutes",
        "profile",
        "cuda_graph_shapes",
    ),
    "data": ("num_workers", "on_change"),
}


class RunConfig(Section):
    """A whole file: `deepspeed` holds everything outside `"d2v"`."""

    deepspeed: DeepSpeedConfig
    d2v: D2VConfig

    @property
    def pretraining(self) -> PretrainConfig:
        """The section `d2v` of a run that pre-trains; TypeError for any other."""
        if not isinstance(self.d2v, PretrainConfig):
            raise TypeError(f'`d2v.objective` "{self.d2v.objective}" does not pre-train.')
        return self.d2v

    def to_dict(self) -> dict[str, Any]:
        """Return the content of the file: DeepSpeed's keys as given, `"d2v"` with all defaults."""
        return {**self.deepspeed.asked_for(), "d2v": self.d2v.model_dump(mode="json")}

    def without_effect(self, world_size: int) -> list[str]:
        """Return one line for each reason why keys of the file have no effect on a run of `world_size` processes."""
        keys: dict[str, list[str]] = {}
        for key, reason in (self.deepspeed.without_effect(world_size) | self.d2v.without_effect()).items():
            keys.setdefault(reason, []).append(f"`{key}`")
        return [f"no effect of {', '.join(names)}: {reason}" for reason, names in keys.items()]

    def reason_not_to_capture(self, world_size: int, device_type: str) -> str | None:
        """Return why the steps of a run are not captured, as the end of a sentence; None if they are.

        Args:
            world_size: number of processes.
            device_type: "cpu" or "cuda".
        """
        if self.d2v.run.cuda_graph is False:
            return "it is false"
        if device_type != "cuda":
            return "CUDA graphs need a GPU"
        if self.deepspeed.needs_deepspeed(world_size):
            return "DeepSpeed decides parts of a step on the host"
        return None

    def digest(self) -> str:
        """Return the SHA-256 of the keys that affect results: not the run's name, folder, logging or probes."""
        content = self.to_dict()
        content["d2v"].pop("probe", None)
        for section, keys in _WITHOUT_RESULT.items():
            for key in keys:
                del content["d2v"][section][key]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def load_config(
    path: str | Path,
    overrides: Iterable[str] = (),
    world_size: int = 1,
    written: Callable[[Path], Mapping[str, Any] | None] = lambda folder: None,
) -> RunConfig:
    """Read a configuration file, apply overrides, and validate it.

    Args:
        path: JSON file, or the name of a preset if there is no such file.
        overrides: `dotted.key=value` each; the value is JSON, or else text.
        world_size: number of processes, for the batch sizes.
        written: from a run's folder to the configuration that it has written, if it is resumed. It need not read again
            the weights that the run began with.
    Raises:
        ConfigError: with every problem of the file.
    """
    raw = _filled(apply_overrides(_read(path), overrides), str(path), written)
    return parse_config(raw, world_size, source=str(path))


def with_earlier_values(saved: Mapping[str, Any]) -> dict[str, Any]:
    """Return a saved configuration, with the values that older runs used for keys they lack."""
    d2v = saved.get("d2v")
    return {**saved, "d2v": {**EARLIER_VALUES, **d2v}} if isinstance(d2v, dict) else dict(saved)


def _filled(raw: dict[str, Any], source: str, written: Callable[[Path], Mapping[str, Any] | None]) -> dict[str, Any]:
    """Return a file's content with what follows from the weights that the run is to begin with; see `Modality`."""
    d2v = raw.get("d2v")
    if not isinstance(d2v, dict) or not isinstance(d2v.get("model", {}), dict):
        return raw
    kind: Any = _section_of(d2v)[0]
    if kind is None:
        return raw
    name, objective = d2v.get("modality", DEFAULT_MODALITY), d2v.get("objective", DEFAULT_OBJECTIVE)
    fill = modality_named(name).objectives[objective].filled
    if fill is None:
        return raw
    run = raw_section(d2v, "run")
    saved = raw_section(written(Path(str(run.get("dir", "runs"))) / str(run.get("name"))), "d2v")
    if "encoder" in saved and isinstance(saved.get("model"), dict):
        filled = {key: saved[key] for key in ("encoder", "labels") if key in saved}
        given, model = raw_section(d2v, "model"), saved["model"]
        if raw_section(d2v, "finetune").get("source") is None:
            model = {**model, **given}
        else:
            # as in the run's beginning
            model = kind.model_like(given, saved["encoder"], model)
        return {**raw, "d2v": {**filled, **d2v, "model": model}}
    try:
        return {**raw, "d2v": fill(d2v)}
    except (OSError, ValueError) as error:
        raise ConfigError([str(error)], source) from error


def _read(path: str | Path) -> dict[str, Any]:
    file = configuration_file(path)
    try:
        text = read_text(file, MAX_FILE_BYTES)
    except NotRegularError as error:
        # each process of a run reads it, also to resume
        advice = "It is read more than once: write it to a file first."
        raise ConfigError([f"`--ds_config` must be a readable JSON file, but {error}. {advice}"], str(path)) from None
    except (OSError, ValueError) as error:
        raise ConfigError([f"`--ds_config` must be a readable JSON file: {error}"], str(path)) from None
    # editors of Windows put a byte order mark there
    return read_sections(text.removeprefix("\ufeff"), str(path))


def parse_config(raw: Mapping[str, Any], world_size: int = 1, source: str = "configuration") -> RunConfig:
    """Validate a configuration given as nested dictionaries; ConfigError lists every problem."""
    outside = {key: value for key, value in raw.items() if key != "d2v"}
    problems = refused(outside)
    outside = {key: value for key, value in outside.items() if key not in REFUSED_KEYS}
    deepspeed, found = check(DeepSpeedConfig, outside, also=_keys_of_d2v(raw.get("d2v")))
    problems += found
    if deepspeed is not None:
        try:
            deepspeed.batch_split(world_size)
        except ConfigError as error:
            problems += error.problems
    d2v = None
    if "d2v" not in raw:
        problems.append("`d2v` is required, but missing. It holds model, mask, target, schedule, data and run.")
    else:
        d2v, found = check_d2v(raw["d2v"], also=known_keys(DeepSpeedConfig))
        problems += found
    if d2v is not None:
        problems += [say(problem, "d2v") for problem in d2v.problems_of_a_run()]
    if deepspeed is not None and deepspeed.fp16.enabled and not deepspeed.needs_deepspeed(world_size):
        hint = "One process without ZeRO runs on plain torch: use bf16, or `zero_optimization.stage` 1."
        problems.append(say(Problem("fp16.enabled", "be false without DeepSpeed", True, hint)))
    if problems or deepspeed is None or d2v is None:
        raise ConfigError(dict.fromkeys(problems), source)
    return RunConfig(deepspeed=deepspeed, d2v=d2v)


def _keys_of_d2v(raw: Any) -> Iterator[str]:
    """Yield the dotted keys of the `"d2v"` sections of this library's modalities and of the file's own."""
    yield "d2v"
    sections = [_section_of({"modality": name})[0] for name in BUILT_IN] + [_section_of(raw)[0]]
    yield from dict.fromkeys(key for section in sections if section for key in known_keys(section, "d2v"))


def _more_problems(config: type[D2VConfig], raw: Any) -> list[str]:
    """Return the problems between valid sections."""
    sections: dict[str, Any] = {}
    for name, field in config.model_fields.items():
        if isinstance(field.default, Section) and isinstance(raw, dict):
            # leave out invalid sections
            with contextlib.suppress(ValidationError):
                given = name in raw
                sections[name] = type(field.default).model_validate(raw[name]) if given else field.default
    return [say(problem, "d2v") for problem in config.problems_across(sections)]
