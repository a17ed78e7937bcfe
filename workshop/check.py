"""Checks the functions that you wrote in workshop/exercises/, and explains mistakes.

    python workshop/check.py               checks all of them
    python workshop/check.py advantage     checks this one

Your code runs in a separate process. If your code never ends, or if it ends Python,
the checker goes on: it starts a new process for the next exercise. judge.py has the
right functions and the usual mistakes.
"""
import faulthandler
import linecache
import multiprocessing
import re
import signal
import sys
import tempfile
from pathlib import Path

WORKSHOP = Path(__file__).resolve().parent
sys.path.insert(0, str(WORKSHOP.parent))
from engine.errors import UserError

NAMES = ("advantage", "kl", "router", "absorbed", "reward")
LIMIT = 10  # seconds for one exercise. A right function needs less than one.
SPAWN = multiprocessing.get_context("spawn")  # the same on Linux, macOS and Windows


def work(sender, names, folder, seconds, last_words):
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


def start_worker(*arguments):
    """(process, connection) of a new worker. UserError if it does not start."""
    receiver, sender = SPAWN.Pipe(duplex=False)
    worker = SPAWN.Process(target=work, args=(sender, *arguments), daemon=True)
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # which the worker inherits
    worker.start()
    signal.signal(signal.SIGINT, before)
    sender.close()  # now only the worker has it, so its end is noticed
    try:
        receiver.recv()
    except EOFError:
        raise UserError("the checker does not start; the message above says why") from None
    return worker, receiver


def verdicts(names, folder, seconds):
    """Yields (name, whether it is right, a sentence) for each exercise."""
    names = list(names)
    while names:
        with tempfile.TemporaryDirectory() as scratch:
            last_words = Path(scratch) / "last_words"
            worker, receiver = start_worker(names, folder, seconds, last_words)
            try:
                while names:
                    verdict = receiver.recv()
                    yield names.pop(0), *verdict
            except EOFError:  # the student's code never ended, or it ended the worker
                worker.join()
                path = Path(folder) / f"{names[0]}.py"
                sentence = why_it_ended(last_words.read_text(), path, seconds, worker.exitcode)
                yield names.pop(0), False, sentence
            finally:
                worker.kill()
                worker.join()


def why_it_ended(last_words, path, seconds, exit_code):
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


def main(words, folder=WORKSHOP / "exercises", seconds=LIMIT):
    """Checks the named exercises, or all. Returns 0 if all are right, 1 if one is not,
    2 for what the user can correct, 130 after Ctrl-C."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # a console may lack a character
    unknown = [name for name in words if name not in NAMES]
    if unknown:
        print(f"check: there is no exercise {unknown[0]!r}; choose from {', '.join(NAMES)}",
              file=sys.stderr)
        return 2
    all_right = True
    try:
        for name, is_right, sentence in verdicts(words or NAMES, folder, seconds):
            print(f"{name:10} {sentence}", flush=True)
            all_right = all_right and is_right
    except UserError as error:
        print(f"check: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("check: stopped", file=sys.stderr)
        return 130
    return 0 if all_right else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
