"""How commands fail: a user's mistake is text and exit code 2; anything else that fails is exit code 1."""


class UserError(Exception):
    """The user's mistake, with the field, both numbers and the way out. Shown as text, never as a traceback."""


class Failure(Exception):
    """Something failed that no override would mend (a run crashed, a server is gone). Exit code 1."""


class StoppedUnsaved(Failure):
    """A run was asked to stop, and did, but its last steps could not be saved."""
