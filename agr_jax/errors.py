"""Mistakes that a user can mend: each message names what is wrong and what would be right."""


class UserError(Exception):
    """Base of the errors that `launch.py` prints in one line, without a traceback."""


class ConfigError(UserError):
    """A config field that does not exist, has the wrong type, or is out of range."""


class DataError(UserError, ValueError):
    """A data set that is missing, damaged, partial, or not what its name says."""


class CheckpointError(UserError, ValueError):
    """A checkpoint that is missing or belongs to another model, data set or run."""


class RunFolderError(UserError, RuntimeError):
    """A run folder that is in use, or that holds a run with another config."""


class FolderInUseError(RunFolderError):
    """A run folder that another process holds at the moment."""


class EvaluationStateError(UserError, ValueError):
    """Saved progress of an evaluation that is damaged or belongs to another one."""


class OtherEvaluationError(EvaluationStateError):
    """Saved progress of an evaluation with other settings, images or weights."""


class NonFiniteLossError(UserError, FloatingPointError):
    """A loss, or its gradient, that became NaN or infinite."""
