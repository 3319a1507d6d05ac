"""The interpreter's tests are collected only where Triton interprets (test_interpreter.py starts them)."""

import os

collect_ignore = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["interpreter"]
