"""Runs a command of the checkout in this folder, and keeps the token ids of its first rollout.

    python tests/first_rollout.py OUT.json WORDS OF THE COMMAND

A part of tests/reference.sh. It works with every version of the code since commit 308ae82.
"""
import importlib
import json
import sys

target, *words = sys.argv[1:]
sys.path.insert(0, ".")
grpo, r1mini = importlib.import_module("grpo"), importlib.import_module("r1mini")
main = getattr(r1mini, "main", None) or importlib.import_module("tools.cli").main
name = "make_rollout" if hasattr(grpo, "make_rollout") else "act"  # as 308ae82 calls it
make_rollout = getattr(grpo, name)


def make_and_keep(*arguments):
    """make_rollout, which also writes the first rollout's ids; after that it is make_rollout
    alone."""
    setattr(grpo, name, make_rollout)
    rollout = make_rollout(*arguments)
    with open(target, "w", encoding="utf-8") as file:
        json.dump(rollout.samples.tokens.tolist(), file)
    return rollout


setattr(grpo, name, make_and_keep)
sys.exit(main(words))
