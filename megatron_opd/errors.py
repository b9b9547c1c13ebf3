"""The one exception type for mistakes the user can mend.

Raise `UserError` for bad input (a misspelt key, a missing folder, a full disk). The command line prints it as one
line, without a traceback, and exits with code 2. Anything else that escapes is a bug of ours and keeps its traceback.
"""


class UserError(Exception):
    """Bad input. The message is one line that names the key or file and says what to do about it."""
