"""Tests of tools/chat.py: what is printed while an answer comes, the vote, the commands."""
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
from hypothesis import given
from hypothesis import strategies as st

import moe
import r1mini
import tasks
from engine import checkpoint, sampling
from tools import chat, cli

ROOT = pathlib.Path(r1mini.__file__).parent
CONFIG = dataclasses.replace(r1mini.PRESETS["micro"], vocab_size=tasks.VOCAB_SIZE)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The folder of a run, with untrained models. `safe` is a reward model."""
    path = tmp_path_factory.mktemp("run")
    for seed, name in enumerate(("zero", "distill", "student", "safe")):
        torch.manual_seed(seed)
        config = dataclasses.replace(CONFIG, n_outputs=1) if name == "safe" else CONFIG
        checkpoint.save(path / f"{name}.pt", moe.Transformer(config), preset="micro")
    return path


@pytest.fixture
def scripted(monkeypatch):
    """Replaces the sampler by a script: (the texts it will write, the arguments of each call)."""
    texts, calls = [], []

    def generate(model, prompts, limit, end, pad, temperature, top_p, seed, watch=None):
        calls.append({"model": model, "n": len(prompts), "temperature": temperature, "seed": seed})
        rows = [tasks.encode_response(text) for text in texts[:len(prompts)]]
        for token in rows[0] if watch else ():
            watch(torch.tensor([[token]]))
        tokens = sampling.pad_right(rows, tasks.PAD_ID)
        return sampling.Samples(tokens, tokens != tasks.PAD_ID, None, torch.ones(len(rows)).bool())
    monkeypatch.setattr(chat, "generate", generate)
    return texts, calls


def talk(folder, lines, monkeypatch, capsys):
    """Pipes lines into chat. Returns (exit code, printed lines)."""
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
    code = cli.main(["chat", str(folder / "zero.pt")])
    return code, capsys.readouterr().out.splitlines()


NO = ", not in the template"


@pytest.mark.parametrize("text, lines", [
    ("<think>12+3=15</think><answer>15</answer>", ["thinking: 12+3=15", "answer: 15   ({n})"]),
    ("<think>检查</think>答案就是<answer>15</answer>",
     ["thinking: 检查", "answer: 答案就是15   ({n})"]),
    ("<think></think><answer>15</answer>", ["answer: 15   ({n})"]),
    ("12+3=15", ["answer: 12+3=15   ({n}" + NO + ")"]),
    ("<think>12", ["thinking: 12", "answer:   ({n}" + NO + ")"]),
    ("<think>a\n\x1b[2J</think><answer>1</answer>",
     ["thinking: a\\n\\x1b[2J", "answer: 1   ({n})"]),
    ("", ["answer:   ({n}" + NO + ")"])])
def test_chat_prints_thinking_and_answer_on_two_lines(folder, scripted, capsys, text, lines):
    """chat prints the thinking and the answer on a line each, without tags and control characters,
    and counts the tokens. The lines are written by hand."""
    scripted[0].append(text)
    assert cli.main(["chat", str(folder / "zero.pt"), "--ask", "12+3?"]) == 0
    n = f"{len(tasks.encode_response(text))} tokens"
    assert capsys.readouterr().out.splitlines() == [line.format(n=n) for line in lines]


def test_chat_stream_prints_each_token_as_it_comes(capsys):
    """After each token, the printed text is the text decoded so far, but for half a character."""
    stream, shown = chat.Stream(), ""
    ids = tasks.encode_response("<think>1+2=3 ok</think><answer>3é</answer>")
    for i, token in enumerate(ids, 1):
        stream(torch.tensor([[token]]))
        shown += capsys.readouterr().out.replace("thinking: ", "").replace("\nanswer: ", "")
        expected = tasks.decode(ids[:i]).removesuffix("\ufffd")
        for tag in chat.PARTS:
            expected = expected.replace(tag, "")
        assert shown == expected
    assert shown == "1+2=3 ok3é"


@given(st.lists(st.integers(0, tasks.VOCAB_SIZE - 1), max_size=30))
def test_chat_stream_loses_no_text(ids):
    """For any token ids, the printed text is the decoded text without labels, line ends and tags,
    and holds no control character."""
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
    expected = chat._visible_text(tasks.decode(ids)).replace(" ", "")
    for tag in chat.PARTS:
        expected = expected.replace(tag, "")
    assert shown == expected


def test_chat_watch_receives_the_sampled_tokens(folder):
    """generate() passes each sampled token to `watch`: these tokens are those of the returned
    answer, and watching changes no answer."""
    model, _ = checkpoint.load(folder / "zero.pt")
    seen = []
    out = sampling.generate(model, [[5, 6, 7]], 20, 8, 0, seed=3, watch=seen.append)
    assert all(fed.shape == (1, 1) for fed in seen) and len(seen) > 1
    assert [int(fed) for fed in seen] == out.answers()[0]
    again = sampling.generate(model, [[5, 6, 7]], 20, 8, 0, seed=3)
    assert again.answers() == out.answers()


def test_chat_says_that_an_answer_was_cut_off(folder, capsys):
    """An untrained model writes no end within the 48 tokens of micro: chat says so, twice with the
    same answer."""
    shown = []
    for times in range(2):
        assert cli.main(["chat", str(folder / "zero.pt"), "--ask", "12+3?"]) == 0
        shown.append(capsys.readouterr().out)
    assert shown[0].endswith("(48 tokens, cut off)\n") and shown[0] == shown[1]


def test_chat_majority_vote_equals_hand_count(folder, scripted, monkeypatch, capsys):
    """chat counts equal answers, also those outside the template, and takes the first of a tie. The
    counts are made by hand."""
    scripted[0].extend(["<answer>7</answer>", "7", "<answer>5</answer>", "<answer>5</answer>",
                    "<answer>7</answer>", "7", "7"])
    n = sum(len(tasks.encode_response(text)) for text in scripted[0])
    code, lines = talk(folder, ["/samples 7", "2+5?"], monkeypatch, capsys)
    assert code == 0 and lines == [
        "7 answers per question", "   3 x (not in the template)", "   2 x 7", "   2 x 5",
        f"majority vote: 7   (2 of 7; {n} tokens)"]
    scripted[0][:] = ["7", "7"]
    code, lines = talk(folder, ["/samples 2", "2+5?"], monkeypatch, capsys)
    assert lines[1:] == ["   2 x (not in the template)", "majority vote: none"]


def test_chat_commands_reach_the_sampler(folder, scripted, monkeypatch, capsys):
    """/temperature and /samples reach the sampler, and a repeated question gets another seed."""
    scripted[0].extend(["<answer>1</answer>"] * 3)
    talk(folder, ["1?", "1?", "/temperature 0.25", "/samples 3", "1?"], monkeypatch, capsys)
    assert [(call["temperature"], call["n"]) for call in scripted[1]] == [
        (0.6, 1), (0.6, 1), (0.25, 3)]
    assert len({call["seed"] for call in scripted[1]}) == 3


@pytest.mark.parametrize("name, file", [("student", "distill.pt"), ("student_base", "student.pt"),
                                        ("distill", "distill.pt"), ("zero", "zero.pt")])
def test_chat_model_command_loads_the_named_checkpoint(folder, scripted, monkeypatch, capsys,
                                                       name, file):
    """/model NAME loads the weights of that stage's file in the same folder."""
    scripted[0].append("<answer>1</answer>")
    _, lines = talk(folder, [f"/model {name}", "1?"], monkeypatch, capsys)
    expected = checkpoint.load(folder / file)[0]
    assert torch.equal(scripted[1][0]["model"].head.weight, expected.head.weight)
    assert lines[0] == f"{folder / file}; here are zero, student_base, student"


