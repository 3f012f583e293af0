"""Base class of the configuration sections, and the error that lists every problem of a file.

Nothing here imports torch, so that a wrong file is refused at once.
"""

from __future__ import annotations

import difflib
import functools
import json
from collections.abc import Iterable
from typing import Annotated, Any, ClassVar, NamedTuple, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError, model_validator
from pydantic_core import ErrorDetails, PydanticCustomError
from typing_extensions import Self

from d2v_fast.errors import UserError
from d2v_fast.files.paths import PathError, expand_path
from d2v_fast.files.reading import printable

_EXPECTED = {
    "int_type": "an integer",
    "int_from_float": "an integer",
    "float_type": "a number",
    "bool_type": "true or false",
    "string_type": "a string",
    "tuple_type": "a list",
    "list_type": "a list",
    "dict_type": "a section {...}",
    "model_type": "a section {...}",
    "finite_number": "a finite number",
}


# sizes: beyond any model, and small enough to check at once
MAX_SIZE = 1 << 16
# beyond any run: optimizer steps, samples, loader workers
MAX_STEPS = 10**12
MAX_SAMPLES = 10**9
MAX_WORKERS = 1024
# limits of every key: counters are 64-bit integers, computed values are fp32
_MAX_INTEGER = 2**63 - 1
_MAX_FLOAT = 1e38

AnySection = TypeVar("AnySection", bound="Section")


def _expanded(text: str) -> str:
    try:
        return expand_path(text)
    except PathError as error:
        raise ValueError(error.must) from None


# type of every key that holds a path
PathText = Annotated[str, AfterValidator(_expanded)]


class ConfigError(UserError, ValueError):
    """A configuration that cannot be run.

    Attributes:
        problems: one sentence for each problem.
    """

    status, by_all = 2, True

    def __init__(self, problems: Iterable[str], source: str = "configuration") -> None:
        self.problems = tuple(map(printable, problems))
        count = "1 problem" if len(self.problems) == 1 else f"{len(self.problems)} problems"
        super().__init__("\n".join([f"{source}: {count}", *(f"  - {problem}" for problem in self.problems)]))


class Problem(NamedTuple):
    """A value that a section refuses. `say` makes the sentence "`key` must `must`, but is `value` instead. `hint`".

    Attributes:
        key: dotted key within its section.
        must: what the value must do, beginning with a verb.
        value: as in the file.
        hint: what to do, as a sentence; may be empty.
    """

    key: str
    must: str
    value: Any
    hint: str = ""


class Section(BaseModel):
    """A section of the configuration: frozen, strictly typed (1.0 is no integer), finite, without unknown keys."""

    # unknown key -> advice, instead of the nearest known key
    hints: ClassVar[dict[str, str]] = {}
    # fields that every subclass must define
    required: ClassVar[tuple[str, ...]] = ()

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=())

    @classmethod
    def __pydantic_init_subclass__(cls, **_: Any) -> None:
        missing = [name for name in cls.required if name not in cls.model_fields]
        if missing and "required" not in vars(cls):
            raise TypeError(f"{cls.__module__}.{cls.__name__} must define the fields {', '.join(missing)}.")

    @model_validator(mode="after")
    def _check_bounds(self) -> Self:
        """Refuse numbers that 64-bit integers or fp32 cannot hold."""
        refuse_if(
            Problem(key, f"be of a magnitude of at most {_limit_of(one):g}", value)
            for key, value in self
            for one in (value if isinstance(value, tuple) else (value,))
            if isinstance(one, (int, float)) and abs(one) > _limit_of(one)
        )
        return self


def _limit_of(number: float) -> float:
    return _MAX_INTEGER if isinstance(number, int) else _MAX_FLOAT


def refuse_if(problems: Iterable[Problem]) -> None:
    """Raise the error of a pydantic validator if there is any problem."""
    found = [problem._asdict() for problem in problems]
    if found:
        text = "; ".join(say(Problem(**problem)) for problem in found)
        raise PydanticCustomError("problems", "{text}", {"text": text, "problems": found})


def say(problem: Problem, prefix: str = "") -> str:
    """Return the problem as a sentence; `prefix` is the dotted key of its section."""
    key = ".".join(part for part in (prefix, problem.key) if part)
    text = f"`{key}` must {problem.must}, but is {show(problem.value)} instead."
    return f"{text} {problem.hint}".rstrip()


def problem_of_heads(width: int, heads: int) -> list[Problem]:
    """Return a problem if the number of attention heads does not divide the width, else nothing."""
    if width % heads == 0:
        return []
    divisors = [n for n in range(1, width + 1) if width % n == 0]
    near = min(divisors, key=lambda n: abs(n - heads))
    hint = f"The nearest divisor is {near}."
    return [Problem("heads", f"divide `width` ({width})", heads, hint)]


