"""chat: a conversation with a checkpoint in a terminal, or one question with --ask.

    python r1mini.py chat runs/nano/r1.pt
    python r1mini.py chat runs/nano/r1.pt --ask "Compute 25-7+9+6"

A line is a question, or one of COMMANDS. One answer is printed while it is sampled: first the
thinking, dim, then the answer on a line of its own. Of several answers, chat prints how often each
came and the majority vote. Each question is asked alone: the model does not see earlier lines.
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
from tools.cli import load_from_arguments
from tools.settings import resolve_settings

# {tag: the part of a response that follows it}
PARTS = {tasks.THINK: "thinking", tasks.END_THINK: "answer", tasks.ANSWER: "answer",
         tasks.END_ANSWER: "answer"}
# {stage: its name in chat}, where they differ.
NAME_OF_STAGE = {"distill": "student", "student": "student_base"}
STAGE_OF_NAME = {NAME_OF_STAGE.get(stage, stage): stage for stage in STAGES
                 if stage not in ("helpful", "safe")}  # reward models do not write


@dataclass
class Chat:
    """The model that answers, and how it answers."""
    options: object       # of the command line; options.checkpoint is the model's file
    model: Transformer
    run: Run              # the settings of the model's preset
    temperature: float
    samples: int = 1      # answers per question
    drafts: bool = False  # speculative decoding with MTP; the answer is printed at its end
    questions: int = 0    # asked so far; part of the seed, so a repeated question is sampled anew


def main(options):
    """The command chat. Answers --ask TEXT, or starts a conversation."""
    model, record = load_from_arguments(options)
    run = resolve_settings(record.get("preset", "nano"), options.set)
    chat = Chat(options, model, run, run.eval.temperature)
    try:
        if options.ask is None:
            _converse(chat)
        else:
            _ask(chat, options.ask)
    except BrokenPipeError:  # the reader, such as head, has closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def _converse(chat):
    """Answers line after line until the input ends. Ctrl-C stops an answer. At the prompt it ends
    the conversation, as Ctrl-D does. UserError if standard input is closed."""
    if sys.stdin is None:
        raise UserError("chat reads questions from standard input, which is closed (<&-): give "
                        "--ask TEXT")
    in_terminal = sys.stdin.isatty()
    with contextlib.suppress(ImportError):   # Windows has no readline
        importlib.import_module("readline")  # input() then has arrow keys and earlier lines
    if in_terminal:
        _show_help(chat, "")
    while True:
        stage = Path(chat.options.checkpoint).stem
        prompt = f"{NAME_OF_STAGE.get(stage, stage)}> " if in_terminal else ""
        try:
            line = input(prompt)
        except (EOFError, KeyboardInterrupt):
            if in_terminal:
                print()
            return
        try:
            _obey_line(chat, line)
        except UserError as error:
            print(error)
        except KeyboardInterrupt:
            print(_dim_text("  (stopped)"))
        except EOFError:
            return


def _obey_line(chat, line):
    """Does what a line says: a command, or a question. EOFError ends the conversation."""
    command, _, word = line.strip().partition(" ")
    if command in COMMANDS:
        COMMANDS[command](chat, word.strip())
    elif command.startswith("/"):
        raise UserError(f"there is no {command}; try {', '.join(COMMANDS)}")
    elif command:
        _ask(chat, line)


# -------------------------------------------------------------------------------------------------
# Questions


def _ask(chat, question):
    """Asks one question. Prints one answer while it comes, or the majority vote of several.
    UserError if the question is empty or leaves no room for an answer."""
    prompt, limit = tasks.encode_prompt(question), chat.run.zero.max_new_tokens
    _check_question(chat, question, len(prompt), limit)
    seed = int.from_bytes(question.encode()[-7:], "big") + chat.questions
    chat.questions += 1
    stream = Stream() if chat.samples == 1 else None
    arguments = (chat.model, [prompt] * chat.samples, limit, tasks.END_ID, tasks.PAD_ID,
                 chat.temperature, chat.run.eval.top_p, seed)
    if chat.drafts:
        samples, accepted = speculate(*arguments)
        if stream:
            for token in samples.answers()[0]:
                stream(token)
    else:
        samples = generate(*arguments, stream)
    texts = [tasks.decode(ids) for ids in samples.answers()]
    note = f"{samples.answer.sum()} tokens"
    if chat.drafts:
        note += f", {accepted:.0%} of the drafts accepted"
    if not stream:
        _show_vote(texts, note)
    elif not samples.finished[0]:
        stream.end(f"{note}, cut off")
    elif tasks.parse(texts[0])[1] is None:
        stream.end(f"{note}, not in the template")
    else:
        stream.end(note)


def _check_question(chat, question, length, limit):
    """UserError if a question is empty, or if its tokens leave no room for `limit` new ones."""
    if not question.strip():
        raise UserError("the question is empty; ask, for example, Compute 25-7+9+6")
    room = chat.model.config.max_seq_len - limit
    advice = "; ask a shorter one, or --set a lower zero.max_new_tokens"
    if chat.drafts:  # each rejected draft leaves a hole in the cache
        room, advice = room - limit, " and its drafts; /drafts turns them off"
    if length > room:
        raise UserError(f"the question has {length} tokens; there is room for {max(0, room)} "
                        f"beside an answer{advice}")


def _show_vote(texts, note):
    """Prints how many responses gave each answer, and the answer that most of them gave."""
    answers = [tasks.parse(text)[1] for text in texts]
    for answer, count in Counter(answers).most_common():
        shown = "(not in the template)" if answer is None else _visible_text(answer)
        print(f"{count:>4} x {shown}")
    vote = majority(answers)
    if vote is None:
        print("majority vote: none", flush=True)
    else:
        note = f"  ({answers.count(vote)} of {len(texts)}; {note})"
        print(f"majority vote: {_visible_text(vote)}", _dim_text(note), flush=True)


class Stream:
    """Prints a response while its tokens come: thinking and answer, a line for each."""

    def __init__(self):
        self.ids = []
        self.text = ""        # what the ids say, as far as it was printed
        self.part = "answer"  # of PARTS: where the next characters belong
        self.line = None      # the part whose line was begun last

    def __call__(self, token):
        """Takes the next token: a number or a tensor (1, 1)."""
        self.ids.append(int(token))
        text = tasks.decode(self.ids)
        if not text.endswith("\ufffd"):  # otherwise the token ends within a character
            self.show(text)

    def show(self, text):
        """Prints what is new in `text`. A tag is not printed; it begins another part."""
        new, self.text = text[len(self.text):], text
        if new in PARTS:
            self.part = PARTS[new]
            return
        if not new:
            return
        shown = _visible_text(new)
        if self.part != self.line:
            shown = f"{self.part}: {shown}"
            if self.line:
                shown = "\n" + shown
        self.line = self.part
        print(_dim_text(shown) if self.part == "thinking" else shown, end="", flush=True)

    def end(self, note):
        """Prints the rest, and a note behind it."""
        self.show(tasks.decode(self.ids))
        label = ""
        if self.line != "answer":
            label = "\nanswer:" if self.line else "answer:"
        print(label, _dim_text(f"  ({note})"), flush=True)


def _dim_text(text):
    """The text, dim on a terminal unless the user has set NO_COLOR."""
    coloured = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    return f"\033[2m{text}\033[0m" if coloured else text


def _visible_text(text):
    """The text with its control characters spelt out, since they could change the terminal."""
    return re.sub("[\x00-\x1f\x7f-\x9f]", lambda match: repr(match[0])[1:-1], text)


# -------------------------------------------------------------------------------------------------
# Commands: each takes the Chat and the word behind it, or "". The docstrings are the help


def _set_model(chat, word):
    """/model NAME       use another model of this run: base, zero, r1, student ..."""
    folder = Path(chat.options.checkpoint).parent
    names = [name for name, stage in STAGE_OF_NAME.items() if (folder / f"{stage}.pt").exists()]
    if word:
        options = copy.copy(chat.options)
        options.checkpoint = str(folder / f"{STAGE_OF_NAME.get(word, word)}.pt")
        if not Path(options.checkpoint).exists():
            raise UserError(f"there is no {options.checkpoint}; here are {', '.join(names)}")
        chat.model, _ = load_from_arguments(options)
        chat.options = options
    print(f"{chat.options.checkpoint}; here are {', '.join(names)}")


def _set_temperature(chat, word):
    """/temperature T    0: always the most probable token; 1: as RL samples"""
    if word:
        chat.temperature = _read_number(word, float, 0, 100)
    print(f"temperature {chat.temperature:g}, top-p {chat.run.eval.top_p:g}")


def _set_samples(chat, word):
    """/samples N        N answers per question, and their majority vote; 1: one answer in full"""
    if word:
        chat.samples = _read_number(word, int, 1, 1000)
    print("1 answer per question" if chat.samples == 1 else f"{chat.samples} answers per question")


def _switch_drafts(chat, word):
    """/drafts           on or off: MTP drafts every second token (on a CPU this is slower)"""
    chat.drafts = not chat.drafts
    print("drafts on" if chat.drafts else "drafts off")


def _show_help(chat, word):
    """/help             show these lines"""
    print("A question, such as: Compute 25-7+9+6   (or 计算25-7+9+6), or")
    for command in COMMANDS.values():
        print(command.__doc__)


def _leave_chat(chat, word):
    """/quit             end, as Ctrl-D does"""
    raise EOFError


COMMANDS = {"/model": _set_model, "/temperature": _set_temperature, "/samples": _set_samples,
            "/drafts": _switch_drafts, "/help": _show_help, "/quit": _leave_chat}


def _read_number(word, kind, least, most):
    """A word as a number. UserError if it is none, or out of bounds."""
    with contextlib.suppress(ValueError):
        value = kind(word)
        if least <= value <= most:
            return value
    name = "whole number" if kind is int else "number"
    raise UserError(f"wanted a {name} within {least}..{most}, got {word}")
