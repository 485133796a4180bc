"""What this package raises. I/O errors stay `OSError` with their usual subclasses; Ctrl-C stays `KeyboardInterrupt`."""

from mqadapt_rs.readable import readable


class MqadaptError(Exception):
    """A file with wrong content, or work that cannot be done. The root of this package's own errors.

    Its text is in one line, without control characters and shortened, whatever names it quotes.
    """

    def __str__(self) -> str:
        """The message."""
        return readable(super().__str__())


class ArgumentError(MqadaptError, ValueError):
    """An argument that cannot be: an illegal plan, an unknown method or dtype, a token id outside the vocabulary."""
