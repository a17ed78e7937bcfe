"""One claim of the papers a file: `python r1mini.py study NAME`."""
