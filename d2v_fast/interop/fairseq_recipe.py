"""The model configuration of a published checkpoint: from its `cfg` or `args`, from settings, or assumed."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from d2v_fast.config.errors import show

# A user who trusts a file may run this. A class that is not installed is replaced by one that keeps the stored values:
# omegaconf's are in `_content` and `_val`, an enumeration's in `_value_`.
_SCRIPT = """\
import pickle, types, torch

class Missing:
    def __new__(cls, *args):
        self = object.__new__(cls)
        self.__dict__.update({{"_value_": args[0]}} if args else {{}})
        return self

class Unpickler(pickle.Unpickler):
    def find_class(self, module, name):
        try:
            return super().find_class(module, name)
        except (AttributeError, ImportError):
            return type(name, (Missing,), {{}})

def plain(x):
    inside = getattr(x, "__dict__", {{}})
    for key in ("_content", "_val", "_value_"):
        if key in inside:
            return plain(inside[key])
    if isinstance(x, dict):
        return {{str(plain(key)): plain(value) for key, value in x.items()}}
    if isinstance(x, (list, tuple, set)):
        return [plain(value) for value in x]
    for kind in (bool, int, float, str):
        if isinstance(x, kind):
            return kind(x)
    if getattr(x, "shape", None) == ():
        return plain(x.item())
    return plain(dict(inside)) if inside and not isinstance(x, torch.Tensor) else None

reader = types.ModuleType("reader")
reader.__dict__.update(vars(pickle), Unpickler=Unpickler)
options = {{"weights_only": False}} if "weights_only" in torch.load.__code__.co_varnames else {{}}
state = torch.load({path!r}, map_location="cpu", pickle_module=reader, **options)
kept = {{key: plain(state.get(key)) for key in ("cfg", "args", "optimizer_history", "extra_state")}}
torch.save({{"model": state["model"], **kept}}, {stripped!r})
"""
# in `extra_state` of this library's own files: the average has followed every update
AVERAGED_UPDATES = "average_num_updates"
_REFERENCE = re.compile(r"\$\{([\w.]+)\}")


class Settings(NamedTuple):
    """Values of a model's configuration that do not come from its checkpoint.

    Attributes:
        given: By key. They have precedence over the checkpoint's.
        run: Model section of the run that is to begin with the checkpoint, for keys that the checkpoint leaves open.
    """

    given: Mapping[str, Any] = {}
    run: Mapping[str, Any] = {}

    @classmethod
    def of(cls, given: Mapping[str, Any] | None, heads: int | None) -> Settings:
        """Return the settings for given values, and for a number of heads unless it is None."""
        return cls({**(given or {}), **({} if heads is None else {"heads": heads})})


NO_SETTINGS = Settings()
POST_NORM = "norms behind each branch (layer_norm_first false; there is no other encoder here)"


class Gathered:
    """The configuration of a model while it is put together.

    Args:
        told: Values in the checkpoint, by key.
        settings: Values from elsewhere.
        path: Of the checkpoint, for messages.
    Attributes:
        path: As given.
        values: The values found so far, by key.
        assumed: One phrase for the user for each value that is assumed.
    """

    def __init__(self, told: Mapping[str, Any], settings: Settings, path: str) -> None:
        self.values: dict[str, Any] = {**told, **settings.given}
        self.assumed: list[str] = []
        self._settings, self.path = settings, path

    def heads(self, width: int) -> None:
        """Find the number of attention heads, which no tensor shows.

        Raises:
            ValueError: It is not given anywhere, and the width is not a multiple of 64.
        """
        if "heads" in self.values:
            return
        run = self._settings.run
        if run:
            # a run of another width is refused later
            self.values["heads"] = run.get("heads") if run.get("width") == width else 1
        elif width % 64:
            raise ValueError(
                f"`--heads` must be given for `{self.path}`: it does not say how many attention heads there are, and "
                f"its width, {width}, is not a multiple of the 64 channels that each head of a published model has."
            )
        else:
            self._assume("heads", width // 64, "64 channels in each")

    def published(self, keys: Mapping[str, Any], what: str) -> None:
        """Fill in the remaining keys from the run, or else with the published values."""
        run = self._settings.run
        missing = {key: run.get(key, value) for key, value in keys.items() if key not in self.values}
        self.values |= missing
        if missing and not run:
            named = ", ".join(f"{key} {show(value)}" for key, value in missing.items())
            self.assumed.append(f"{named} ({what})")

    def from_run(self, key: str, like: str, value: Any, otherwise: Any) -> bool:
        """Fill in a key from the run, if there is one; returns whether the key has a value now.

        Args:
            key: The key.
            like: Another key. The run's value of `key` counts only if its value of `like` is `value`.
            value: See `like`.
            otherwise: The value of `key` if the run differs in `like`, for which it is refused later.
        """
        run = self._settings.run
        if key not in self.values and run:
            self.values[key] = run[key] if run.get(like) == value else otherwise
        return key in self.values

    def assume(self, key: str, value: Any, reason: str) -> None:
        """Assume a value for a key that has none yet."""
        if key not in self.values:
            self._assume(key, value, reason)

    def _assume(self, key: str, value: Any, reason: str) -> None:
        self.values[key] = value
        self.assumed.append(f"{key} {show(value)} ({reason})")


def strip_script(path: Path, stripped: Path) -> str:
    """Return a Python program that writes a checkpoint again with only tensors and plain values in it."""
    return _SCRIPT.format(path=str(path), stripped=str(stripped))


def told_by(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return the configuration in a checkpoint, by section.

    `args`, which old checkpoints have instead of `cfg`, is one flat section. If a file has both, fairseq uses `args`;
    here `cfg` supplies the keys that `args` lacks.
    """
    cfg, args = content.get("cfg"), content.get("args")
    found = dict(cfg) if isinstance(cfg, Mapping) else {}
    if isinstance(args, Mapping):
        for key in ("model", "task"):
            inner = found.get(key)
            found[key] = {**(inner if isinstance(inner, Mapping) else {}), **args}
    resolved: dict[str, Any] = _resolved(found, found)
    return resolved


