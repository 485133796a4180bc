"""What this package raises. I/O errors stay `OSError` with their usual subclasses; Ctrl-C stays `KeyboardInterrupt`."""


class MqadaptError(Exception):
    """A file with wrong content, or work that cannot be done. The root of this package's own errors."""


class ArgumentError(MqadaptError, ValueError):
    """An argument that cannot be: an illegal plan, an unknown method or dtype, a token id outside the vocabulary."""
