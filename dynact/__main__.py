"""`python -m dynact COMMAND`, the same as `python -m harness COMMAND`."""

from harness.cli import script

script()
