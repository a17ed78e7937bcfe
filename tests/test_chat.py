"""The tests of chat: what is printed while an answer comes, the vote, the commands, its ends."""
import dataclasses
import io
import os
import pathlib
import re
import select
import subprocess
import sys

import pytest
import torch
from hypothesis import given, strategies as st

import grpo
import moe
import r1mini
import tasks
from engine import checkpoint, sampling
from tools import chat, cli

HERE = pathlib.Path(r1mini.__file__).parent
CONFIG = dataclasses.replace(r1mini.PRESETS["micro"], vocab_size=tasks.VOCAB_SIZE)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run's folder of untrained models, one of them a reward model."""
    folder = tmp_path_factory.mktemp("run")
    for seed, name in enumerate(("zero", "distill", "student", "safe")):
        torch.manual_seed(seed)
        config = dataclasses.replace(CONFIG, n_outputs=1) if name == "safe" else CONFIG
        checkpoint.save(folder / f"{name}.pt", moe.Transformer(config), preset="micro")
    return folder


@pytest.fixture
def said(monkeypatch):
    """What the model is made to say: (list of texts, list of how it was asked)."""
    texts, asked = [], []

    def generate(model, prompts, limit, end, pad, temperature, top_p, seed, watch=None):
        asked.append({"model": model, "n": len(prompts), "temperature": temperature, "seed": seed})
        rows = [tasks.encode_response(text) for text in texts[:len(prompts)]]
        for token in rows[0] if watch else ():
            watch(torch.tensor([[token]]))
        tokens = sampling.pad(rows, tasks.PAD_ID)
        return sampling.Samples(tokens, tokens != tasks.PAD_ID, None, torch.ones(len(rows)).bool())
    monkeypatch.setattr(grpo, "generate", generate)
    return texts, asked


def talk(folder, lines, monkeypatch, capsys):
    """(exit code, what is printed) of lines through a pipe."""
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
    code = cli.main(["chat", str(folder / "zero.pt")])
    return code, capsys.readouterr().out.splitlines()


NO = ", not in the template"


@pytest.mark.parametrize("text, lines", [
    ("<think>12+3=15</think><answer>15</answer>", ["thinking: 12+3=15", "answer: 15   ({n})"]),
    ("<think>检查</think>答案就是<answer>15</answer>", ["thinking: 检查", "answer: 答案就是15   ({n})"]),
    ("<think></think><answer>15</answer>", ["answer: 15   ({n})"]),
    ("12+3=15", ["answer: 12+3=15   ({n}" + NO + ")"]),
    ("<think>12", ["thinking: 12", "answer:   ({n}" + NO + ")"]),
    ("<think>a\n\x1b[2J</think><answer>1</answer>",
     ["thinking: a\\n\\x1b[2J", "answer: 1   ({n})"]),
    ("", ["answer:   ({n}" + NO + ")"])])
def test_the_thinking_is_apart_from_the_answer(folder, said, capsys, text, lines):
    """By hand: each on a line of its own, no tags, no control characters, and the tokens."""
    said[0].append(text)
    assert cli.main(["chat", str(folder / "zero.pt"), "--ask", "12+3?"]) == 0
    n = f"{len(tasks.encode_response(text))} tokens"
    assert capsys.readouterr().out.splitlines() == [line.format(n=n) for line in lines]


def test_an_answer_is_printed_as_it_comes(capsys):
    """After each token all of the text so far is there, but of half a character nothing."""
    stream, shown = chat.Stream(), ""
    ids = tasks.encode_response("<think>1+2=3 ok</think><answer>3é</answer>")
    for i, token in enumerate(ids, 1):
        stream(torch.tensor([[token]]))
        shown += capsys.readouterr().out.replace("thinking: ", "").replace("\nanswer: ", "")
        want = tasks.decode(ids[:i]).removesuffix("\ufffd")
        for tag in chat.PARTS:
            want = want.replace(tag, "")
        assert shown == want
    assert shown == "1+2=3 ok3é"


@given(st.lists(st.integers(0, tasks.VOCAB_SIZE - 1), max_size=30))
def test_nothing_is_lost_on_the_way(ids):
    """Of any tokens: what is printed is the text, without labels, line ends and tags; and it is
    fit for a terminal."""
    ids = ids[:ids.index(tasks.END_ID)] if tasks.END_ID in ids else ids
    out, stream = io.StringIO(), chat.Stream()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdout", out)
        for token in ids:
            stream(torch.tensor([[token]]))
        stream.end("end")
    shown = out.getvalue()
    assert not set(shown) & {chr(i) for i in (*range(10), *range(11, 32), *range(127, 160))}
    for word in ("thinking: ", "answer: ", "answer:", "(end)", "\n", " ", *chat.PARTS):
        shown = shown.replace(word, "")
    want = chat.visible(tasks.decode(ids)).replace(" ", "")
    for tag in chat.PARTS:
        want = want.replace(tag, "")
    assert shown == want


