"""Errors that a user can mend.

Every one becomes one clear line on stderr and exit code 2; anything else is a defect of ours and keeps its traceback.
"""


class UserError(Exception):
    """Bad input, named so that it can be mended.

    The message is one line: what is wrong (file, line, key or value), then the remedy.
    """


class CheckFailedError(UserError):
    """What was made is not what it should be: exit code 1 in place of 2."""


class EndedElsewhere(UserError):
    """Another process of the run failed; the message is what it said."""


def one_line(error: BaseException) -> str:
    """Another library's message on one line of at most 240 characters, to stand inside a :class:`UserError`'s.

    The error's kind, where it says nothing.
    """
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 240 else text[:237] + "..."
