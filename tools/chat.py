"""chat: a conversation with a checkpoint in a terminal, or with --ask in a pipe.

A line is a question, or one of COMMANDS. One answer is printed while sampling.generate draws it,
the thinking dim and on a line of its own; of several answers, what each concludes, and the vote.
Every question stands for itself: the model is not shown what was said before.
"""
import contextlib
import copy
import importlib
import os
import re
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import tasks
from engine.errors import UserError
from engine.evaluate import majority
from engine.sampling import generate, speculate
from moe import Transformer
from r1mini import STAGES, Run
from tools.cli import load_writer
from tools.settings import resolve

PARTS = {tasks.THINK: "thinking", tasks.END_THINK: "answer", tasks.ANSWER: "answer",
         tasks.END_ANSWER: "answer"}  # what follows a tag
CALLED = {"distill": "student", "student": "student_base"}  # names that are not the stage's own
MODELS = {CALLED.get(stage, stage): stage for stage in STAGES if stage not in ("helpful", "safe")}


@dataclass
class Chat:
    """Whom one talks to, and how."""
    options: object      # of the command line; its checkpoint is the one talked to
    model: Transformer
    run: Run             # the settings of its preset
    temperature: float
    samples: int = 1     # answers to a question
    drafts: bool = False  # of MTP, in speculative decoding; an answer is printed when it is whole
    asked: int = 0       # questions so far: asked again, one is answered anew


def dim(text):
    """The text, dim on a terminal, unless the user has set NO_COLOR."""
    coloured = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    return f"\033[2m{text}\033[0m" if coloured else text


def visible(text):
    """The text with its control characters spelt out: they could lead a terminal astray."""
    return re.sub("[\x00-\x1f\x7f-\x9f]", lambda found: repr(found[0])[1:-1], text)


class Stream:
    """Prints a response while its tokens come, thinking and answer on lines of their own."""

    def __init__(self):
        self.ids, self.text, self.part, self.line = [], "", "answer", None

    def __call__(self, fed):
        """Takes the next token, a number or (1, 1)."""
        self.ids.append(int(fed))
        text = tasks.decode(self.ids)
        if not text.endswith("\ufffd"):  # half a character
            self.say(text)

    def say(self, text):
        """Prints what is new in the text so far; a tag only tells which line comes next."""
        new, self.text = text[len(self.text):], text
        if new in PARTS:
            self.part = PARTS[new]
        elif new:
            label = ("\n" * bool(self.line) + f"{self.part}: ") * (self.part != self.line)
            shown, self.line = label + visible(new), self.part
            print(dim(shown) if self.part == "thinking" else shown, end="", flush=True)

    def end(self, note):
        """Prints what is left, and a note behind it."""
        self.say(tasks.decode(self.ids))
        print("" if self.line == "answer" else "\n" * bool(self.line) + "answer:",
              dim(f"  ({note})"), flush=True)


def ask(chat, question):
    """Prints one answer as it comes, or the vote over several; UserError if there is no question,
    or no room for an answer to it."""
    question = question.encode("utf-8", "replace").decode()  # a pipe may bring anything
    ids, limit = tasks.encode_prompt(question), chat.run.zero.max_new_tokens
    room = chat.model.config.max_seq_len - limit * (1 + chat.drafts)  # rejected ones leave holes
    if not question.strip():
        raise UserError("the question is empty; ask, for example, Compute 25-7+9+6")
    if len(ids) > room:
        raise UserError(f"the question has {len(ids)} tokens; there is room for {room} beside an "
                        "answer" + " and its drafts; /drafts turns them off" * chat.drafts)
    seed = int.from_bytes(question.encode()[-7:], "big") + chat.asked
    chat.asked += 1
    stream = Stream() if chat.samples == 1 else None
    asked = (chat.model, [ids] * chat.samples, limit, tasks.END_ID, tasks.PAD_ID,
             chat.temperature, chat.run.eval.top_p, seed)
    if chat.drafts:
        out, share = speculate(*asked)
        for token in out.answers()[0] if stream else ():
            stream(token)
    else:
        out = generate(*asked, stream)
    texts, note = [tasks.decode(answer) for answer in out.answers()], f"{out.answer.sum()} tokens"
    note += f", {share:.0%} of the drafts taken" if chat.drafts else ""
    if stream:
        flaw = ", not in the template" * (tasks.parse(texts[0])[1] is None)
        stream.end(note + (flaw if out.finished[0] else ", cut off"))
    else:
        show_vote(texts, note)


