"""`python -m d2v_fast`, which is the `d2v-fast` command."""

import sys

from d2v_fast.command import main

if __name__ == "__main__":
    sys.exit(main())
