"""The harness: loads models, attaches selections, runs probes, stores and reports rows."""

__version__ = "0.2.0"