def test_who_watches_sees_what_is_sampled(folder):
    """The tokens shown to watch one by one are those of the answer returned."""
    model, _ = checkpoint.load(folder / "zero.pt")
    seen = []
    out = sampling.generate(model, [[5, 6, 7]], 20, 8, 0, seed=3, watch=lambda fed: seen.append(fed))
    assert all(fed.shape == (1, 1) for fed in seen) and len(seen) > 1
    assert [int(fed) for fed in seen] == out.answers()[0]
    again = sampling.generate(model, [[5, 6, 7]], 20, 8, 0, seed=3)
    assert again.answers() == out.answers()


def test_a_real_model_is_cut_off_and_says_so(folder, capsys):
    """An untrained model finds no end within micro's 48 tokens."""
    for times in range(2):
        assert cli.main(["chat", str(folder / "zero.pt"), "--ask", "12+3?"]) == 0
    one, two = capsys.readouterr().out.splitlines()
    assert one.endswith("(48 tokens, cut off)") and one == two


def test_the_vote_by_hand(folder, said, monkeypatch, capsys):
    """Each answer with its number, the template's misses too; of a tie the first."""
    said[0].extend(["<answer>7</answer>", "7", "<answer>5</answer>", "<answer>5</answer>",
                    "<answer>7</answer>", "7", "7"])
    n = sum(len(tasks.encode_response(text)) for text in said[0])
    code, lines = talk(folder, ["/samples 7", "2+5?"], monkeypatch, capsys)
    assert code == 0 and lines == [
        "7 answers to a question", "   3 x (not in the template)", "   2 x 7", "   2 x 5",
        f"vote: 7   (2 of 7; {n} tokens)"]
    said[0][:] = ["7", "7"]
    code, lines = talk(folder, ["/samples 2", "2+5?"], monkeypatch, capsys)
    assert lines[1:] == ["   2 x (not in the template)", "vote: none "]


def test_commands_change_how_the_model_is_asked(folder, said, monkeypatch, capsys):
    """/temperature and /samples reach the sampler; asked again, the seed is another."""
    said[0].extend(["<answer>1</answer>"] * 3)
    talk(folder, ["1?", "1?", "/temperature 0.25", "/samples 3", "1?"], monkeypatch, capsys)
    assert [(a["temperature"], a["n"]) for a in said[1]] == [(0.6, 1), (0.6, 1), (0.25, 3)]
    assert len({a["seed"] for a in said[1]}) == 3


@pytest.mark.parametrize("name, file", [("student", "distill.pt"), ("student_base", "student.pt"),
                                        ("distill", "distill.pt"), ("zero", "zero.pt")])
def test_another_model_answers(folder, said, monkeypatch, capsys, name, file):
    """/model NAME talks to its checkpoint in the same folder."""
    said[0].append("<answer>1</answer>")
    _, lines = talk(folder, [f"/model {name}", "1?"], monkeypatch, capsys)
    want = checkpoint.load(folder / file)[0]
    assert torch.equal(said[1][0]["model"].head.weight, want.head.weight)
    assert lines[0] == f"{folder / file}; here are zero, student_base, student"


@pytest.mark.parametrize("line, named", [
    ("/model nono", "nono.pt; here are zero"), ("/model safe", "reward model"),
    ("/temperature hot", "within 0..100, got hot"), ("/temperature -1", "0..100"),
    ("/temperature nan", "0..100"), ("/samples 0", "1..1000"), ("/samples 1.5", "whole number"),
    ("/frob", "/help"), ("1+" * 600, "tokens")])
def test_a_bad_line_is_told_and_the_talk_goes_on(folder, said, monkeypatch, capsys, line, named):
    """One line that names the trouble; the model, and all else, is as it was."""
    said[0].append("<answer>1</answer>")
    code, lines = talk(folder, [line, "", "  ", "1?"], monkeypatch, capsys)
    assert code == 0 and len(lines) == 2 and named in lines[0] and lines[1].startswith("answer: 1")
    assert said[1][0]["temperature"] == 0.6 and said[1][0]["n"] == 1
    assert torch.equal(said[1][0]["model"].head.weight,
                       checkpoint.load(folder / "zero.pt")[0].head.weight)


def test_help_tells_each_command(folder, monkeypatch, capsys):
    """And /quit ends before what follows."""
    code, lines = talk(folder, ["/help", "/quit", "/help"], monkeypatch, capsys)
    assert code == 0 and [line.split()[0] for line in lines[1:]] == list(chat.COMMANDS)


@pytest.mark.parametrize("question", ["", " \n"])
def test_an_empty_question_is_one_clear_line(folder, capsys, question):
    """Exit code 2."""
    assert cli.main(["chat", str(folder / "zero.pt"), "--ask", question]) == 2
    out, error = capsys.readouterr()
    assert out == "" and error.count("\n") == 1 and "empty" in error


