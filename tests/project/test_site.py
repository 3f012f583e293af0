"""The documentation site: every key is described, and every page is in it."""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Iterator
from types import ModuleType

import pytest
from pydantic import BaseModel

from d2v_fast.config import DeepSpeedConfig, parse_config
from d2v_fast.modalities import BUILT_IN, modality_named
from tests.helpers.places import ROOT


def load_hooks() -> ModuleType:
    spec = importlib.util.spec_from_file_location("site_hooks", ROOT / "docs" / "hooks.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


HOOKS = load_hooks()
OBJECTIVES = [one.config for name in BUILT_IN for one in modality_named(name).objectives.values()]
SECTIONS = [DeepSpeedConfig, *OBJECTIVES]


def models(model: type[BaseModel]) -> Iterator[type[BaseModel]]:
    """A section and all below it."""
    yield model
    for field in model.model_fields.values():
        inner = HOOKS.section_of(field.annotation)
        if inner is not None:
            yield from models(inner)


ALL = sorted({model for section in SECTIONS for model in models(section)}, key=lambda model: model.__name__)


@pytest.mark.parametrize("model", ALL, ids=lambda model: model.__name__)
def test_every_key_is_described(model: type[BaseModel]) -> None:
    intro, descriptions = HOOKS.described(model)
    assert re.fullmatch(r"[^|]*\.", intro)
    fields = set(model.model_fields)
    assert fields - set(descriptions) == set(), "describe these under `Attributes:` in the docstring of the section"
    own = set(re.findall(r"^ {8}(\w+): ", model.__doc__ or "", re.MULTILINE))
    assert own - fields == set(), "no such keys"
    assert all(re.fullmatch(r"[^|\n]*\.", text) for name, text in descriptions.items() if name in fields)


def test_reference_holds_every_key() -> None:
    text = HOOKS.configuration()
    # a heading per section, a row per key
    assert len(re.findall(r"^### ", text, re.MULTILINE)) >= 53
    for model in ALL:
        if model in OBJECTIVES:
            continue
        for name, field in model.model_fields.items():
            inner = HOOKS.section_of(field.annotation)
            value = "[section](#" if inner else HOOKS.kind_of(field.annotation)
            assert re.search(rf"^\| `{name}` \| {re.escape(value)}", text, re.MULTILINE), (model, name)
    assert "| `top_k` | integer, ≥ 1, ≤ 2^16 | vision `6`, speech `8`, text `10`, vision data2vec2 `10`, " in text
    assert '| `modality` | `"vision"`, `"speech"`, `"text"` | `"vision"` |' in text
    assert (
        '`"instance"`, `"batch"` | vision `"layer"`, speech `"instance"`, text `"layer"`, vision data2vec2 `"i' in text
    )
    assert "| `conv_strides` | list of integers | `[5, 2, 2, 2, 2, 2, 2]` |" in text
    assert '| `enabled` | boolean or `"auto"` | `false` |' in text
    assert "| `timeout_minutes` | number, > 0, ≤ 525,600 | `10.0` |" in text
    assert "| `epochs` | integer or `null`, ≥ 1, ≤ 1,000,000 | vision `800`, speech `null`, text `null`, " in text
    assert "| `betas` | list of numbers, ≥ 0, < 1 | `[0.9, 0.999]` |" in text


def test_example_of_a_configuration_is_one() -> None:
    (example,) = re.findall(r"```json\n(.*?)```", (ROOT / "docs" / "configuration.md").read_text(), re.DOTALL)
    parse_config(json.loads(example))


def test_every_page_is_in_the_site() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text().partition("\nnav:\n")[2]
    listed = set(re.findall(r": ([\w/-]+\.md)$", navigation, re.MULTILINE))
    there = {path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")}
    decisions = {path for path in there if path.startswith("decisions/")}
    assert listed == (there - decisions) | {"decisions/index.md"} | set(HOOKS.FILES)
    index = (ROOT / "docs" / "decisions" / "index.md").read_text()
    assert {f"decisions/{name}" for name in re.findall(r"\]\(([\w-]+\.md)\)", index)} == decisions - {
        "decisions/index.md"
    }


def test_decisions_have_three_parts_and_are_short() -> None:
    records = [path for path in (ROOT / "docs" / "decisions").glob("*.md") if path.stem != "index"]
    assert len(records) > 20
    for path in records:
        text = path.read_text()
        assert re.findall(r"^#+ (.*)", text, re.MULTILINE)[1:] == ["Context", "Decision", "Consequences"], path.name
        assert len(text.splitlines()) <= 25, path.name


def test_links_of_files_at_the_root_lead_to_pages() -> None:
    page = HOOKS.page_of(
        "[a](docs/faq.md#x) ![b](docs/images/b.png) [c](SECURITY.md) [d](LICENSE) [e](https://x.org) [f](#g)"
    )
    assert page == "[a](faq.md#x) ![b](images/b.png) [c](security.md) d [e](https://x.org) [f](#g)"


def test_long_code_in_tables_breaks_between_its_parts() -> None:
    name = "tests/data/test_listing.py::test_it"
    html = f"<td><code>{name}</code> <code>a/b</code></td><p><code>{name}</code></p>"
    shown = HOOKS.on_page_content(html)
    assert shown.startswith(
        "<td><code>tests/<wbr>data/<wbr>test_<wbr>listing.<wbr>py::<wbr>test_<wbr>it</code> <code>a/b</code>"
    )
    assert shown.replace("<wbr>", "") == html
    assert shown.endswith(f"<p><code>{name}</code></p>")
