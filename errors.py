"""The one kind of error that is the user's to mend: a flag, a file, a row, a checkpoint."""


class UserError(Exception):
    """A mistake that whoever runs a command can mend; its text says where, and what to do.

    It is raised where a file is opened, a row is parsed, a flag is checked, and ends a command in
    its text alone, with exit code 2. Every other exception is a bug, and keeps its traceback.
    """
