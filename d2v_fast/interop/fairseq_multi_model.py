"""Read and write fairseq's checkpoints of data2vec 2.0, without importing fairseq."""

from __future__ import annotations

import math
import os
from collections import ChainMap
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from d2v_fast.config import ConfigError
from d2v_fast.config.errors import Section, check, show
from d2v_fast.config.file import section
from d2v_fast.interop.fairseq_files import require_average, state_of, write_checkpoint
from d2v_fast.interop.fairseq_multi import (
    AVERAGE,
    Kind,
    Parts,
    begin,
    check_encoder,
    divide,
    encoder_values,
    is_multi,
    pretraining,
    step_sections,
)
from d2v_fast.interop.fairseq_multi_cfg import multi_cfg
from d2v_fast.interop.fairseq_recipe import NO_SETTINGS, POST_NORM, Gathered, Settings, pending_decay, told_by
from d2v_fast.interop.formats import Published
from d2v_fast.interop.layout import Layout, Misfit
from d2v_fast.interop.multi_layout import BLOCKS, decoder_layout
from d2v_fast.models.student import Student
from d2v_fast.models.weights import require_finite

# keys of `d2v.model` that no tensor shows, besides the heads
_RATES = (
    *("dropout", "attention_dropout", "activation_dropout", "context_dropout", "layer_drop", "context_layer_drop"),
    "norm_eps",
)
_DECODER_RATES = ("residual", "dropout", "noise_std")
# largest difference from fp32 of a fixed table that a file holds in half precision
_TABLE_ERROR = 1e-3


class FairseqMulti(NamedTuple):
    """Content of a checkpoint, fp32 on the CPU, models in training mode; see `Pretrained`. `head` is the decoder's."""

    student: Student
    teacher: Student | None
    head: dict[str, Tensor] | None
    config: Section
    assumed: tuple[str, ...] = ()
    pending_decay: float | None = None


