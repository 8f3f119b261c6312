"""What is raised when the user's input cannot be used."""


class InputError(ValueError):
    """Something that the user gave cannot be used.

    The message names the file and line, the tensor, the attribute or the flag, and the way out:
    programs print it alone, without a traceback.
    """
