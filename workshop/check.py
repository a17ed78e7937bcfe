"""Checks the functions that you write, and explains mistakes.

    python workshop/check.py                    checks all of them
    python workshop/check.py advantage          checks this one
    python workshop/check.py hint advantage     a hint; `hint advantage 2` shows one more
    python workshop/check.py reset advantage    begins this one anew, and keeps the old file

Your functions are in workshop/mine/, which git leaves alone. The first check puts the
exercises there. Your code runs in a separate process. If your code never ends, or if it ends
Python, the checker goes on: it starts a new process for the next exercise. judge.py has the
right functions and the usual mistakes.
"""
import faulthandler
import linecache
import multiprocessing
import re
import shutil
import signal
import sys
import tempfile
from pathlib import Path

WORKSHOP = Path(__file__).resolve().parent
sys.path.insert(0, str(WORKSHOP.parent))
from engine.errors import UserError
from workshop.hints import HINTS

NAMES = ("advantage", "reward", "kl", "kimi", "bias", "router", "absorbed")
EXERCISES, MINE = WORKSHOP / "exercises", WORKSHOP / "mine"
LIMIT = 10  # seconds for one exercise. A right function needs less than one.
SPAWN = multiprocessing.get_context("spawn")  # the same on Linux, macOS and Windows


# ------------------------------------------------------------------------------
# The student's files


def place_exercises(names, folder):
    """Copies the exercises that are not there yet into the student's folder."""
    for name in names:
        path = folder / f"{name}.py"
        if not path.exists():
            folder.mkdir(parents=True, exist_ok=True)
            shutil.copy(EXERCISES / f"{name}.py", path)
            print(f"{name:10} is in {path}: write the function there", flush=True)


def reset(name, folder):
    """Puts the exercise as it was into the student's folder. The student's file gets a new
    name. Returns a sentence."""
    path, number = folder / f"{name}.py", 1
    if not path.exists():
        place_exercises([name], folder)
        return f"{path} is as it was at first"
    while (kept := folder / f"{name}.old{number}.py").exists():
        number += 1
    path.rename(kept)
    shutil.copy(EXERCISES / f"{name}.py", path)
    return f"{path} is as it was at first; what you wrote is in {kept.name}"


def _hint_lines(name, number):
    """The first hints to an exercise, and how to see one more."""
    hints = HINTS[name][:number]
    lines = [f"{i}. {hint}" for i, hint in enumerate(hints, 1)]
    if number < len(HINTS[name]):
        lines.append(f"One more: python workshop/check.py hint {name} {number + 1}")
    else:
        lines.append("That was the last one. A whole solution is in workshop/solutions/.")
    return lines


# ------------------------------------------------------------------------------
# The worker


def _work(sender, names, folder, seconds, last_words):
    """What the worker does. It sends True, then the verdict on each exercise. If an
    exercise takes longer than `seconds`, the worker writes the lines that it is at into the
    file `last_words`, and ends."""
    from workshop import judge  # here, since only the worker needs torch

    sys.stdout = sys.stderr  # what a student prints stays apart from the verdicts
    sender.send(True)
    with open(last_words, "w") as file:
        faulthandler.enable(file)  # it writes the lines at a crash, too
        for name in names:
            faulthandler.dump_traceback_later(seconds, exit=True, file=file)
            verdict = judge.verdict(name, folder)
            faulthandler.cancel_dump_traceback_later()
            sender.send(verdict)


def _start_worker(*arguments):
    """(process, connection) of a new worker. UserError if it does not start."""
    receiver, sender = SPAWN.Pipe(duplex=False)
    worker = SPAWN.Process(target=_work, args=(sender, *arguments), daemon=True)
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # which the worker inherits
    worker.start()
    signal.signal(signal.SIGINT, before)
    sender.close()  # now only the worker has it, so its end is noticed
    try:
        receiver.recv()
    except EOFError:
        raise UserError("the checker does not start; the message above says why") from None
    return worker, receiver


def verdicts(names, folder, seconds=LIMIT):
    """Yields (name, whether it is right, a sentence) for each exercise."""
    names = list(names)
    while names:
        with tempfile.TemporaryDirectory() as scratch:
            last_words = Path(scratch) / "last_words"
            worker, receiver = _start_worker(names, folder, seconds, last_words)
            try:
                while names:
                    verdict = receiver.recv()
                    yield names.pop(0), *verdict
            except EOFError:  # the student's code never ended, or it ended the worker
                worker.join()
                path = Path(folder) / f"{names[0]}.py"
                sentence = _why_it_ended(last_words.read_text(), path, seconds, worker.exitcode)
                yield names.pop(0), False, sentence
            finally:
                worker.kill()
                worker.join()


def _why_it_ended(last_words, path, seconds, exit_code):
    """Says why a worker ended while it checked a student's file."""
    as_written = str(path).encode("ascii", "backslashreplace").decode()  # by faulthandler
    number = re.search(f'File "{re.escape(as_written)}", line ([0-9]+)', last_words)
    where = ""
    if number:
        text = linecache.getline(str(path), int(number[1])).strip()
        where = f"in line {number[1]}, `{text}`"
    if last_words.startswith("Timeout"):
        return (f"your code does not end. After {seconds} seconds it is still "
                f"{where or 'running'}. Is there an endless loop?")
    if where:
        return f"your code crashes Python {where}"
    return (f"your code ends Python, with exit code {exit_code}, before there is a result. Does it "
            "call os._exit(), or take too much memory?")


# ------------------------------------------------------------------------------
# The command


def _known(name):
    """The name of an exercise. UserError if there is none of this name."""
    if name not in NAMES:
        raise UserError(f"there is no exercise {name!r}; choose from {', '.join(NAMES)}")
    return name


def _read_hint(words):
    """(name, how many hints) of the words after `hint`. UserError if they make no sense."""
    if not words or len(words) > 2 or (len(words) == 2 and not words[1].isdecimal()):
        raise UserError("give an exercise and a number: python workshop/check.py hint kl 2")
    name, number = _known(words[0]), int(words[1]) if len(words) == 2 else 1
    return name, min(max(1, number), len(HINTS[name]))


def run(words, folder, seconds):
    """Does what the words ask for. Returns 0, or 1 if a function is not right."""
    if words[:1] == ["hint"]:
        print("\n".join(_hint_lines(*_read_hint(words[1:]))))
        return 0
    if words[:1] == ["reset"]:
        if len(words) == 1:
            raise UserError("give the exercises: python workshop/check.py reset kl")
        for name in map(_known, words[1:]):
            print(reset(name, folder))
        return 0
    names = [_known(name) for name in words] or NAMES
    place_exercises(names, folder)
    all_right = True
    for name, is_right, sentence in verdicts(names, folder, seconds):
        print(f"{name:10} {sentence}", flush=True)
        all_right = all_right and is_right
    return 0 if all_right else 1


def main(words, folder=MINE, seconds=LIMIT):
    """Runs what the words ask for. Returns 0 if all is right, 1 if a function is not, 2 for
    what the user can correct, 130 after Ctrl-C."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # a console may lack a character
    try:
        return run(words, Path(folder), seconds)
    except (UserError, OSError) as error:
        print(f"check: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("check: stopped", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
