"""The errors a user can cause. Each carries one clear sentence."""


class ConfigError(ValueError):
    """Bad input: the run ends before any model is loaded, with exit code 2."""


class AssetError(RuntimeError):
    """A pinned model or data file could not be had or does not match its hash."""


class UnsupportedError(RuntimeError):
    """A (model, method) pair that makes no sense: the cell gets a row with status `unsupported`."""


class MeasurementError(RuntimeError):
    """What a model gives is no number, or an item can't be given to it: the cell fails with this sentence."""
