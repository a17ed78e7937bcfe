"""Each file holds one study of one claim of the papers: `python r1mini.py study NAME`."""
