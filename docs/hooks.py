"""MkDocs hooks: pages made from files at the root, from `--help`, and from the configuration's models.

The overview is the README, and contributing, security and changelog are the files at the root. The reference lists
every key of the pydantic models, with the description that the docstring of its section gives under `Attributes:`.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import UnionType
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

# page -> the file at the root that it shows
FILES = {
    "index.md": "README.md",
    "contributing.md": "CONTRIBUTING.md",
    "security.md": "SECURITY.md",
    "changelog.md": "CHANGELOG.md",
}
# the comment that a page has in the place of what is generated
KEYS, COMMANDS = "<!-- keys -->", "<!-- commands -->"
_TYPES = {int: "integer", float: "number", bool: "boolean", str: "text", type(None): "`null`"}
_NO_DEFAULT = "required"


class Key(NamedTuple):
    """A key of a section: what may stand there, and what stands there if the file says nothing."""

    name: str
    kind: str
    default: str
    description: str


def on_files(files: Any, config: Any) -> Any:
    """Add the pages of `FILES`."""
    from mkdocs.structure.files import File

    for page, name in FILES.items():
        files.append(File.generated(config, page, content=page_of((ROOT / name).read_text(encoding="utf-8"))))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Fill in what is generated."""
    if KEYS in markdown:
        markdown = markdown.replace(KEYS, configuration())
    return markdown.replace(COMMANDS, commands()) if COMMANDS in markdown else markdown


def on_page_content(html: str, **_: Any) -> str:
    """Let long code in tables break between its parts; short code never breaks."""

    def breakable(code: re.Match[str]) -> str:
        return "<code>" + re.sub(r"(::|[/_.=,])", r"\1<wbr>", code[1]) + "</code>"

    def cell(found: re.Match[str]) -> str:
        return re.sub(r"<code>([^<]{30,})</code>", breakable, found[0])

    return re.sub(r"<td.*?</td>", cell, html, flags=re.DOTALL)


def page_of(text: str) -> str:
    """Turn links of a file at the root into links between pages; links to other files become plain text."""
    pages = {name: page for page, name in FILES.items()}

    def link(found: re.Match[str]) -> str:
        label, target = found.groups()
        path, sharp, anchor = target.partition("#")
        if re.match(r"https?://", target) or not path:
            return found.group()
        if path.startswith("docs/"):
            return f"[{label}]({path.removeprefix('docs/')}{sharp}{anchor})"
        return f"[{label}]({pages[path]}{sharp}{anchor})" if path in pages else label

    return re.sub(r"\[([^\]]*)\]\(([^)\s]+)\)", link, text)


def commands() -> str:
    """Return the help of every command in Markdown."""
    names = re.findall(r"^    ([a-z]+) ", help_of(), re.MULTILINE)
    return "\n".join(f"## `{name}`\n\n```text\n{help_of(name)}```\n" for name in names)


def help_of(*command: str) -> str:
    """Return what `d2v-fast COMMAND --help` prints."""
    done = subprocess.run(
        [sys.executable, "-m", "d2v_fast", *command, "--help"],
        cwd=ROOT,
        env={**os.environ, "COLUMNS": "88", "NO_COLOR": "1"},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        timeout=60,
    )
    return done.stdout


