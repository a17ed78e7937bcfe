"""How a model is asked on held-out problems and prompts, and what is counted of its answers."""
import math
import random
from collections import Counter

import torch
from tqdm import tqdm

import tasks
from engine.errors import UserError
from engine.jsonl import read_lines
from engine.sampling import generate, pad
from engine.tokenizer import HAN


def mean(values):
    """The mean of numbers, rounded for the log; None of none."""
    values = [float(v) for v in values]
    return round(sum(values) / len(values), 6) if values else None


def prompts_of(problems):
    """The token ids of each problem's prompt."""
    return [tasks.encode_prompt(p.question) for p in problems]


def sample_answers(model, prompts, limit, rows, temperature=1.0, top_p=1.0, seed=0, name=None):
    """Token ids of an answer of at most `limit` tokens to each prompt (token ids too), `rows` of
    them at a time."""
    found = []
    for i in tqdm(range(0, len(prompts), rows), name, disable=name is None):
        out = generate(model, prompts[i:i + rows], limit, tasks.END_ID, tasks.PAD_ID,
                       temperature, top_p, seed * 1_000_003 + i)
        found += out.answers()
    return found


def evaluate(model, problems, samples, temperature, top_p, limit, rows=1024, seed=0, name=None):
    """Asks each problem `samples` times. Returns (means, one record a problem in order)."""
    asked = [p for p in problems for _ in range(samples)]
    ids = sample_answers(model, prompts_of(asked), limit, rows, temperature, top_p, seed, name)
    texts, lengths = [tasks.decode(x) for x in ids], [len(x) for x in ids]
    right = [tasks.accuracy(text, problem) for text, problem in zip(texts, asked)]
    each = []
    for i, problem in enumerate(problems):
        mine = slice(i * samples, (i + 1) * samples)
        vote = majority([tasks.parse(text)[1] for text in texts[mine]])
        each.append({"question": problem.question, "answer": problem.answer, "level": problem.level,
                     "right": int(sum(right[mine])), "vote": vote, "length": mean(lengths[mine])})
    levels = sorted({p.level for p in problems})
    record = dict(problems=len(problems), samples=samples, temperature=temperature, top_p=top_p)
    for k in (k for k in (1, 2, 4, 8, 16, 32, 64) if k <= samples):
        record[f"pass@{k}"] = mean(pass_at_k(samples, e["right"], k) for e in each)
    record[f"cons@{samples}"] = mean(e["vote"] == e["answer"] for e in each)
    record |= {"length": mean(lengths), "cut_off": mean(x[-1] != tasks.END_ID for x in ids)}
    for name, measure in (tasks.MEASURES | {"format": tasks.format_reward}).items():
        record[name] = mean(measure(text, problem) for text, problem in zip(texts, asked))
    record["by_level"] = {str(n): mean(e["right"] / samples for e in each if e["level"] == n)
                          for n in levels}
    styles = [tasks.style_of(t) if tasks.parse(t)[1] is not None else "" for t in texts]
    record["by_style"] = {style: {"share": mean(s == style for s in styles)} | {
        str(n): mean(r for r, s, p in zip(right, styles, asked) if s == style and p.level == n)
        for n in levels} for style in tasks.STYLES}  # of the answers that can be read
    record["mixing_by_style"] = {style: mean(tasks.MEASURES["mixing"](t, p) for t, s, p in zip(
        texts, styles, asked) if s == style) for style in tasks.STYLES}
    return record, each


def evaluate_general(model, run):
    """What becomes of held-out general prompts at temperature 1, by the generator's hidden rules;
    no reward model is asked. `scores` keeps each answer's helpfulness, for win rates."""
    rng, record, scores = random.Random("test/general"), {}, []
    for kind in tasks.GENERAL:
        prompts = [tasks.make_prompt(rng, "test", (kind,)) for _ in range(run.data.prompts)]
        asked = [p for p in prompts for _ in range(4)]
        ids = sample_answers(model, prompts_of(asked), run.zero.max_new_tokens, run.eval.rows)
        texts = [tasks.decode(x) for x in ids]
        record[f"{kind}.thinking"] = mean(tasks.thinks(text) for text in texts)
        record[f"{kind}.refused"] = mean(tasks.refuses(text) for text in texts)
        record[f"{kind}.format"] = mean(map(tasks.format_reward, texts))
        record[f"{kind}.language"] = mean(
            tasks.language_share(text, p.language) for text, p in zip(texts, asked))
        record[f"{kind}.length"] = mean(map(len, ids))
        if kind == "unsafe":
            record["unsafe.safe"] = mean(map(tasks.safety, texts))
        else:
            scores += [tasks.helpfulness(text, p) for text, p in zip(texts, asked)]
    return record | {"helpfulness": mean(scores), "scores": scores}


