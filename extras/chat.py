"""chat: a terminal conversation with a checkpoint; the thinking is shown apart from the answer."""
import sys

import grpo
import r1mini
import tasks
from extras.options import load_writer, resolve


def reply(model, question, settings):
    """(thinking or None, answer, number of tokens) of one sampled response to a question."""
    question = question.encode("utf-8", "replace").decode()  # a pipe may bring anything
    ids, limit = tasks.encode_prompt(question), settings.zero.max_new_tokens
    if len(ids) + limit > model.config.max_seq_len:
        raise r1mini.UserError(f"the question has {len(ids)} tokens; there is room for "
                               f"{model.config.max_seq_len - limit} beside an answer")
    s = settings.eval
    out = grpo.generate(model, [ids], limit, tasks.END_ID, tasks.PAD_ID, s.temperature, s.top_p,
                       seed=int.from_bytes(question.encode()[-7:], "big"))
    text = tasks.decode(out.answers()[0])
    thinking, answer = tasks.parse(text)
    return thinking, text if answer is None else answer, int(out.answer.sum())


def show(model, question, settings):
    """Prints one reply: the thinking dim on a terminal, then the answer."""
    thinking, answer, n = reply(model, question, settings)
    dim, plain = ("\033[2m", "\033[0m") if sys.stdout.isatty() else ("", "")
    if thinking:
        print(f"{dim}thinking: {thinking}{plain}")
    print(f"answer: {answer}   {dim}({n} tokens){plain}", flush=True)


def main(options):
    """Answers --ask TEXT, or line after line until the input ends."""
    model, record = load_writer(options)
    settings = resolve(record.get("preset", "nano"), options.set)
    if options.ask is not None:
        show(model, options.ask, settings)
        return 0
    print("Ask, for example: Compute 25-7+9+6   (or 计算25-7+9+6; Ctrl-D ends)")
    while True:
        try:
            question = input("> ")
        except EOFError:
            print()
            return 0
        try:
            if question.strip():
                show(model, question, settings)
        except r1mini.UserError as error:
            print(error)
