"""The start of the `d2v-fast` command: first what a signal does, then everything that takes time to import."""

from __future__ import annotations

from d2v_fast.stop_request import end_on_import


def main() -> int:
    """Run the command line of this process; returns the exit status, see `console.main`."""
    end_on_import()
    from d2v_fast.console import main as console

    return console()
