"""What the tests of the operations get: a quicker interpreter of Triton."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import Any

import pytest


@pytest.fixture(scope="session", autouse=True)
def _language_is_patched_once() -> Iterator[None]:
    """Let the interpreter patch Triton's language once for each function, instead of at every launch and every call.

    That is a third of the time of these tests. It leaves the language patched, as nothing compiles in this process.
    """
    if os.environ.get("TRITON_INTERPRET") != "1" or find_spec("triton") is None:
        yield
        return
    from triton.runtime import interpreter

    with pytest.MonkeyPatch.context() as patch:
        # other versions of Triton have no such function
        if original := getattr(interpreter, "_patch_lang", None):
            patch.setattr(interpreter, "_patch_lang", once(original, interpreter._LangPatchScope))
        yield


def once(original: Callable[[Any], Any], nothing: Callable[[], Any]) -> Callable[[Any], Any]:
    """Return `original`, which patches for a function, so that it works once for each and has nothing to restore."""

    @functools.cache
    def patched(function: Any) -> Any:
        original(function)
        return nothing()

    return patched
