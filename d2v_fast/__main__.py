"""`python -m d2v_fast` and the `d2v-fast` command."""

from __future__ import annotations

import sys

from d2v_fast.processes.signals import end_on_import


def main() -> int:
    """Run the command line of this process and return its exit status.

    Signals are set up before anything else is imported, which takes time.
    """
    end_on_import()
    from d2v_fast.commands.console import main as console

    return console()


if __name__ == "__main__":
    sys.exit(main())
