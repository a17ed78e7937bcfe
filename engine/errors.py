"""The error that a user can do something about."""
import errno


class UserError(ValueError):
    """Its message is one line: what was wrong and what to do. The command ends with code 2."""


def is_out_of_memory(error):
    """Whether an error says that there was not enough memory, on the CPU or on a GPU. torch
    raises a RuntimeError. On a CPU its text names the file of torch that allocates."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    words = ("allocate memory", "out of memory", "alloc_cpu.cpp")
    return isinstance(error, RuntimeError) and any(word in str(error) for word in words)
