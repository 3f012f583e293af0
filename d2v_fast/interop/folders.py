"""Read and write Transformers' model folders: the parts that all modalities share."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from d2v_fast.config import D2VConfig, PretrainConfig
from d2v_fast.config.errors import show
from d2v_fast.config.model_paths import explain
from d2v_fast.config.schema import MAX_FILE_BYTES
from d2v_fast.files.atomic import write_tensors, write_text
from d2v_fast.files.reading import NotRegularError, open_regular, read_json, read_text, refuse_pointer
from d2v_fast.interop.layout import Layout

# of one file of weights, Transformers' own limit
MAX_WEIGHTS_BYTES = 5 * 10**9
MAX_INDEX_BYTES = 2**24
# of a safetensors header: 150 bytes per tensor, and thirty times as much memory once it is parsed
MAX_HEADER_BYTES = 4_000_000
INDEX_NAME = "model.safetensors.index.json"


def write_weights(target: Path, layout: Layout, state: Mapping[str, Tensor], max_file_bytes: int) -> None:
    """Write fp32 weights in Transformers' layout.

    Args:
        target: An empty folder, as `model_folder` yields it.
        layout: Their names and shapes.
        state: Our tensors by name. Each is read once and released when its file is written.
        max_file_bytes: Larger weights are divided into several files with an index.
    """
    files: list[Path] = []
    tensors: dict[str, Tensor] = {}
    names: list[list[str]] = []

    def write() -> None:
        files.append(target / f"weights-{len(files)}.part")
        names.append(list(tensors))
        write_tensors(files[-1], tensors)
        tensors.clear()

    try:
        for name in layout.names:
            parts = layout.theirs(name, state[name])
            if tensors and _num_bytes(tensors) + _num_bytes(parts) > max_file_bytes:
                write()
            tensors |= parts
            del parts
        write()
    except BaseException:
        for path in files:
            path.unlink(missing_ok=True)
        raise
    if len(files) == 1:
        os.replace(files[0], target / "model.safetensors")
        return
    index: dict[str, str] = {}
    for number, (path, held) in enumerate(zip(files, names, strict=True), start=1):
        final = target / f"model-{number:05d}-of-{len(files):05d}.safetensors"
        os.replace(path, final)
        index |= dict.fromkeys(held, final.name)
    write_text(target / INDEX_NAME, as_json({"metadata": {}, "weight_map": index}))


def write_code(target: Path, code: Iterable[Path]) -> None:
    """Copy files of a model's code into a folder, which Transformers runs with `trust_remote_code=True`."""
    for path in code:
        write_text(target / path.name, read_text(path, MAX_FILE_BYTES))


def read_weights(source: Path) -> tuple[dict[str, Tensor], Path]:
    """Read all tensors of a folder; returns them by name, and the last of the files.

    Raises:
        ValueError: There are none, or a file is not a safetensors file.
    """
    tensors: dict[str, Tensor] = {}
    for path in _weight_files(source):
        try:
            # also refuses a pipe, which would block
            refuse_pointer(path)
            _refuse_header(path)
            with safe_open(path, framework="pt") as file:
                tensors |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (NotRegularError, SafetensorError) as error:
            raise ValueError(f"`{path}` must be a safetensors file, but: {error}.") from None
    return tensors, path


def read_model_config(folder: Path) -> dict[str, Any]:
    """Read the `config.json` of a model folder.

    Raises:
        ValueError: There is none, or it does not hold a section.
    """
    path = folder / "config.json"
    if (reason := explain(folder)) is not None:
        raise ValueError(f"`{folder}` must be a Transformers model folder. {reason}")
    try:
        raw = read_json(path, MAX_FILE_BYTES)
    except (OSError, ValueError) as error:
        raise ValueError(f"`{folder}` must be a Transformers model folder, but: {path.name}: {error}") from None
    if not isinstance(raw, dict):
        raise ValueError(
            f"`{folder}` must be a Transformers model folder, but its {path.name} holds no section {{...}}."
        )
    return raw


