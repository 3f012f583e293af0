"""Transformers folders of data2vec 2.0, which Transformers has no model of: they carry the code of theirs.

`AutoModel.from_pretrained(folder, trust_remote_code=True)` runs the files of the folders `remote`, which need torch and
Transformers only, and which nothing in this library imports. Tensors have fairseq's names, without the decoder.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from d2v_fast.config import ConfigError, D2VConfig
from d2v_fast.config.errors import Section, check
from d2v_fast.files.atomic import write_text
from d2v_fast.files.outputs import model_folder
from d2v_fast.interop.fairseq_multi_model import MultiModel
from d2v_fast.interop.folders import (
    MAX_WEIGHTS_BYTES,
    as_json,
    mlp_ratio,
    model_card,
    read_model_config,
    read_weights,
    require_values,
    whole_number,
    write_code,
    write_weights,
)
from d2v_fast.interop.heads import HeadPart
from d2v_fast.interop.layout import within
from d2v_fast.models.student import Student
from d2v_fast.models.weights import require_finite

# the folders beside this file and beside a modality's modules that hold code for exports
CODE = "remote"
# our keys of `d2v.model` and those of `config.json` that every modality has
_KEYS = {
    "width": "hidden_size",
    "heads": "num_attention_heads",
    "context_depth": "num_context_layers",
    "depth": "num_hidden_layers",
    "norm_eps": "layer_norm_eps",
    "dropout": "hidden_dropout_prob",
    "attention_dropout": "attention_probs_dropout_prob",
    "activation_dropout": "activation_dropout",
}


@dataclass(frozen=True)
class RemoteModel:
    """How a modality's folders are written and read.

    Attributes:
        name: In the names of files and of `model_type`, such as "vision".
        title: In the names of classes, such as "Vision".
        heads: Classes of Transformers that choose a model with a head -> end of its class's name.
        model: Names and shapes of the tensors.
        code: The modality's folder `remote`.
        keys: Our keys of `d2v.model` that only this modality has -> those of `config.json`.
        card: From the model's configuration to the arguments `title`, `task`, `tags`, `text` and `use` of `model_card`.
    """

    name: str
    title: str
    heads: Mapping[str, str]
    model: MultiModel
    code: Path
    keys: Mapping[str, str]
    card: Callable[[Any], dict[str, Any]]

    @property
    def kind(self) -> str:
        """`model_type` in `config.json`."""
        return f"data2vec2-{self.name}"

    @property
    def prefix(self) -> str:
        """In front of the encoder's names in a model with a head."""
        return f"data2vec2_{self.name}."

    def write(
        self,
        model: Student | Mapping[str, Tensor],
        config: Any,
        folder: str | os.PathLike[str],
        *,
        more: Mapping[str, Any],
        files: Callable[[Path], None],
        info: Mapping[str, object] | None = None,
        max_file_bytes: int = MAX_WEIGHTS_BYTES,
        head: HeadPart | None = None,
    ) -> None:
        """Write `config.json`, the weights (fp32), the code, a model card, and what `files` writes.

        Args:
            model: Student or whole teacher, on any device and in any dtype, or its state by name.
            config: The run's configuration, or the model's if the run's is unknown.
            folder: Created if missing. Files of an earlier export are replaced; see `model_folder`.
            more: Further keys of `config.json`.
            files: Write the files of the inputs into a folder, such as a tokenizer.
            info: Facts for the model card.
            max_file_bytes: Larger weights are split into several files with an index.
            head: The head of a fine-tuned model; None writes the encoder alone.
        """
        sizes = config.model if isinstance(config, D2VConfig) else config
        layout, state = self.model.layout(sizes), self.model.with_fixed(model, sizes)
        if head is not None:
            layout, state = head.around(layout, state)
        card = self.card(sizes) if head is None else head.card
        foreign = {**self._foreign_config(sizes), **more, **({} if head is None else head.config)}
        with model_folder(folder) as target:
            write_weights(target, layout, state, max_file_bytes)
            write_text(target / "README.md", model_card(**card, info=info or {}, config=config))
            own = self.code.glob(f"*_data2vec2_{self.name}.py")
            write_code(target, sorted([*(Path(__file__).parent / CODE).glob("*.py"), *own]))
            files(target)
            write_text(target / "config.json", as_json(foreign))

    def read(
        self, folder: str | os.PathLike[str], more: Mapping[str, Any], decoder: Section | None = None
    ) -> tuple[Student, Any]:
        """Read a folder; the code in it is not run.

        Args:
            folder: A folder with `config.json` and `model.safetensors`, or several weights files and their index.
            more: Keys of `d2v.model` that `config.json` does not hold.
            decoder: Section of `d2v.model` of a run that is to begin with the folder, which holds no decoder; None is
                the published one.
        Returns:
            The encoder, fp32 on the CPU, in training mode, and its configuration.
        Raises:
            ValueError: The folder holds another model, or tensors are missing, unknown or misshapen.
        """
        source = Path(folder)
        raw, where = read_model_config(source), str(source / "config.json")
        require_values(raw, {"model_type": self.kind}, {}, where)
        width = whole_number(raw, "hidden_size", 768, where)
        told = {own: raw[theirs] for own, theirs in {**_KEYS, **self.keys}.items() if theirs in raw}
        hidden = whole_number(raw, "intermediate_size", 4 * width, where)
        values = {**told, "width": width, "mlp_ratio": mlp_ratio(width, hidden), **more}
        values["decoder"] = self.model.decoder_defaults(width) if decoder is None else decoder.model_dump()
        config, problems = check(self.model.config, values)
        if config is None:
            raise ConfigError(problems, where)
        foreign, path = read_weights(source)
        theirs = within(foreign, self.prefix, f"`{path}`")
        require_finite(theirs.items(), f"`{path}`")
        return self.model.build(config, theirs, f"`{path}` does not fit its `config.json`"), config

    def _foreign_config(self, config: Any) -> dict[str, Any]:
        names = {"AutoModel": "Model", **self.heads}
        module, begin = f"data2vec2_{self.name}", f"Data2Vec2{self.title}"
        keys = {theirs: getattr(config, own) for own, theirs in {**_KEYS, **self.keys}.items()}
        return {
            "architectures": [f"{begin}Model"],
            "model_type": self.kind,
            "auto_map": {
                "AutoConfig": f"configuration_{module}.{begin}Config",
                **{auto: f"modeling_{module}.{begin}{end}" for auto, end in names.items()},
            },
            "dtype": "float32",
            "intermediate_size": int(config.width * config.mlp_ratio),
            "initializer_range": 0.02,
            **{key: list(value) if isinstance(value, tuple) else value for key, value in keys.items()},
        }