@pytest.mark.parametrize("line, named", [
    ("/model nono", "nono.pt; here are zero"), ("/model safe", "reward model"),
    ("/temperature hot", "within 0..100, got hot"), ("/temperature -1", "0..100"),
    ("/temperature nan", "0..100"), ("/samples 0", "1..1000"), ("/samples 1.5", "whole number"),
    ("/frob", "/help"), ("1+" * 600, "tokens")])
def test_chat_continues_after_a_bad_line(folder, scripted, monkeypatch, capsys, line, named):
    """A bad line prints one line that names the mistake, and the model, temperature and number of
    samples stay as they were."""
    scripted[0].append("<answer>1</answer>")
    code, lines = talk(folder, [line, "", "  ", "1?"], monkeypatch, capsys)
    assert code == 0 and len(lines) == 2 and named in lines[0] and lines[1].startswith("answer: 1")
    assert scripted[1][0]["temperature"] == 0.6 and scripted[1][0]["n"] == 1
    assert torch.equal(scripted[1][0]["model"].head.weight,
                       checkpoint.load(folder / "zero.pt")[0].head.weight)


def test_chat_help_lists_every_command(folder, monkeypatch, capsys):
    """/help lists every command, and /quit ends the conversation before the next line."""
    code, lines = talk(folder, ["/help", "/quit", "/help"], monkeypatch, capsys)
    assert code == 0 and [line.split()[0] for line in lines[1:]] == list(chat.COMMANDS)