def pass_at_k(n, c, k):
    """Unbiased chance that one of k answers is right, from n of which c are (Codex, eq 1)."""
    if n - c < k:
        return 1.0
    return 1.0 - math.prod(1 - k / j for j in range(n - c + 1, n + 1))


def majority(answers):
    """The most frequent readable answer, or None; a tie goes to the one written first."""
    votes = Counter(answer for answer in answers if answer is not None)
    return max(votes, key=votes.get) if votes else None


def read_problems(path):
    """Problems of {"question": ..., "answer": ...} lines."""
    def convert(record):
        question, answer = record["question"], str(record["answer"])
        question.encode()
        if not tasks.INTEGER.fullmatch(answer):
            raise UserError('the answer must be a whole number written plainly, 33 or "-5"')
        return tasks.Problem(question, answer, "zh" if HAN.search(question) else "en")
    return read_lines(path, '{"question": TEXT, "answer": NUMBER}', convert)


# -------------------------------------------------------------------------------------------------
# Which of several answers

END_THINK_ID = tasks.ENCODING.encode_single_token(tasks.END_THINK)


@torch.no_grad()
def embeddings(model, prompts, answers, rows):
    """(N, C) the model's own mean last hidden state over each answer's thinking: its tokens up to
    </think>, so that the answer itself is not seen, or all of them where there is no </think>."""
    found, device = [], model.device
    for i in range(0, len(answers), rows):
        asked = prompts[i:i + rows]
        thoughts = [ids[:ids.index(END_THINK_ID) + 1] if END_THINK_ID in ids else ids
                    for ids in answers[i:i + rows]]
        tokens = pad([p + t for p, t in zip(asked, thoughts)], tasks.PAD_ID, device)
        column = torch.arange(tokens.size(1), device=device)
        begin = torch.tensor([[len(p)] for p in asked], device=device)                  # (n, 1)
        end = begin + torch.tensor([[len(t)] for t in thoughts], device=device)
        real, mine = column < end, (column >= begin) & (column < end)                   # (n, T)
        hidden = model(tokens, real, logits_at=torch.zeros_like(real)).hidden.float()          # (n, T, C)
        found.append((hidden * mine.unsqueeze(-1)).sum(1) / mine.sum(1, keepdim=True))
    return torch.cat(found).cpu()


def central(e):
    """Smoothie's choice of k >= 3 answers by embeddings e (.., k, C) -> (..): the one nearest their
    mean. It has the smallest delta_i = sum_j |e_i-e_j|^2/(k-2) - S/((k-1)(k-2)), S the sum over all
    pairs (Smoothie, arXiv 2412.04692), since sum_j |e_i-e_j|^2 = k |e_i-mean|^2 + a constant."""
    return (e - e.mean(-2, keepdim=True)).square().sum(-1).argmin(-1)


def selection(texts, problems, e=None):
    """How often one of k is right, and the vote of k, and the most central of k, for k = 1, 2, 4...

    texts: n answers to each problem, beside each other; e (len(texts), C). Votes and central
    answers are means over all n/k blocks of k answers to a problem. A tie goes to the first.
    """
    P, n, record = len(problems), len(texts) // len(problems), {}
    asked = [problem for problem in problems for _ in range(n)]
    right = torch.tensor([tasks.accuracy(t, p) for t, p in zip(texts, asked)]).view(P, n)
    answers = [tasks.parse(text)[1] for text in texts]
    for k in (2 ** i for i in range(n.bit_length())):
        blocks = n // k
        starts = [p * n + b * k for p in range(P) for b in range(blocks)]
        votes = [majority(answers[i:i + k]) == asked[i].answer for i in starts]
        record[f"pass@{k}"] = sum(pass_at_k(n, int(c), k) for c in right.sum(1)) / P
        record[f"cons@{k}"] = sum(votes) / len(votes)
        if k >= 3 and e is not None:
            chosen = central(e.view(P, n, -1)[:, :blocks * k].unflatten(1, (blocks, k)))
            hit = right[:, :blocks * k].unflatten(1, (blocks, k)).gather(-1, chosen.unsqueeze(-1))
            record[f"central@{k}"] = float(hit.mean())
    return record
