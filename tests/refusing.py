"""What tests of refused commands share: the one line that is printed, and a hostile pickle."""
from tools import cli


def contents(folder):
    """{file: bytes} of a folder."""
    return {f: f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


def refused(argv, capsys):
    """The one line that refuses a command. The exit code must be 2."""
    capsys.readouterr()
    try:
        code = cli.main(argv)
    except SystemExit as end:  # argparse
        code = end.code
    error = capsys.readouterr().err.split("\r")[-1].strip()
    lines = [line for line in error.split("\n") if line.startswith("r1mini: ")]
    assert code == 2 and len(lines) == 1 and "Traceback (most" not in error, error
    assert "None" not in lines[0] and 20 < len(lines[0]) < 450  # with long paths
    return lines[0]


class Evil:
    """A pickle of it makes a file when it is loaded."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return open, (str(self.mark), "w")
