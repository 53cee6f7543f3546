"""The one exception whose message is meant for the user, and how it quotes others."""


class UserError(ValueError):
    """Something that the user can mend: what is wrong and what to do, in one sentence.

    Scripts print the message and exit with status 2; no traceback is shown.
    """


def in_one_line(error: BaseException, most: int = 200) -> str:
    """What an exception says, up to so many characters; its type if it says nothing."""
    return " ".join(str(error).split())[:most] or type(error).__name__
