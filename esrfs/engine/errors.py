"""How jobs fail. (Not in ``worker``, which runs as ``__main__`` and is nobody's to import.)"""


class EngineError(Exception):
    """The engine gave no result; the message says why, for people. What the mount's side sees."""

    def __init__(self, message: str, ends: int = 0) -> None:
        """``ends``: how often the engine's process ended with this job, and no other, in its hands."""
        super().__init__(message)
        self.ends = ends


class DeviceFailedError(Exception):
    """The accelerator can't be trusted any more (after a suspend, an overflow, an error): the work is to be redone on
    the CPU."""


class JobFailedError(Exception):
    """The job can't be done, and trying again would end the same; the message is for people."""
