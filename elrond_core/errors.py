"""The one exception whose message is meant for the person at the graph."""


class ElrondError(ValueError):
    """Bad input; the message is one sentence that says what to change."""
