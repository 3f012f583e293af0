"""Read the text of a configuration file strictly, override keys, and compare configurations."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from d2v_fast.config.errors import ConfigError, show
from d2v_fast.files.reading import parse_json

# in the source tree a link to configs/, in an installed package a folder
PRESETS = Path(__file__).resolve().parent.parent / "configs"


def preset_names() -> list[str]:
    """Return the names of the configurations that come with this library, sorted."""
    return sorted(path.stem for path in PRESETS.glob("*.json"))


def configuration_file(path: str | Path) -> Path:
    """Return `path` if it exists, else the preset of this name.

    Raises:
        ConfigError: neither exists.
    """
    path = Path(path)
    names = preset_names()
    is_preset = str(path) in names
    if path.exists() and not (path.is_dir() and is_preset):
        return path
    if is_preset:
        return PRESETS / f"{path}.json"
    near = difflib.get_close_matches(path.stem, names, n=1, cutoff=0.5)
    hint = f"The nearest preset is `{near[0]}`." if near else f"Presets: {', '.join(names)}."
    must = "`--ds_config` must be a readable JSON file, or the name of a preset"
    raise ConfigError([f"{must}, but there is no {path}. {hint}"], str(path))


def apply_overrides(raw: Mapping[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """Return a copy of `raw` with overrides applied; missing sections are created.

    Args:
        raw: a configuration as nested dictionaries.
        overrides: `dotted.key=value` each; the value is JSON, or else text.
    Raises:
        ConfigError: an override is not of this form, or two set the same key or a section and a key in it.
    """
    result: dict[str, Any] = json.loads(json.dumps(raw))
    made: dict[tuple[str, ...], str] = {}
    for override in overrides:
        key, equals, text = override.partition("=")
        parts = tuple(key.strip().split("."))
        if not equals or not all(parts):
            raise ConfigError([f"`--set {override}` must be of the form KEY=VALUE, like d2v.model.depth=6."])
        before = next((made[one] for one in made if one[: len(parts)] == parts[: len(one)]), None)
        if before is not None:
            raise ConfigError([f"`--set {override}` and `--set {before}` set the same key. Remove one of them."])
        made[parts] = override
        section = result
        for part in parts[:-1]:
            section = section.setdefault(part, {})
            if not isinstance(section, dict):
                raise ConfigError([f"`--set {override}`: `{part}` is a value ({show(section)}), not a section."])
        section[parts[-1]] = _override_value(text)
    return result


def changed_keys(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Return a line `key: old -> new` for each dotted key that differs between two configurations."""
    lines: list[str] = []
    for key in dict.fromkeys([*old, *new]):
        before, after, dotted = old.get(key), new.get(key), f"{prefix}{key}"
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            lines += changed_keys(before, after, f"{dotted}.")
        elif before != after:
            lines.append(f"{dotted}: {show(before)} -> {show(after)}")
    return lines


def section(holder: Any, key: str) -> dict[str, Any]:
    """Return a section of a configuration that is not checked yet; empty if there is none, or another value."""
    value = holder.get(key) if isinstance(holder, dict) else None
    return value if isinstance(value, dict) else {}


def read_sections(text: str, source: str) -> dict[str, Any]:
    """Parse JSON; refuse duplicate keys, NaN and infinity, which Python's parser accepts.

    Args:
        text: content of the file.
        source: name of the file, for errors.
    Raises:
        ConfigError: with every problem of the text.
    """
    problems: list[str] = []

    def without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        seen: dict[str, Any] = {}
        for key, value in pairs:
            if key in seen:
                first, second = show(seen[key]), show(value)
                problems.append(f"`{key}` appears twice in one section ({first}, then {second}). Remove one.")
            if not key.isprintable():
                problems.append(f"`{key}` is not a known key: it holds unprintable characters.")
            seen[key] = value
        return seen

    try:
        raw = parse_json(
            text,
            object_pairs_hook=without_duplicates,
            parse_constant=lambda name: problems.append(f"`{name}` is not a JSON number."),
        )
    except ValueError as error:
        raise ConfigError([f"not a configuration: {error}"], source) from None
    if problems:
        raise ConfigError(problems, source)
    if not isinstance(raw, dict):
        raise ConfigError([f"must hold one section {{...}}, but holds {show(raw)} instead."], source)
    return raw


def _override_value(text: str) -> Any:
    """Parse the value of an override as JSON, or return the text itself."""
    try:
        return parse_json(text, object_pairs_hook=_without_duplicates)
    except ConfigError:
        raise
    except ValueError:
        return text


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    section: dict[str, Any] = {}
    for key, value in pairs:
        if key in section:
            first, second = show(section[key]), show(value)
            raise ConfigError([f"`{key}` appears twice in a section of `--set` ({first}, then {second}). Remove one."])
        section[key] = value
    return section