def show_vote(texts, note):
    """Prints how many responses came to each answer, and which most of them came to."""
    answers = [tasks.parse(text)[1] for text in texts]
    for answer, count in Counter(answers).most_common():
        print(f"{count:>4} x {'(not in the template)' if answer is None else visible(answer)}")
    vote = majority(answers)
    note = f"  ({answers.count(vote)} of {len(texts)}; {note})" * (vote is not None)
    print(f"vote: {'none' if vote is None else visible(vote)}", dim(note), flush=True)


# -------------------------------------------------------------------------------------------------
# Commands: each takes the Chat and its word ("" if none was given). Their docstrings are the help


def number(word, kind, least, most):
    """The number of a word; UserError if it is none, or out of bounds."""
    with contextlib.suppress(ValueError):
        if least <= (value := kind(word)) <= most:
            return value
    raise UserError(f"wanted a {'whole ' * (kind is int)}number within {least}..{most}, got {word}")


def talk_to(chat, word):
    """/model NAME       another model of the same run: base, zero, r1, student ..."""
    folder = Path(chat.options.checkpoint).parent
    there = [name for name, stage in MODELS.items() if (folder / f"{stage}.pt").exists()]
    if word:
        options = copy.copy(chat.options)
        options.checkpoint = str(folder / f"{MODELS.get(word, word)}.pt")
        if not Path(options.checkpoint).exists():
            raise UserError(f"there is no {options.checkpoint}; here are {', '.join(there)}")
        chat.model, _ = load_writer(options)
        chat.options = options
    print(f"{chat.options.checkpoint}; here are {', '.join(there)}")


def draw_at(chat, word):
    """/temperature T    0: always the likeliest token; 1: as RL samples"""
    chat.temperature = number(word, float, 0, 100) if word else chat.temperature
    print(f"temperature {chat.temperature:g}, top-p {chat.run.eval.top_p:g}")


def answer_times(chat, word):
    """/samples N        so many answers to a question, and the vote; 1: a single one, in full"""
    chat.samples = number(word, int, 1, 1000) if word else chat.samples
    print(f"{chat.samples} answer{'s' * (chat.samples > 1)} to a question")


def draft(chat, word):
    """/drafts           on or off: MTP drafts every second token, the model judges (slower here)"""
    chat.drafts = not chat.drafts
    print(f"drafts {'on' if chat.drafts else 'off'}")


def show_help(chat, word):
    """/help             these lines"""
    print("A question, such as: Compute 25-7+9+6   (or 计算25-7+9+6), or", *(
        command.__doc__ for command in COMMANDS.values()), sep="\n")


def leave(chat, word):
    """/quit             the end, as Ctrl-D"""
    raise EOFError


COMMANDS = {"/model": talk_to, "/temperature": draw_at, "/samples": answer_times,
            "/drafts": draft, "/help": show_help, "/quit": leave}


def answer(chat, line):
    """Does what a line says; EOFError if that is to end."""
    command, _, word = line.strip().partition(" ")
    if command in COMMANDS:
        COMMANDS[command](chat, word.strip())
    elif command.startswith("/"):
        raise UserError(f"there is no {command}; try {', '.join(COMMANDS)}")
    elif command:
        ask(chat, line)


def converse(chat):
    """Answers line after line until the input ends. Ctrl-C stops an answer; at the prompt, it
    ends like Ctrl-D."""
    typed = sys.stdin.isatty()
    with contextlib.suppress(ImportError):   # there is none on Windows
        importlib.import_module("readline")  # arrow keys, the lines before
    if typed:
        show_help(chat, "")
    while True:
        stage = Path(chat.options.checkpoint).stem
        try:
            line = input(f"{CALLED.get(stage, stage)}> " if typed else "")
        except (EOFError, KeyboardInterrupt):
            print("\n" * typed, end="")
            return
        try:
            answer(chat, line)
        except UserError as error:
            print(error)
        except KeyboardInterrupt:
            print(dim("  (stopped)"))
        except EOFError:
            return


def main(options):
    """Answers --ask TEXT, or talks."""
    model, record = load_writer(options)
    run = resolve(record.get("preset", "nano"), options.set)
    chat = Chat(options, model, run, run.eval.temperature)
    try:
        converse(chat) if options.ask is None else ask(chat, options.ask)
    except BrokenPipeError:  # who reads, such as head, has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0
