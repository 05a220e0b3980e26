"""`python -m harness COMMAND`."""

from harness.cli import script

script()