def require_values(raw: Mapping[str, Any], required: Mapping[str, Any], defaults: Mapping[str, Any], path: str) -> None:
    """Refuse a configuration of an architecture that is not supported.

    Args:
        raw: The configuration.
        required: The values that are supported, by key.
        defaults: The other library's default of each key that the configuration may leave out.
        path: Of the file, for the message.
    Raises:
        ValueError: A value differs; the message names the key and both values.
    """
    for key, value in required.items():
        found = raw.get(key, defaults.get(key))
        if type(found) is not type(value) or found != value:
            raise ValueError(f"`{key}` in {path} must be {show(value)}, but is {show(found)} instead.")


def whole_number(raw: Mapping[str, Any], key: str, default: int, path: str) -> int:
    """Return a size in a configuration.

    Raises:
        ValueError: It is not a whole number >= 1.
    """
    value = raw.get(key, default)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"`{key}` in {path} must be a whole number >= 1, but is {show(value)} instead.")
    return value


def mlp_ratio(width: int, hidden_width: int) -> float:
    """Return the ratio for which `int(width * ratio)` is `hidden_width`."""
    ratio = hidden_width / width
    # the quotient may be rounded down
    return math.nextafter(ratio, math.inf) if int(width * ratio) < hidden_width else ratio


def model_card(
    *, title: str, task: str, tags: Sequence[str], text: str, use: str, info: Mapping[str, object], config: Any
) -> str:
    """Return the text of a model folder's `README.md`.

    Args:
        title, task, tags: Heading and metadata of the model hub.
        text: A paragraph on the training.
        use: How to use the model.
        info: Facts about these weights, printed as a table.
        config: If it is that of a run, its recipe is printed.
    """
    facts = "\n".join(f"| {name} | {value} |" for name, value in info.items())
    table = f"\n| these weights | |\n|---|---|\n{facts}\n" if facts else ""
    card = f"""---
library_name: transformers
pipeline_tag: {task}
tags: [{", ".join(tags)}]
---

# {title}

{text}
{table}
{use}
"""
    if not isinstance(config, D2VConfig):
        return card
    # without paths and other facts about the machine
    recipe = config.model_dump(
        mode="json",
        exclude={
            "data": {"path", "labels_path", "vocabulary", "num_workers", "tokenizer", "tokens_path"},
            "finetune": {"source"},
            "valid": {"path", "labels_path"},
            "guard": True,
            "labels": True,
            "probe": True,
            "run": True,
        },
    )
    return f"""{card}
## How it was {"pre-trained" if isinstance(config, PretrainConfig) else "fine-tuned"}

```json
{as_json(recipe).rstrip()}
```
"""


def as_json(value: Mapping[str, Any]) -> str:
    """Return the text of a JSON file."""
    return json.dumps(value, indent=2) + "\n"


def _num_bytes(tensors: Mapping[str, Tensor]) -> int:
    return sum(value.numel() * value.element_size() for value in tensors.values())


def _refuse_header(path: Path) -> None:
    """Refuse a safetensors file with a header of more than `MAX_HEADER_BYTES`."""
    with open_regular(path) as file:
        size = int.from_bytes(file.read(8), "little")
    if size > MAX_HEADER_BYTES:
        what = f"a header of {size:,} bytes is more than {MAX_HEADER_BYTES:,}"
        raise ValueError(f"`{path}` must be a safetensors file, but: {what}.")


def _weight_files(source: Path) -> list[Path]:
    if (source / "model.safetensors").exists():
        return [source / "model.safetensors"]
    index = source / INDEX_NAME
    if not index.exists():
        raise ValueError(
            f"`{source}` must hold `model.safetensors`, but does not. Save the model again with Transformers: "
            "`save_pretrained(folder)` writes it."
        )
    listed = read_json(index, MAX_INDEX_BYTES)
    names = listed.get("weight_map") if isinstance(listed, dict) else None
    if not isinstance(names, dict) or not names:
        raise ValueError(f"`{index}` must hold a `weight_map`, but does not.")
    names = sorted({str(name) for name in names.values()})
    if strange := [name for name in names if Path(name).name != name or not (source / name).is_file()]:
        raise ValueError(f"`{index}` must name files beside it, but names {strange[0]!r}.")
    return [source / name for name in names]
