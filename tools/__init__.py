"""The commands of `python r1mini.py`: each module is one of them, or a part of one."""
