"""`python -m adamw_triton` is the command `adamw-triton`."""

import sys

from adamw_triton.cli import main

sys.exit(main())