def configuration() -> str:
    """Return the reference of all keys in Markdown: DeepSpeed's, then those of `d2v`.

    The latter differ by modality and objective; a modality alone stands for the first version of data2vec.
    """
    from d2v_fast.config import D2VConfig, DeepSpeedConfig
    from d2v_fast.config.schema import DEFAULT_MODALITY, DEFAULT_OBJECTIVE
    from d2v_fast.modalities import BUILT_IN, modality_named

    objectives = {name: modality_named(name).objectives for name in BUILT_IN}
    models = {name: of_name[DEFAULT_OBJECTIVE].config for name, of_name in objectives.items()}
    for name, of_name in objectives.items():
        for key, one in of_name.items():
            by_encoder = getattr(one.config, "by_encoder", {})
            models |= {f"{name} {key} of {encoder}": model for encoder, model in by_encoder.items()}
            if key != DEFAULT_OBJECTIVE and not by_encoder:
                models[f"{name} {key}"] = one.config
    lines = ["## DeepSpeed's keys", ""]
    lines += section_lines(DeepSpeedConfig, "", {})
    for path, model in nested(DeepSpeedConfig, ""):
        lines += [f"### `{path}`", "", *section_lines(model, path, {})]
    intro, descriptions = described(D2VConfig)
    known = [shown(one) for one in dict.fromkeys(key for of_name in objectives.values() for key in of_name)]
    rows = [Key("modality", ", ".join(map(shown, objectives)), shown(DEFAULT_MODALITY), descriptions["modality"])]
    rows += [Key("objective", ", ".join(known), shown(DEFAULT_OBJECTIVE), descriptions["objective"])]
    sections = []
    for name in dict.fromkeys(name for model in models.values() for name in model.model_fields):
        having = {label: model for label, model in models.items() if name in model.model_fields}
        first = next(iter(having.values()))
        if section_of(first.model_fields[name].annotation) is not None:
            defaults = {label: _given(model.model_fields[name]) for label, model in having.items()}
            sections += _sections(f"d2v.{name}", defaults)
        elif name == "encoder":
            versions = dict.fromkeys(shown(model.model_fields[name].default) for model in having.values())
            rows.append(Key(name, ", ".join(versions), shown(DEFAULT_OBJECTIVE), described(first)[1][name]))
        elif name not in ("modality", "objective"):
            about = descriptions.get(name) or described(first)[1][name]
            rows.append(key_of(name, first.model_fields[name], "d2v", having, about))
    return "\n".join([*lines, "## `d2v`", "", intro, "", *table(rows), "", *sections])


def _given(field: FieldInfo) -> Any:
    """Return a section's default, or its class if the file must give it."""
    return section_of(field.annotation) if field.is_required() else field.default


def _sections(path: str, defaults: Mapping[str, Any]) -> list[str]:
    """Return the lines of a section of `d2v` and of those below it, with a heading for each class of it.

    Args:
        path: its dotted name.
        defaults: the section by modality and objective, or its class if it has no default.
    """
    kinds: dict[type[BaseModel], dict[str, Any]] = {}
    inner: dict[str, dict[str, Any]] = {}
    for label, section in defaults.items():
        kind = section if isinstance(section, type) else type(section)
        kinds.setdefault(kind, {})[label] = section
        for name, field in kind.model_fields.items():
            if section_of(field.annotation) is not None:
                is_class = isinstance(section, type)
                inner.setdefault(f"{path}.{name}", {})[label] = _given(field) if is_class else getattr(section, name)
    lines = []
    for kind, of_kind in kinds.items():
        heading = f"### `{path}`" if len(kinds) == 1 else f"### `{path}` of {', '.join(of_kind)}"
        lines += [heading, "", *section_lines(kind, path, of_kind)]
    for name, sections in inner.items():
        lines += _sections(name, sections)
    return lines


def nested(model: type[BaseModel], prefix: str) -> Iterator[tuple[str, type[BaseModel]]]:
    """Yield the sections below a section, with their dotted names."""
    for name, field in model.model_fields.items():
        inner = section_of(field.annotation)
        if inner is not None:
            path = f"{prefix}.{name}" if prefix else name
            yield path, inner
            yield from nested(inner, path)


def section_lines(model: type[BaseModel], path: str, defaults: Mapping[str, Any]) -> list[str]:
    """Return a paragraph about a section and the table of its keys.

    Args:
        model: the section.
        path: its dotted name.
        defaults: by modality, the section as it stands if the file says nothing; empty takes the defaults of the model.
    """
    intro, descriptions = described(model)
    fields = model.model_fields.items()
    keys = [key_of(name, field, path, defaults, descriptions.get(name, "")) for name, field in fields]
    return [intro, "", *table(keys), ""]


def table(keys: list[Key]) -> list[str]:
    """Return a table with a row per key."""
    rows = [f"| `{key.name}` | {key.kind} | {key.default} | {key.description} |" for key in keys]
    return ["| key | value | default | meaning |", "|---|---|---|---|", *rows]