def check(
    model: type[AnySection], raw: Any, prefix: str = "", also: Iterable[str] = ()
) -> tuple[AnySection | None, list[str]]:
    """Validate a section; return it, or None and every problem as a sentence.

    Args:
        model: class of the section.
        raw: content of the section in the file.
        prefix: dotted key of the section in the file.
        also: dotted keys of other sections, to suggest for a misplaced key.
    """
    problems: list[str] = []
    try:
        return model.model_validate(raw), problems
    except ValidationError as error:
        details = error.errors(include_url=False)
    also = list(also)
    elsewhere = [*known_keys(model, prefix), *also]
    unknown = [detail for detail in details if detail["type"] == "extra_forbidden"]
    if unknown:
        # check again without the unknown keys, to find the other problems of those sections
        problems += [_sentence(detail, model, prefix, elsewhere) for detail in unknown]
        _, more = check(model, _without(raw, [detail["loc"] for detail in unknown]), prefix, also)
        return None, problems + more
    for detail in details:
        if detail["type"] == "problems":
            section = ".".join([*filter(None, [prefix]), *map(str, detail["loc"])])
            problems += [say(Problem(**problem), section) for problem in detail["ctx"]["problems"]]
        else:
            problems.append(_sentence(detail, model, prefix, elsewhere))
    return None, problems


@functools.cache
def known_keys(model: type[BaseModel], prefix: str = "") -> tuple[str, ...]:
    """Return the dotted names of all keys below `model`, including sections."""
    keys: list[str] = []
    for name, field in model.model_fields.items():
        key = f"{prefix}.{name}" if prefix else name
        keys.append(key)
        nested = _section_of(field.annotation)
        if nested is not None:
            keys += known_keys(nested, key)
    return tuple(keys)


def nearest_key(key: str, siblings: Iterable[str], elsewhere: Iterable[str]) -> str:
    """Return a hint for an unknown dotted key: the closest sibling, or the same name in another section."""
    section, _, name = key.rpartition(".")
    close = difflib.get_close_matches(name, list(siblings), n=1, cutoff=0.6)
    if close:
        return f"Did you mean `{'.'.join(filter(None, [section, close[0]]))}`?"
    moved = [other for other in elsewhere if other.rpartition(".")[2] == name and other != key]
    if moved:
        return f"Did you mean `{moved[0]}`?"
    by_name = {other.rpartition(".")[2]: other for other in elsewhere}
    similar = difflib.get_close_matches(name, list(by_name), n=1, cutoff=0.75)
    if similar:
        return f"Did you mean `{by_name[similar[0]]}`?"
    return f"Known here: {', '.join(siblings)}."


def show(value: Any) -> str:
    """Return the value as JSON, shortened."""
    try:
        text = json.dumps(value)
    except (TypeError, ValueError):
        text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _sentence(detail: ErrorDetails, model: type[BaseModel], prefix: str, elsewhere: list[str]) -> str:
    loc, kind, context = detail["loc"], detail["type"], detail.get("ctx", {})
    key = ".".join([*filter(None, [prefix]), *map(str, loc)])
    if kind == "missing":
        return f"`{key}` is required, but missing."
    if kind == "extra_forbidden":
        section = _walk(model, loc[:-1])
        siblings = list(section.model_fields) if section else []
        value = show(detail["input"])
        hint = getattr(section, "hints", {}).get(str(loc[-1])) or nearest_key(key, siblings, elsewhere)
        return f"`{key}` (value {value}) is not a known key. {hint}"
    if kind == "literal_error":
        expected = f"be {context['expected']}"
    elif kind in ("too_short", "too_long"):
        length = context.get("min_length", context.get("max_length"))
        expected = f"be a list of {length} values"
    elif kind in _EXPECTED:
        expected = f"be {_EXPECTED[kind]}"
    elif kind in ("greater_than", "greater_than_equal", "less_than", "less_than_equal"):
        expected = _interval(model, loc) or detail["msg"].removeprefix("Input should ")
    else:
        expected = detail["msg"].removeprefix("Input should ").removeprefix("Value error, ")
    # Transformers fills in "auto" in DeepSpeed files
    hint = " Only Transformers' Trainer fills in `auto`: write the value." if detail["input"] == "auto" else ""
    return f"`{key}` must {expected}, but is {show(detail['input'])} instead.{hint}"


def _without(raw: Any, locations: Iterable[tuple[int | str, ...]]) -> Any:
    copy = json.loads(json.dumps(raw))
    for loc in locations:
        section = copy
        for part in loc[:-1]:
            section = section[part]
        section.pop(loc[-1], None)
    return copy


def _interval(model: type[BaseModel], loc: tuple[int | str, ...]) -> str:
    section = _walk(model, loc[:-1])
    if section is None or loc[-1] not in section.model_fields:
        return ""
    bounds: dict[str, Any] = {}
    for constraint in section.model_fields[str(loc[-1])].metadata:
        bounds |= {name: getattr(constraint, name) for name in ("gt", "ge", "lt", "le") if hasattr(constraint, name)}
    if not bounds.keys() & {"lt", "le"}:
        return f"be > {bounds['gt']}" if "gt" in bounds else f"be >= {bounds['ge']}"
    left = f"[{bounds['ge']}" if "ge" in bounds else f"({bounds.get('gt', '-infinity')}"
    right = f"{bounds['le']}]" if "le" in bounds else f"{bounds['lt']})"
    return f"be in {left}, {right}"


def _walk(model: type[BaseModel], loc: Iterable[int | str]) -> type[BaseModel] | None:
    for part in loc:
        field = model.model_fields.get(str(part))
        nested = _section_of(field.annotation) if field else None
        if nested is None:
            return None
        model = nested
    return model


def _section_of(annotation: Any) -> type[BaseModel] | None:
    """The section class in `X`, `X | None` or `Annotated[X, ...]`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for argument in getattr(annotation, "__args__", ()):
        found = _section_of(argument)
        if found is not None:
            return found
    return None
