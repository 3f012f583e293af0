"""Compare this library with recorded steps of the public data2vec 2.0 code.

    python -m tests.golden2                    # the cases in this folder
    python -m tests.golden2 FOLDER...          # every case of these folders
    python -m tests.golden2 --dtype fp64       # in one precision only

Prints, for each case and quantity, the worst relative error of a tensor, its limit and its name. The exit status is 1
if an error exceeds its limit, and 2 if a folder holds no case or a case cannot be computed here.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from tests.golden2.cases import CaseError, cases_of
from tests.golden2.compare import Row, compare
from tests.golden2.step import run

FOLDER = Path(__file__).parent
DTYPES = {"fp32": torch.float32, "fp64": torch.float64}


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser("python -m tests.golden2", description=__doc__.partition("\n")[0])
    parser.add_argument("folders", nargs="*", type=Path, default=[FOLDER], metavar="FOLDER", help="of recorded cases")
    parser.add_argument("--dtype", choices=(*DTYPES, "both"), default="both", help="precision (default: both)")
    given = parser.parse_args(arguments)
    dtypes = list(DTYPES) if given.dtype == "both" else [given.dtype]
    status = 0
    for folder in given.folders:
        try:
            cases = cases_of(folder)
        except CaseError as error:
            print(f"error: {error}", file=sys.stderr)
            status = 2
            continue
        for case in cases:
            for name in dtypes:
                try:
                    rows = compare(case, run(case, DTYPES[name]), DTYPES[name])
                except CaseError as error:
                    print(f"error: {error}", file=sys.stderr)
                    status = 2
                    break
                status = max(status, _show(folder / case.name, name, rows))
    return status


def _show(where: Path, dtype: str, rows: list[Row]) -> int:
    """Print a table; returns 1 if something exceeds its limit, else 0."""
    print(f"{where} in {dtype}")
    for row in rows:
        mark = "ok" if row.fits else "TOO FAR"
        print(f"  {row.quantity:16} {row.error:9.2e}  limit {row.limit:7.0e}  {mark:8} {row.worst}")
    return 0 if all(row.fits for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