def described(model: type[BaseModel]) -> tuple[str, dict[str, str]]:
    """Return the text of a section's docstring, and the description of each key under `Attributes:`.

    A section that extends another one inherits its descriptions.
    """
    descriptions: dict[str, str] = {}
    for base in reversed(model.__mro__):
        if issubclass(base, BaseModel) and base.__doc__:
            block = _dedent(base.__doc__).partition("Attributes:\n")[2]
            found = re.findall(r"^    (\w+): (.*(?:\n        .*)*)", block, re.MULTILINE)
            descriptions |= {name: " ".join(text.split()) for name, text in found}
    own = _dedent(model.__dict__.get("__doc__") or "").partition("Attributes:\n")[0]
    return " ".join(own.split()), descriptions


def key_of(name: str, field: FieldInfo, path: str, defaults: Mapping[str, Any], description: str) -> Key:
    """Return what the reference says of one key."""
    inner = section_of(field.annotation)
    if inner is not None:
        whole = f"{path}.{name}" if path else name
        optional = "`null`" if field.default is None else _NO_DEFAULT if field.is_required() else "its defaults"
        return Key(name, f"[section](#{anchor(whole)})", optional, description)
    if defaults:
        values = {modality: _default(default, name) for modality, default in defaults.items()}
    else:
        values = {"": _NO_DEFAULT if field.is_required() else shown(field.default)}
    if len(set(values.values())) == 1:
        default = next(iter(values.values()))
    else:
        default = ", ".join(f"{modality} {value}" for modality, value in values.items())
    bounds = bounds_of(field)
    return Key(name, kind_of(field.annotation) + (f", {bounds}" if bounds else ""), default, description)


def _default(section: Any, name: str) -> str:
    # a class stands for a section without a default of its own
    if isinstance(section, type):
        field = section.model_fields[name]
        return _NO_DEFAULT if field.is_required() else shown(field.default)
    return shown(getattr(section, name))


def anchor(path: str) -> str:
    """Return the anchor of the heading of a section."""
    return re.sub(r"[^\w-]", "", path)


def kind_of(annotation: Any) -> str:
    """Return in words what may stand there: a type, or the values to choose from."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return ", ".join(shown(value) for value in arguments)
    if origin in (Union, UnionType):
        return " or ".join(dict.fromkeys(kind_of(one) for one in arguments))
    if origin is tuple:
        return f"list of {kind_of(arguments[0])}s"
    if hasattr(annotation, "__metadata__"):
        return kind_of(arguments[0])
    return _TYPES[annotation]


def bounds_of(field: FieldInfo) -> str:
    """Return the bounds of a number; a list has those of its numbers."""
    bounds: dict[str, Any] = {}
    for constraint in [*field.metadata, *_metadata(field.annotation)]:
        for one in getattr(constraint, "metadata", None) or [constraint]:
            bounds |= {key: getattr(one, key) for key in ("gt", "ge", "lt", "le") if hasattr(one, key)}
    signs = {"gt": ">", "ge": "≥", "lt": "<", "le": "≤"}
    return ", ".join(f"{signs[key]} {number(bounds[key])}" for key in signs if key in bounds)


def _metadata(annotation: Any) -> Iterator[Any]:
    yield from getattr(annotation, "__metadata__", ())
    for one in get_args(annotation):
        if not isinstance(one, str):
            yield from _metadata(one)


def section_of(annotation: Any) -> type[BaseModel] | None:
    """Return the section class in `X` or `X | None`; None for anything else."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    found = [section_of(one) for one in get_args(annotation)] if get_origin(annotation) in (Union, UnionType) else []
    return next((one for one in found if one is not None), None)


def shown(value: Any) -> str:
    """Return a value as it would stand in the file."""
    if isinstance(value, tuple):
        value = list(value)
    return f"`{number(value) if type(value) is int else json.dumps(value)}`"


def number(value: Any) -> str:
    """Return a number with its digits in groups, or in powers where it is a limit of the machine."""
    if isinstance(value, int) and value >= 10_000:
        power = value.bit_length() - 1
        return f"2^{power}" if value == 1 << power else f"{value:,}"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _dedent(text: str) -> str:
    first, _, rest = text.partition("\n")
    return f"{first.strip()}\n" + "\n".join(line[4:] if line.startswith("    ") else line for line in rest.splitlines())
