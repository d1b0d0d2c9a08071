"""The exceptions whose messages are meant for the person at the graph."""


class ElrondError(ValueError):
    """Bad input; the message is one sentence that says what to change."""


class NotFoundError(ElrondError):
    """A file or a direction that was asked for is not there."""