@pytest.mark.parametrize("terminal, no_color, coloured", [
    (True, "", True), (True, "1", False), (False, "", False)])
def test_colours_on_a_terminal_only(folder, said, monkeypatch, terminal, no_color, coloured):
    """The thinking is dim there, the answer is not; and not where NO_COLOR is set."""
    said[0].append("<think>1+2=3</think><answer>3</answer>")
    out = io.StringIO()
    out.isatty = lambda: terminal
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setenv("NO_COLOR", no_color)
    assert cli.main(["chat", str(folder / "zero.pt"), "--ask", "1+2?"]) == 0
    shown = out.getvalue()
    if coloured:
        before, _, after = shown.partition("\nanswer: 3")
        assert before.startswith("\033[2mthinking: 1\033[0m") and after.startswith(" \033[2m  (")
    else:
        assert "\033" not in shown


def test_ctrl_c_stops_an_answer_and_then_the_talk(folder, said, monkeypatch, capsys):
    """An answer that is interrupted ends; at the prompt, all does, with exit code 0."""
    generate, lines = sampling.generate, iter(["1?", "2?", KeyboardInterrupt])

    def stop(*args):
        monkeypatch.setattr(grpo, "generate", generate)
        raise KeyboardInterrupt

    def line(prompt):
        found = next(lines)
        if found is KeyboardInterrupt:
            raise found
        return found
    said[0].append("<answer>1</answer>")
    monkeypatch.setattr(grpo, "generate", stop)
    monkeypatch.setattr("builtins.input", line)
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    assert cli.main(["chat", str(folder / "zero.pt")]) == 0
    stopped, answered = capsys.readouterr().out.splitlines()
    assert "(stopped)" in stopped and answered.startswith("answer: 1")


def test_a_reader_who_has_had_enough_ends_it(folder):
    """A pipe closed at its other end: no traceback, exit code 0."""
    with subprocess.Popen([sys.executable, str(HERE / "r1mini.py"), "chat",
                           str(folder / "zero.pt"), "--ask", "12+3"], stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE, text=True) as run:
        run.stdout.close()
        assert run.stderr.read() == "" and run.wait(timeout=60) == 0


@pytest.mark.skipif(sys.platform == "win32", reason="no pseudo-terminals")
def test_the_arrow_up_brings_the_last_line_back(folder):
    """In a terminal: the help, a prompt that names the model, history, and Ctrl-D ends."""
    import pty
    ours, theirs = pty.openpty()
    run = subprocess.Popen([sys.executable, str(HERE / "r1mini.py"), "chat",
                            str(folder / "zero.pt")], stdin=theirs, stdout=theirs, stderr=theirs,
                           env=os.environ | {"TERM": "xterm"})
    shown = ""

    def until(word):
        nonlocal shown
        while word not in shown:
            assert select.select([ours], [], [], 60)[0], shown
            shown += os.read(ours, 4096).decode()
        shown = shown.partition(word)[2]
    try:
        until("/samples N")
        for typed in (b"/samples 7\r", b"\x1b[A\r"):
            until("zero> ")
            os.write(ours, typed)
            until("7 answers")
        until("zero> ")
        os.write(ours, b"\x04")
        assert run.wait(timeout=60) == 0
    finally:
        run.kill()
        os.close(theirs)
        os.close(ours)


def test_drafts_answer_as_the_model_does(folder, monkeypatch, capsys):
    """At temperature 0 the same answer, and the share of drafts that were taken."""
    lines = ["/temperature 0", "Compute 1+2+3", "/drafts", "Compute 1+2+3"]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines)))
    assert cli.main(["chat", str(folder / "zero.pt")]) == 0
    out = capsys.readouterr().out
    whole = re.findall(r"(?m)^((?:thinking|answer):(?:.|\n)*?)  \((\d+ tokens)(.*)\)$", out)
    assert len(whole) == 2 and whole[0][:2] == whole[1][:2]
    assert "of the drafts taken" in whole[1][2] and "drafts" not in whole[0][2]


def test_drafts_want_more_room(folder, monkeypatch, capsys):
    """What fits without them is refused with them, and the line says how to go on."""
    question = "Compute 1" + "+1" * 215  # 434 tokens: 512 - 434 hold 48, not 96
    for lines, fits in (([question], True), (["/drafts", question], False)):
        _, out = talk(folder, lines, monkeypatch, capsys)
        assert ("/drafts turns them off" in out[-1]) != fits


def test_no_drafts_without_mtp(tmp_path, monkeypatch, capsys):
    """One line, and the conversation goes on."""
    model = moe.Transformer(dataclasses.replace(CONFIG, n_mtp_layers=0))
    checkpoint.save(tmp_path / "zero.pt", model, preset="micro")
    code, out = talk(tmp_path, ["/drafts", "Compute 1+2", "/drafts"], monkeypatch, capsys)
    assert out == ["drafts on", "no drafts: this model has no MTP layer", "drafts off"]
    assert code == 0
