"""The ranges of pyproject.toml, the versions of constraints.txt and the hashes of requirements.lock agree."""

from __future__ import annotations

import re
import sys
from importlib.metadata import PackageNotFoundError, distribution

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.helpers.places import ROOT

if sys.version_info >= (3, 11):
    import tomllib
else:
    pytest.skip("the lock is for Python 3.11 and later", allow_module_level=True)

PYTHONS = ("3.11", "3.12", "3.13")
LOCKS = ("requirements.lock", "docs/requirements.lock")
HASH = re.compile(r"--hash=sha256:[0-9a-f]{64}")


def pins() -> dict[str, str]:
    """Versions in constraints.txt by name."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    found = [line.split("==") for line in lines if line and not line.startswith("#")]
    assert all(len(pin) == 2 for pin in found)
    return {canonicalize_name(name): version for name, version in found}


def lock(file: str = "requirements.lock") -> dict[str, tuple[str, list[str]]]:
    """Version and hashes in a lock by name."""
    text = re.sub(r" ; [^\\]*", " ", (ROOT / file).read_text()).replace("\\\n", "")
    found = [line.split() for line in text.splitlines() if line and not line.startswith("#")]
    return {canonicalize_name(pin.split("==")[0]): (pin.split("==")[1], hashes) for pin, *hashes in found}


def asked_for() -> list[tuple[str, Requirement]]:
    """What pyproject.toml asks for in the extras that `make setup` installs, and for the build."""
    content = tomllib.loads((ROOT / "pyproject.toml").read_text())
    project, extras = content["project"], content["project"]["optional-dependencies"]
    wanted = project["dependencies"] + [text for name in ("train", "test", "bench", "hf") for text in extras[name]]
    return [("pyproject.toml", Requirement(text)) for text in wanted + content["build-system"]["requires"]]


def closure() -> dict[str, list[tuple[str, Requirement]]]:
    """Everything that follows from it, by name, with who asks: by what the installed packages say of themselves.

    What a CUDA build of torch brings is left out: nobody pins that here.
    """
    found: dict[str, list[tuple[str, Requirement]]] = {}
    seen, waiting = set(), [(who, requirement, None) for who, requirement in asked_for()]
    while waiting:
        who, requirement, extra = waiting.pop()
        key = (who, str(requirement), extra)
        if key in seen or not needed(requirement, extra):
            continue
        seen.add(key)
        name = canonicalize_name(requirement.name)
        if who == "torch" and name not in pins():
            continue
        found.setdefault(name, []).append((who, requirement))
        for text in distribution(name).requires or []:
            waiting += [(name, Requirement(text), inner) for inner in [None, *requirement.extras]]
    return found


def needed(requirement: Requirement, extra: str | None) -> bool:
    environments = [
        {"python_version": python, "python_full_version": f"{python}.0", "sys_platform": "linux", "extra": extra or ""}
        for python in PYTHONS
    ]
    return requirement.marker is None or any(requirement.marker.evaluate(one) for one in environments)


def test_lock_has_the_versions_of_the_constraints() -> None:
    wanted = {name: version for name, version in pins().items() if name != "torch"}
    assert {name: version for name, (version, _) in lock().items()} == wanted, "run `make lock`"


@pytest.mark.parametrize("file", LOCKS)
def test_every_version_has_hashes(file: str) -> None:
    for name, (_, hashes) in lock(file).items():
        assert hashes, name
        assert all(HASH.fullmatch(text) for text in hashes), name


@pytest.mark.parametrize("file", LOCKS)
def test_lock_names_no_place(file: str) -> None:
    assert not re.search(r"://|index-url|find-links|trusted-host", (ROOT / file).read_text())


def test_lock_of_the_site_is_that_of_its_extra() -> None:
    """Without torch, and in versions that are tested where the tests need a package too."""
    extra = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]["docs"]
    found = {name: version for name, (version, _) in lock("docs/requirements.lock").items()}
    for requirement in map(Requirement, extra):
        assert requirement.specifier.contains(found[canonicalize_name(requirement.name)]), f"{requirement}: `make lock`"
    assert "torch" not in found
    assert {name: found[name] for name in found.keys() & pins().keys()} == {
        name: version for name, version in pins().items() if name in found
    }


def test_constraints_hold_what_pyproject_leads_to() -> None:
    versions = pins()
    try:
        found = closure()
    except PackageNotFoundError as error:
        pytest.skip(f"{error.name} is not installed: what it asks for is unknown here")
    for name in set(found) & set(versions):
        # a build may name itself after its hardware: 2.13.0+cpu
        installed = distribution(name).version.partition("+")[0]
        if installed != versions[name]:
            pytest.skip(f"{name} {installed} is installed instead of {versions[name]}: so are its requirements")
    assert sorted(set(found) - set(versions)) == [], "missing in constraints.txt"
    assert sorted(set(versions) - set(found)) == [], "no one asks for it, remove it from constraints.txt"
    wrong = [
        f"{who} asks for {requirement}, and {name} is pinned to {versions[name]}"
        for name, requirements in found.items()
        for who, requirement in requirements
        if not requirement.specifier.contains(versions[name], prereleases=True)
    ]
    assert wrong == []
