"""The configurations that come with this library."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

from d2v_fast.command_lines import path_words, tool_command
from d2v_fast.config import D2VConfig, check_d2v
from d2v_fast.config.file import PRESETS, preset_names
from d2v_fast.config.finetune import FinetuneConfig
from d2v_fast.errors import OptionError
from d2v_fast.files.atomic import write_text
from d2v_fast.files.outputs import require_file
from d2v_fast.files.reading import read_json

_MAX_BYTES = 1_000_000

# in place of sizes that the source of fine-tuning decides
OF_SOURCE = "of SOURCE"
# name -> parameters of the encoder, which a test counts since building one is slow, and purpose
_ABOUT = {
    "digits": ("451 k", "first run: the handwritten digits of scikit-learn, in minutes"),
    "digits2": ("448 k", "the same with data2vec 2.0"),
    "digits_long": ("563 k", "the same for 20 minutes; better than raw pixels"),
    "finetune_digits": (OF_SOURCE, "classify the handwritten digits, from the run of `digits` or `digits2`"),
    "finetune_glue": (OF_SOURCE, "the published fine-tuning on GLUE, for its files and a text encoder (here CoLA)"),
    "finetune_images": (OF_SOURCE, "classify a folder per class of your own images, from the run of `images_small`"),
    "finetune_speech": (OF_SOURCE, "recognize the letters of 300 spoken words, from the run of `speech` or `speech2`"),
    "finetune_speech_base": (OF_SOURCE, "the published Base fine-tuning by CTC, for recordings with transcripts"),
    "finetune_speech_large": (OF_SOURCE, "the published Large fine-tuning by CTC, for recordings with transcripts"),
    "finetune_text": (OF_SOURCE, "classify paragraphs of the reference pages, from the run of `text` or `text2`"),
    "finetune_vision2_base": (OF_SOURCE, "the published ViT-B fine-tuning of data2vec 2.0, for a folder per class"),
    "finetune_vision2_large": (OF_SOURCE, "the published ViT-L fine-tuning of data2vec 2.0, for a folder per class"),
    "finetune_vision_base": (OF_SOURCE, "the published ViT-B fine-tuning, for a folder per class"),
    "finetune_vision_large": (OF_SOURCE, "the published ViT-L fine-tuning, for a folder per class"),
    "finetune_words": (OF_SOURCE, "classify 300 spoken words, from the run of `speech` or `speech2`"),
    "images_small": ("2.75 M", "a folder of your own images, on one GPU (or slowly on a CPU)"),
    "speech": ("2.55 M", "300 spoken words that come with this library"),
    "speech2": ("2.55 M", "the same with data2vec 2.0"),
    "speech2_base": ("93.2 M", "the published Base run of data2vec 2.0, for a folder of recordings"),
    "speech2_large": ("313 M", "the published Large run of data2vec 2.0, for a folder of recordings"),
    "speech_base": ("93.2 M", "the published Base run, for a folder of recordings"),
    "speech_large": ("313 M", "the published Large run, for a folder of recordings"),
    "speech_small": ("2.55 M", "a folder of your own recordings, on one GPU (or slowly on a CPU)"),
    "text_small": (
        "11.5 M",
        "your own text and a tokenizer (here of 50,265 tokens), on one GPU (or slowly on a CPU)",
    ),
    "text": ("735 k", "the reference pages of Python"),
    "text2": ("735 k", "the same with data2vec 2.0"),
    "text2_base": ("124 M", "the published Base run of data2vec 2.0, for a folder of text and a tokenizer"),
    "text2_large": ("354 M", "the published Large run of data2vec 2.0, for a folder of text and a tokenizer"),
    "text_base": ("124 M", "the published Base run, for a folder of text and a tokenizer"),
    "text_large": ("354 M", "the published Large run, for a folder of text and a tokenizer"),
    "vision2_base": ("85.6 M", "the published ViT-B run of data2vec 2.0, for a folder of images"),
    "vision2_large": ("303 M", "the published ViT-L run of data2vec 2.0, for a folder of images"),
    "vision_base": ("85.7 M", "the published ViT-B run, for a folder of images"),
    "vision_large": ("303 M", "the published ViT-L run, for a folder of images"),
}
_UNSAID = "?"


def list_presets() -> str:
    """Return a table of all presets: name, modality, size of the encoder, parameters, purpose."""
    rows = [("name", "modality", "blocks x width", "parameters", "")]
    for name in preset_names():
        config = read_preset(name)
        fine_tunes = isinstance(config, FinetuneConfig)
        shape = OF_SOURCE if fine_tunes else f"{config.model.depth} x {config.model.width}"
        rows.append((name, config.modality, shape, *_ABOUT.get(name, ("", ""))))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([*lines, f"in {PRESETS}; to change one: {tool_command('presets', 'NAME', '--to', 'FILE')}"])


def preset_text(name: str) -> str:
    """Return the text of a preset.

    Raises:
        OptionError: there is no preset of this name.
        ValueError: the library is installed without presets.
    """
    known = preset_names()
    if name not in known:
        if not known:
            raise ValueError(f"there are no configurations in {PRESETS}: install d2v_fast again.")
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
        raise OptionError(f"`NAME` must be one of {', '.join(known)}, but is {name} instead. The nearest is {near}.")
    return (PRESETS / f"{name}.json").read_text(encoding="utf-8")


def write_preset(name: str | None, to: Path, overwrite: bool = False) -> str:
    """Write a preset to a file, and return a line for the user.

    Args:
        name: name of the preset.
        to: file to write.
        overwrite: replace the file if it exists.
    Raises:
        OptionError: there is no preset of this name, or the file exists.
    """
    if name is None:
        raise OptionError(
            f"`--to` needs the name of a configuration before it: `{tool_command('presets')}` lists them."
        )
    text = preset_text(name)
    require_file(to, overwrite)
    write_text(to, text)
    config = read_preset(name)
    missing = [key for key in ("path", "tokenizer") if config.data.model_dump().get(key) == _UNSAID]
    needs = [word for key in missing for word in ("--set", f"d2v.data.{key}=...")]
    if isinstance(config, FinetuneConfig):
        command = tool_command("finetune", "SOURCE", "--ds_config", path_words(to), *needs)
        return f"presets: {to}; to fine-tune the encoder of a run or folder SOURCE: {command}"
    return f"presets: {to}; to train: {tool_command('train', path_words(to), *needs)}"


def read_preset(name: str) -> D2VConfig:
    """Return the `"d2v"` section of a preset; keys that the user must fill in, such as `data.path`, are "?"."""
    raw: Any = read_json(PRESETS / f"{name}.json", _MAX_BYTES)["d2v"]
    unsaid = {key for key in ("path", "tokenizer") if key in raw["data"] and raw["data"][key] is None}
    data = raw["data"] | dict.fromkeys(unsaid, _UNSAID)
    config, problems = check_d2v({**raw, "data": data})
    if config is None:
        raise ValueError(f"{PRESETS / name}.json is not a configuration: {problems[0]} Install d2v_fast again.")
    return config
