"""The one exception whose message is meant for the user."""


class UserError(ValueError):
    """Something that the user can mend: what is wrong and what to do, in one sentence.

    Scripts print the message and exit with status 2; no traceback is shown.
    """
