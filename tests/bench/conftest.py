"""Compiled kernels are taken apart by tools that Triton names from 3.4 on: those tests need it."""

from importlib.util import find_spec

collect_ignore = [] if find_spec("triton.knobs") else ["test_audit.py", "test_machine_code.py"]
