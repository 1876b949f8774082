"""Errors of the package. Each message names the thing, its value and what is allowed."""


class A2C2Error(Exception):
    """Base of every error that the package raises on purpose."""


class ConfigError(A2C2Error, ValueError):
    """A parameter or configuration file is wrong, alone or together with others."""


class ChunkError(A2C2Error, ValueError):
    """An action chunk cannot be used: its shape, names, values or stamps are wrong.

    ``code`` is the name under which the refusal is counted.
    """

    def __init__(self, message: str, code: str = "invalid") -> None:
        super().__init__(message)
        self.code = code


class ObservationError(A2C2Error, ValueError):
    """An observation does not have the stream, shape, dtype or encoding that was declared."""


class OtherJointsError(ObservationError):
    """A joint state has none of the joints that were declared: it may be another driver's on the same topic."""


class ManifestError(A2C2Error, ValueError):
    """A head and the chunks, cameras or robot that it is to be used with do not fit each other."""


class PolicyError(A2C2Error, RuntimeError):
    """A policy cannot be loaded or did not return a usable chunk."""


class SimulationError(A2C2Error, RuntimeError):
    """The simulator was asked for something that it does not have, or returned unusable data."""


class StateError(A2C2Error, RuntimeError):
    """Something was asked for that the state of the control loop does not allow."""


class HeadError(A2C2Error, RuntimeError):
    """The runtime of a correction head failed."""
