"""The exceptions of this package. I/O errors stay `OSError` with their subclasses; Ctrl-C stays `KeyboardInterrupt`."""

from mqadapt_rs.readable import readable


class MqadaptError(Exception):
    """The root of the errors of this package: a file has invalid content, or an operation failed.

    The message is one line of bounded length without control characters.
    """

    def __str__(self) -> str:
        """The message."""
        return readable(super().__str__())


class ArgumentError(MqadaptError, ValueError):
    """An argument is invalid: an illegal plan, an unknown method or dtype, a token id outside the vocabulary."""
