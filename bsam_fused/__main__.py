"""`python -m bsam_fused`: the command line."""

import sys

from bsam_fused.cli import main

if __name__ == "__main__":
    sys.exit(main())
