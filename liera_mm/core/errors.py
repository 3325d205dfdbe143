"""The error that the command-line tools show in two lines, without a traceback."""


class SetupError(RuntimeError):
    """Something that the user has to mend before a training or a test can start, or go on.

    Args:
        problem: What is missing or wrong, and where.
        remedy: What to do about it.
    """

    def __init__(self, problem: str, remedy: str):
        super().__init__(problem, remedy)

    def __str__(self) -> str:
        return '\n'.join(self.args)
