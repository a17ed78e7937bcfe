"""Standard input and output. They may lack letters, be closed, or have no reader any more.

If nobody reads what is printed, there is no error. `python r1mini.py cost | head -1` closes the
pipe after a line, and a user may close the terminal while a model trains. Then a short command
ends. A training goes on, since its log and its checkpoints are files.
"""
import contextlib
import errno
import os
import sys

GONE = (errno.EPIPE, errno.EIO)  # the reader of a pipe; the terminal


def accept_any_output():
    """Makes standard input and output accept any text. Where the console has no letter for a
    character, an escape is printed. Bytes of standard input that are no text are read as U+FFFD.
    What is written to an output that the shell has closed (`>&-`) is lost."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))
    for stream, errors in ((sys.stdout, "backslashreplace"), (sys.stderr, "backslashreplace"),
                           (sys.stdin, "replace")):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors=errors)


def silence_output(stream):
    """Sends what a stream writes from now on, and what it holds back, to nowhere."""
    with contextlib.suppress(OSError, ValueError, AttributeError):  # it is no file, as in tests
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


def flush_output():
    """Writes what standard output and error hold back. Returns False if nobody reads it. Then both
    are silenced, so that Python prints no error about it when it ends."""
    is_read = True
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except ValueError:  # it is closed
            continue
        except OSError as error:
            if error.errno not in GONE:
                raise
            silence_output(stream)
            is_read = False
    return is_read


class Lasting:
    """A stream that falls silent when nobody reads it any more, instead of raising an error."""

    def __init__(self, stream):
        self.stream = stream

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text):
        """Writes a text."""
        return self.attempt(self.stream.write, text)

    def flush(self):
        """Writes what is held back."""
        self.attempt(self.stream.flush)

    def attempt(self, action, *arguments):
        """Does something with the stream."""
        try:
            return action(*arguments)
        except OSError as error:
            if error.errno not in GONE:
                raise
            silence_output(self.stream)


@contextlib.contextmanager
def lasting_output():
    """A context in which a closed pipe or terminal ends nothing."""
    with contextlib.redirect_stdout(Lasting(sys.stdout)), \
            contextlib.redirect_stderr(Lasting(sys.stderr)):
        yield
