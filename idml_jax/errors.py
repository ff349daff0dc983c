"""The one exception that the command line turns into a single line."""


class UserError(Exception):
    """Something in the user's hands is wrong: a file, a setting, a value. The message names it and what would be right."""
