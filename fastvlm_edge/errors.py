"""The one exception that a user is meant to read."""


class FastVLMError(Exception):
    """What is wrong, with which value, and what to do about it, in one or two sentences.

    The command line prints the message on stderr and exits with status 1; a library caller may catch it.
    """