def pending_decay(content: Mapping[str, Any], cfg: Mapping[str, Any]) -> float | None:
    """Return the decay of the update that an average still lacks: fairseq updates it after it has saved.

    Returns:
        None if the average lacks none, or if the checkpoint does not hold the number of updates or the decay.
    """
    history, extra = content.get("optimizer_history"), content.get("extra_state")
    if isinstance(extra, Mapping) and AVERAGED_UPDATES in extra:
        return None
    last = history[-1] if isinstance(history, list) and history else None
    model = cfg.get("model")
    n = _number(last, "num_updates")
    start, end, steps = (_number(model, key) for key in ("ema_decay", "ema_end_decay", "ema_anneal_end_step"))
    if n is None or n < 1 or start is None or end is None:
        return None
    if start == end or steps is None:
        return end if start == end else None
    return end if n >= steps else start + (end - start) * n / steps


def _number(holder: Any, key: str) -> float | None:
    value = holder.get(key) if isinstance(holder, Mapping) else None
    return float(value) if isinstance(value, (int, float)) else None


def _resolved(value: Any, root: Mapping[str, Any], depth: int = 0) -> Any:
    """Replace every `${section.key}` by the value that it refers to."""
    if isinstance(value, Mapping):
        return {str(key): _resolved(inner, root, depth + 1) for key, inner in value.items()} if depth < 20 else {}
    found = _REFERENCE.fullmatch(value) if isinstance(value, str) else None
    if found is None:
        return value
    target: Any = root
    for part in found[1].split("."):
        target = target.get(part) if isinstance(target, Mapping) else None
    return None if isinstance(target, str) and _REFERENCE.fullmatch(target) else target