@pytest.mark.parametrize("question", ["", " \n"])
def test_chat_refuses_an_empty_question(folder, capsys, question):
    """An empty question is refused by one line and exit code 2."""
    assert cli.main(["chat", str(folder / "zero.pt"), "--ask", question]) == 2
    out, error = capsys.readouterr()
    assert out == "" and error.count("\n") == 1 and "empty" in error


@pytest.mark.parametrize("question", ["-5+3", "-(5+3)", "-1", "--5"])
def test_chat_asks_a_question_that_begins_with_a_dash(folder, monkeypatch, question):
    """-5+3 after --ask is a question. With "=" any text is. An option after --ask is none."""
    asked, checkpoint_file = [], str(folder / "zero.pt")
    monkeypatch.setattr(chat, "_ask", lambda _, question: asked.append(question))
    words = ["--ask", question] if question != "--5" else [f"--ask={question}"]
    assert cli.main(["chat", *words, checkpoint_file, "--threads", "1"]) == 0
    assert asked == [question]
    with pytest.raises(SystemExit):
        cli.main(["chat", checkpoint_file, "--ask", "--threads", "1"])


NO_TEXT = b"12+3 \xbc\xc6\xcb\xe3\n/model \xff\n"  # Chinese in GBK, which is no UTF-8


def in_shell(words, environment=(), stdin=NO_TEXT):
    """(exit code, output, error) of a shell command with r1mini.py's words at its end, as bytes."""
    run = subprocess.run(f"{sys.executable} {ROOT / 'r1mini.py'} {words}", shell=True, input=stdin,
                         capture_output=True, env=os.environ | dict(environment))
    assert b"Traceback" not in run.stderr, run.stderr.decode("utf-8", "replace")
    return run.returncode, run.stdout, run.stderr


@pytest.mark.parametrize("environment", [
    {"PYTHONUTF8": "1", "PYTHONIOENCODING": "utf-8:strict"}, {"PYTHONIOENCODING": "ascii"},
    {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}])
def test_chat_reads_bytes_that_are_no_text(folder, environment):
    """Bytes that are not in the terminal's encoding are asked as replacement characters: chat
    answers, and goes on with the next line."""
    code, out, error = in_shell(f"chat {folder / 'zero.pt'}", environment)
    assert code == 0 and b"answer" in out and b".pt; here are zero" in out and error == b""


def test_chat_needs_standard_input(folder):
    """With standard input closed, chat ends with exit code 2 and one line."""
    code, _, error = in_shell(f"chat {folder / 'zero.pt'} <&-")
    assert code == 2 and error.count(b"\n") == 1 and b"give --ask" in error


@pytest.mark.parametrize("redirected", [">&-", "2>&-", ">&- 2>&-"])
def test_chat_answers_without_output(folder, redirected):
    """With standard output or error closed, a question is answered to nowhere, without an error."""
    code, _, error = in_shell(f"chat {folder / 'zero.pt'} --ask 12+3 {redirected}")
    assert code == 0 and error == b""


