"""show: one group of GRPO in the terminal, in at most ten seconds.

    python r1mini.py show

The base and R1-Zero, both from the repository, answer one question 16 times. Beside each answer
stand its reward and its advantage. The question is held-out; nothing is trained.
"""
import os
import random
import shutil
import sys
import unicodedata
from pathlib import Path

import r1mini
import tasks
from engine import checkpoint
from engine.errors import UserError
from engine.sampling import generate
from grpo import advantages
from tools.look import NAMES, reward_parts

ROOT = Path(__file__).parent.parent
KEPT = ROOT / "results" / "checkpoints" / "0"  # of seed 0
GREEN, RED, GREY, BOLD = 32, 31, 90, 1  # ANSI colours


def main(options):
    """Prints a group of answers of each model. Returns the exit code."""
    paths = [KEPT / f"{stage}.pt" for stage in ("base", "zero")]
    for path in paths:
        if not path.exists():
            raise UserError(f"{path} is missing: git checkout results/checkpoints brings it back")
    problem = tasks.make_problem(random.Random("show"), 4, "test", "en")
    print(f"{_paint(problem.question, BOLD)}     right: {problem.answer}")
    for path in paths:
        model, _ = checkpoint.load(path)
        _show_group(NAMES[path.stem], model, problem)
    print("\nGRPO makes the tokens of answers with a positive advantage likelier, and those of "
          "the others\nless likely. Your own run, step by step: python r1mini.py look RUN")
    return 0


def _show_group(name, model, problem):
    """Prints the answers of one model, with rewards and advantages as R1-Zero's training gives
    them."""
    s = r1mini.Run().zero
    prompts = [tasks.encode_prompt(problem.question)] * s.group_size
    ids = generate(model, prompts, s.max_new_tokens, tasks.END_ID, tasks.PAD_ID).answers()
    texts = [tasks.decode(x) for x in ids]
    rewards = sum(reward_parts(texts, problem, s, list(map(len, ids)), 0).values())
    print(f"\n{_paint(name, BOLD)}: mean reward {rewards.mean():.2f}, std {rewards.std():.2f}; "
          "advantage = (reward - mean) / std")
    if (rewards == rewards[0]).all():
        print("All rewards are equal, so every advantage is 0: this group teaches nothing.")
    print(_paint("reward  advantage  answer", GREY))
    width = max(20, shutil.get_terminal_size().columns - 19)
    group_advantages = advantages(rewards.unsqueeze(0), s.normalize_std)[0]         # (G,)
    for text, reward, advantage in zip(texts, rewards, group_advantages):
        colour = GREEN if advantage > 0 else RED if advantage < 0 else GREY
        numbers = f"{reward:6.2f}  {_paint(f'{advantage:+9.2f}', colour)}  "
        print(numbers + _paint(_cut(text.replace("\n", " "), width), colour))


def _cut(text, width):
    """The text. If it fills more than `width` columns, its middle is left out. A Chinese character
    fills two columns."""
    def columns(letters):
        return sum(2 if unicodedata.east_asian_width(x) in "FW" else 1 for x in letters)

    begin, end = text, ""
    if columns(text) > width:
        end = f" ... {text[-width // 3:]}"  # the answer is at the end
        while columns(begin + end) > width:
            begin = begin[:-1]
    return begin + end


def _paint(text, colour):
    """The text in a colour, if stdout is a terminal and NO_COLOR is not set."""
    if not sys.stdout.isatty() or os.environ.get("NO_COLOR"):
        return text
    return f"\x1b[{colour}m{text}\x1b[0m"