@dataclass(frozen=True)
class MultiModel:
    """How a modality's model of data2vec 2.0 is read and written.

    Attributes:
        kind: The modality in fairseq.
        config: Class of `d2v.model`.
        encoder: Return the encoder's class.
        values: From the tensors, the modality's section in `cfg`, the section `task` and the values found so far to the
            keys of `d2v.model` that only this modality has.
        layout: Names and shapes of an encoder's tensors. It may name tensors of `fixed` as well.
        own: From a run's configuration to the keys that only this modality's section of `cfg` has, and to the section
            `task`.
        sections: From the modality's section in `cfg` to further keys of the sections of `"d2v"` beside the model.
        fixed: Tensors that fairseq stores and this library computes, by a name of ours.
        check: Raise OptionError if a run has what fairseq cannot hold.
    """

    kind: Kind
    config: type[Section]
    encoder: Callable[[], type[Student]]
    values: Callable[[Parts, Mapping[str, Any], Mapping[str, Any], Gathered], dict[str, Any]]
    layout: Callable[[Any], Layout]
    own: Callable[[Any], tuple[dict[str, Any], dict[str, Any]]]
    sections: Callable[[Mapping[str, Any], Mapping[str, Any]], dict[str, dict[str, Any]]]
    fixed: Callable[[Any], dict[str, Tensor]] = lambda config: {}
    check: Callable[[Any], None] = lambda config: None

    def format(self) -> Published:
        """Return the record of the format."""
        return Published(
            "fairseq",
            ".pt",
            "fairseq",
            AVERAGE,
            is_own=lambda content: is_multi(content, self.kind),
            read=self.read,
            write=self.write,
            check=self.check,
            step=self.step,
        )

    def read(self, content: Mapping[str, Any], path: Path, settings: Settings = NO_SETTINGS) -> FairseqMulti:
        """Convert the content of a checkpoint.

        Raises:
            ValueError: `cfg` states another architecture, weights are not finite, or sizes are refused. `Misfit` names
                every missing, unknown and misshapen tensor.
        """
        parts = divide(content["model"], self.kind, path)
        cfg = told_by(content)
        config, assumed = self._config_of(parts, cfg, settings, str(path))
        layout = self.layout(config)
        what = f"`{path}` is not {self.kind.wanted} of {config.depth} blocks of width {config.width}"
        require_finite([*parts.encoder.items(), *parts.decoder.items(), *(parts.average or {}).items()], f"`{path}`")
        student = self.build(config, parts.encoder, what)
        head = None
        if parts.decoder:
            with torch.device("meta"):
                shapes = {name: one.shape for name, one in student.make_head().state_dict().items()}
            head = decoder_layout(config, self.kind.prefix).ours(parts.decoder, shapes, what)
        teacher = None
        if parts.average is not None:
            averaged = self.encoder().averaged_prefix()
            needed = {one for own, names in layout.names.items() if own.startswith(averaged) for one in names}
            front = BLOCKS if self.kind.averages_blocks_only else ""
            require_average(parts.average, parts.encoder, needed, front, AVERAGE, what)
            teacher = self.build(config, {**parts.encoder, **parts.average}, f"the teacher of {what}")
        pending = None if teacher is None else pending_decay(content, cfg)
        return FairseqMulti(student, teacher, head, config, tuple(assumed), pending)

    def build(self, config: Any, theirs: Mapping[str, Tensor], what: str) -> Student:
        """Build an encoder from weights with fairseq's names, in training mode.

        Raises:
            Misfit: The weights do not fit, or a fixed table has other values.
        """
        fixed = self.fixed(config)
        with torch.device("meta"):
            shapes = {name: one.shape for name, one in self.encoder()(config).state_dict().items()}
        shapes |= {name: one.shape for name, one in fixed.items()}
        layout = self.layout(config)
        state = layout.ours(theirs, shapes, what)
        for name, one in fixed.items():
            if (state.pop(name) - one).abs().max() > _TABLE_ERROR:
                raise Misfit(what, [f"`{layout.names[name][0]}` must hold the published table, but holds another one"])
        # buffers are computed, so that the model cannot come from `meta`
        with torch.random.fork_rng(devices=[]):
            model = self.encoder()(config)
        model.load_state_dict(state, assign=True)
        return model

    def write(
        self,
        model: Student | Mapping[str, Tensor],
        head: nn.Module | Mapping[str, Tensor] | None,
        teacher: Student | Mapping[str, Tensor] | None,
        config: Any,
        path: str | os.PathLike[str],
        *,
        num_updates: int = 0,
    ) -> None:
        """Write a checkpoint with fairseq's names and shapes: fp32 tensors and plain values, no code.

        Args:
            model: The student, or its state by name.
            head: The decoder, or its state by name; None omits it.
            teacher: The whole teacher, or its state by name; None omits the average.
            config: The run's configuration.
            path: The `.pt` file, replaced atomically.
            num_updates: Optimizer steps of the student.
        """
        layout, sizes = self.layout(config.model), config.model
        weights: dict[str, Any] = dict(layout.all_theirs(self.with_fixed(model, sizes)))
        if head is not None:
            weights |= dict(decoder_layout(sizes, self.kind.prefix).all_theirs(state_of(head)))
        if teacher is not None:
            weights[AVERAGE] = self._average(layout, self.with_fixed(teacher, sizes))
        own, task = self.own(config)
        write_checkpoint(path, weights, multi_cfg(config, self.kind, own, task, num_updates), num_updates)

    def with_fixed(self, model: Student | Mapping[str, Tensor], config: Any) -> Mapping[str, Tensor]:
        """Return the state of a model together with the tensors that only other libraries store."""
        # the cast is safe: a ChainMap writes only to its first map
        return ChainMap(self.fixed(config), cast("dict[str, Tensor]", state_of(model)))

    def step(self, content: Mapping[str, Any], path: Path) -> dict[str, Any]:
        """Return the sections of `"d2v"` that a step needs, besides the model, as `cfg` states them.

        Raises:
            ValueError: A value is unknown or not supported; the message names the key.
        """
        model = section(pretraining(told_by(content), self.kind), "model")
        sections = step_sections(model, self.kind, str(path))
        for name, more in self.sections(section(section(model, "modalities"), self.kind.section), model).items():
            sections[name] = sections.get(name, {}) | more
        return sections

    def decoder_defaults(self, width: int) -> dict[str, Any]:
        """Return the published decoder for an encoder of this width, whose channels its groups must divide."""
        defaults: dict[str, Any] = self.config().model_dump()["decoder"]
        return {**defaults, "groups": math.gcd(defaults["groups"], width)}

    def _average(self, layout: Layout, teacher: Mapping[str, Tensor]) -> dict[str, Tensor]:
        averaged = self.encoder().averaged_prefix()
        front = BLOCKS if self.kind.averages_blocks_only else ""
        average: dict[str, Tensor] = {}
        for name in layout.names:
            if name.startswith(averaged):
                average |= {one.removeprefix(front): part for one, part in layout.theirs(name, teacher[name]).items()}
        return average

    def _config_of(self, parts: Parts, cfg: Mapping[str, Any], settings: Settings, path: str) -> tuple[Any, list[str]]:
        """Return the model's configuration, and a text for each assumed value."""
        told = pretraining(cfg, self.kind)
        model = section(told, "model")
        published: Any = self.config()
        check_encoder(model, self.kind, path)
        gathered = begin(model, self.kind, settings, path)
        values = encoder_values(parts, self.kind, gathered, published.width)
        gathered.published({name: getattr(published, name) for name in _RATES}, "as published")
        own = section(section(model, "modalities"), self.kind.section)
        values |= self.values(parts, own, section(told, "task"), gathered)
        defaults, decoder = self.decoder_defaults(values["width"]), values["decoder"]
        assumed = [name for name in _DECODER_RATES if name not in decoder]
        if assumed and not settings.run:
            shown = ", ".join(f"decoder.{name} {show(defaults[name])}" for name in assumed)
            gathered.assumed.append(f"{shown} (as published)")
        values |= {**gathered.values, "decoder": {**defaults, **decoder}}
        if not parts.decoder and "decoder" in settings.run:
            # the run begins with a new one
            values["decoder"] = settings.run["decoder"]
        if "layer_norm_first" not in model:
            gathered.assumed.append(POST_NORM)
        config, problems = check(self.config, values)
        if config is None:
            raise ConfigError(problems, path)
        return config, gathered.assumed