@pytest.mark.parametrize("terminal, no_color, coloured", [
    (True, "", True), (True, "1", False), (False, "", False)])
def test_chat_dims_thinking_on_a_terminal_only(folder, scripted, monkeypatch, terminal, no_color,
                                               coloured):
    """chat dims the thinking, and not the answer, on a terminal, but not where NO_COLOR is set, and
    never in a pipe."""
    scripted[0].append("<think>1+2=3</think><answer>3</answer>")
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


def test_chat_ctrl_c_stops_the_answer_then_the_conversation(folder, scripted, monkeypatch, capsys):
    """Ctrl-C during an answer stops that answer. At the prompt it ends the conversation with exit
    code 0."""
    generate, lines = chat.generate, iter(["1?", "2?", KeyboardInterrupt])

    def stop(*args):
        monkeypatch.setattr(chat, "generate", generate)
        raise KeyboardInterrupt

    def line(prompt):
        found = next(lines)
        if found is KeyboardInterrupt:
            raise found
        return found
    scripted[0].append("<answer>1</answer>")
    monkeypatch.setattr(chat, "generate", stop)
    monkeypatch.setattr("builtins.input", line)
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    assert cli.main(["chat", str(folder / "zero.pt")]) == 0
    stopped, answered = capsys.readouterr().out.splitlines()
    assert "(stopped)" in stopped and answered.startswith("answer: 1")


def test_chat_survives_a_closed_pipe(folder):
    """When the reader closes the pipe, chat ends with exit code 0 and prints no traceback."""
    with subprocess.Popen([sys.executable, str(ROOT / "r1mini.py"), "chat",
                           str(folder / "zero.pt"), "--ask", "12+3"], stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE, text=True) as run:
        run.stdout.close()
        assert run.stderr.read() == "" and run.wait(timeout=60) == 0


@pytest.mark.skipif(sys.platform == "win32", reason="no pseudo-terminals")
def test_chat_arrow_up_recalls_the_last_line(folder):
    """In a pseudo-terminal, chat shows its help and a prompt that names the model, arrow up recalls
    the last line, and Ctrl-D ends."""
    import pty
    ours, theirs = pty.openpty()
    run = subprocess.Popen([sys.executable, str(ROOT / "r1mini.py"), "chat",
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


def test_chat_drafts_do_not_change_a_greedy_answer(folder, monkeypatch, capsys):
    """At temperature 0 the answer with drafts equals the answer without them, and chat prints the
    share of accepted drafts."""
    lines = ["/temperature 0", "Compute 1+2+3", "/drafts", "Compute 1+2+3"]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines)))
    assert cli.main(["chat", str(folder / "zero.pt")]) == 0
    out = capsys.readouterr().out
    answers = re.findall(r"(?m)^((?:thinking|answer):(?:.|\n)*?)  \((\d+ tokens)(.*)\)$", out)
    assert len(answers) == 2 and answers[0][:2] == answers[1][:2]
    assert "of the drafts accepted" in answers[1][2] and "drafts" not in answers[0][2]


def test_chat_refuses_a_question_too_long_for_drafts(folder, monkeypatch, capsys):
    """A question that fits without drafts is refused with drafts, and the line says that /drafts
    turns them off."""
    question = "Compute 1" + "+1" * 215  # 434 tokens: 512 - 434 hold 48, not 96
    for lines, fits in (([question], True), (["/drafts", question], False)):
        _, out = talk(folder, lines, monkeypatch, capsys)
        assert ("/drafts turns them off" in out[-1]) != fits


def test_chat_drafts_need_an_mtp_layer(tmp_path, monkeypatch, capsys):
    """For a model without MTP, /drafts and a question print one line, and the conversation
    continues."""
    model = moe.Transformer(dataclasses.replace(CONFIG, n_mtp_layers=0))
    checkpoint.save(tmp_path / "zero.pt", model, preset="micro")
    code, out = talk(tmp_path, ["/drafts", "Compute 1+2", "/drafts"], monkeypatch, capsys)
    assert out == ["drafts on", "no drafts: this model has no MTP layer", "drafts off"]
    assert code == 0
