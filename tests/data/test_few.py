"""Which classes labeled samples have."""

from __future__ import annotations

import os

import pytest

from d2v_fast.data.few import classes_of
from d2v_fast.errors import DataError


@pytest.mark.parametrize(("name", "shown"), [(os.fsdecode(b"d\xf6g"), r"d\xf6g"), ("\ud800", r"\ud800")])
def test_names_that_no_file_can_hold(name: str, shown: str) -> None:
    """A folder's name may be any bytes, and JSON may hold half of a pair: refused before training, not after it."""
    with pytest.raises(DataError) as caught:
        classes_of(["cat", name], ["cat", name], "`d2v.data.path`")
    assert f'`d2v.data.path` must hold classes whose names are UTF-8 text, but has "{shown}".' in str(caught.value)
    assert classes_of(["cat", "dög"], ["dög", "cat"], "`d2v.data.path`").tolist() == [1, 0]
