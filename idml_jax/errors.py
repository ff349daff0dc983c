"""The one exception that the command line turns into a single line."""


class UserError(Exception):
    """A file, a setting or a value that the user can mend. The message names it and says what would be right."""
