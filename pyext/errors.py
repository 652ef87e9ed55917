"""The two error types of our own. Everything else raises ValueError (values, shapes) or TypeError (kinds, dtypes)."""


class UnsupportedModelError(ValueError):
    """A config names an architecture or a feature that ramify does not run; the message lists what it does."""


class CheckpointError(ValueError):
    """A checkpoint file is missing, cut short, or disagrees with its config; the message names the file and the tensor."""
