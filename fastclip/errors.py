"""The errors that a user of the command line, the data or the trainer can cause and put right."""


class UserError(Exception):
    """Something the user can put right; the command line prints the message alone."""
