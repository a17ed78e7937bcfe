"""How a model is tested on held-out problems and prompts, and what is counted of its answers."""
import hashlib
import math
import random
from collections import Counter
from statistics import fmean, stdev

import torch
from tqdm import tqdm

import tasks
from engine.errors import UserError
from engine.jsonl import read_lines
from engine.sampling import generate, pad_right, reading_passes
from engine.tokenizer import HAN


def mean(values):
    """The mean of numbers, rounded for the log; None if there are none."""
    values = [float(value) for value in values]
    return _rounded(sum(values) / len(values)) if values else None


def _rounded(value):
    """A number as the log has it; None for nan, which JSON does not know."""
    return None if math.isnan(value) else round(value, 6)


def _items_and_error(items, scores):
    """(the number of different items, the standard error of the mean score over them). items and
    scores: one of each for every answer.

    The error is the standard deviation over items of an item's mean score, divided by the square
    root of the number of items; None for one item.
    """
    scores_of_item = {}
    for item, score in zip(items, scores):
        scores_of_item.setdefault(item, []).append(float(score))
    means = [fmean(scores_of_one) for scores_of_one in scores_of_item.values()]
    n = len(means)
    return n, _rounded(stdev(means) / math.sqrt(n)) if n > 1 else None


def prompts_of(problems):
    """The token ids of each problem's prompt."""
    return [tasks.encode_prompt(problem.question) for problem in problems]


def repeat_for_answers(items, times):
    """[a, a, b, b, ...]: each item `times` times."""
    return [item for item in items for _ in range(times)]


def answer_seeds(problems, samples):
    """A seed for each of `samples` answers to each problem. It depends only on the question and
    on the number of the answer. So the order of the problems in a file changes no result."""
    seeds = []
    for problem in problems:
        for i in range(samples):
            digest = hashlib.sha256(f"{i} {problem.question}".encode()).digest()
            seeds.append(int.from_bytes(digest[:7], "big"))
    return seeds


def sample_answers(model, prompts, limit, rows, temperature=1.0, top_p=1.0, seed=0, name=None):
    """The token ids of an answer of at most `limit` tokens to each prompt. `rows` prompts are
    answered at a time. seed: a number, or a list with one for each prompt. name: of a progress
    bar."""
    answers = []
    for i in tqdm(range(0, len(prompts), rows), name, disable=name is None):
        seed_of_rows = seed * 1_000_003 + i if isinstance(seed, int) else seed[i:i + rows]
        samples = generate(model, prompts[i:i + rows], limit, tasks.END_ID, tasks.PAD_ID,
                           temperature, top_p, seed_of_rows)
        answers += samples.answers()
    return answers


def evaluate(model, problems, samples, temperature, top_p, limit, rows=1024, seed=0, name=None):
    """Asks each problem `samples` times. Returns (means over all answers, a record for each
    problem). seed: a number, or a list with one for each answer."""
    problem_of_answer = repeat_for_answers(problems, samples)
    ids = sample_answers(model, prompts_of(problem_of_answer), limit, rows, temperature, top_p,
                         seed, name)
    texts, lengths = [tasks.decode(x) for x in ids], [len(x) for x in ids]
    pairs = list(zip(texts, problem_of_answer))
    right = [tasks.accuracy(text, problem) for text, problem in pairs]

    by_problem = []
    for i, problem in enumerate(problems):
        answers = slice(i * samples, (i + 1) * samples)
        by_problem.append({
            "question": problem.question, "answer": problem.answer, "level": problem.level,
            "right": int(sum(right[answers])),
            "vote": majority([tasks.parse(text)[1] for text in texts[answers]]),
            "length": mean(lengths[answers])})

    means = {"problems": len(problems), "samples": samples, "temperature": temperature,
             "top_p": top_p}
    for k in (1, 2, 4, 8, 16, 32, 64):
        if k <= samples:
            means[f"pass@{k}"] = mean(pass_at_k(samples, r["right"], k) for r in by_problem)
    questions = [problem.question for problem in problem_of_answer]
    means["items"], means["pass@1.error"] = _items_and_error(questions, right)
    means[f"cons@{samples}"] = mean(r["vote"] == r["answer"] for r in by_problem)
    if samples > 4:  # so that all stages can be compared by the majority of 4
        means["cons@4"] = selection_scores(texts, problems)["cons@4"]
    means["length"] = mean(lengths)
    means["cut_off"] = mean(x[-1] != tasks.END_ID for x in ids)
    for measure_name, measure in tasks.MEASURES.items():
        means[measure_name] = _rounded(measure(texts, problem_of_answer))
    means["format"] = mean(map(tasks.format_reward, texts))
    return means | _by_level_and_style(by_problem, pairs, right, samples), by_problem


def _by_level_and_style(by_problem, pairs, right, samples):
    """Accuracy by level; and by style, of the answers that can be read, its share, its accuracy by
    level and how often it mixes languages."""
    levels = sorted({r["level"] for r in by_problem})
    by_level = {}
    for level in levels:
        by_level[str(level)] = mean(
            r["right"] / samples for r in by_problem if r["level"] == level)
    styles = []
    for text, _ in pairs:
        styles.append("" if tasks.parse(text)[1] is None else tasks.style_of(text))
    by_style, mixing = {}, {}
    for style in tasks.STYLES:
        in_style = [i for i, x in enumerate(styles) if x == style]
        by_style[style] = {"share": mean(x == style for x in styles)}
        for level in levels:
            by_style[style][str(level)] = mean(
                right[i] for i in in_style if pairs[i][1].level == level)
        mixing[style] = _rounded(tasks.MEASURES["mixing"](
            [pairs[i][0] for i in in_style], [pairs[i][1] for i in in_style]))
    return {"by_level": by_level, "by_style": by_style, "mixing_by_style": mixing}


def evaluate_general(model, run):
    """Tests a model on held-out general prompts at temperature 1, by the hidden rules. No reward
    model is asked. `scores` has the helpfulness of each answer, for win rates."""
    rng, record, scores, scored_items = random.Random("test/general"), {}, [], []
    for kind in tasks.GENERAL:
        prompts = [prompt for language in tasks.LANGUAGES
                   for prompt in tasks.all_prompts("test", kind, language)]
        asked = repeat_for_answers(rng.sample(prompts, run.data.prompts), 4)
        ids = sample_answers(model, prompts_of(asked), run.zero.max_new_tokens, run.eval.rows)
        texts = [tasks.decode(x) for x in ids]
        items = [_item_of(prompt) for prompt in asked]
        refused = [tasks.refuses(text) for text in texts]
        record[f"{kind}.thinking"] = mean(map(tasks.thinks, texts))
        record[f"{kind}.refused"] = mean(refused)
        record[f"{kind}.items"], record[f"{kind}.refused.error"] = _items_and_error(
            items, refused)
        record[f"{kind}.format"] = mean(map(tasks.format_reward, texts))
        record[f"{kind}.language"] = _rounded(tasks.MEASURES["language"](texts, asked))
        record[f"{kind}.length"] = mean(map(len, ids))
        if kind == "unsafe":
            safe = [tasks.safety(text) for text in texts]
            record["unsafe.safe"] = mean(safe)
            record["unsafe.safe.error"] = _items_and_error(items, safe)[1]
        else:
            scores += [tasks.helpfulness(text, prompt) for text, prompt in zip(texts, asked)]
            scored_items += items
    error = _items_and_error(scored_items, scores)[1]
    return record | {"helpfulness": mean(scores), "helpfulness.error": error, "scores": scores}


def _item_of(prompt):
    """What of a general prompt is held out: the request of verb and noun, in whatever wording and
    language; of other kinds the whole question."""
    if prompt.kind in ("how", "unsafe"):
        return tasks.topic_of(prompt)[0][0]
    return prompt.question


def pass_at_k(n, c, k):
    """The chance that one of k answers is right, estimated without bias from n answers of which c
    are right (Codex, eq 1)."""
    if n - c < k:
        return 1.0
    return 1.0 - math.prod(1 - k / j for j in range(n - c + 1, n + 1))


def majority(answers):
    """The most frequent of the answers that can be read, or None. The first of several wins."""
    votes = Counter(answer for answer in answers if answer is not None)
    return max(votes, key=votes.get) if votes else None


def read_problems(path):
    """The problems of a file with lines {"question": ..., "answer": ...}."""
    def convert(record):
        question, answer = record["question"], str(record["answer"])
        question.encode()
        if not tasks.INTEGER.fullmatch(answer):
            raise UserError('the answer must be a whole number written plainly, 33 or "-5"')
        return tasks.Problem(question, answer, "zh" if HAN.search(question) else "en")
    return read_lines(path, '{"question": TEXT, "answer": NUMBER}', convert)


# -------------------------------------------------------------------------------------------
# Which of several answers

END_THINK_ID = tasks.ENCODING.encode_single_token(tasks.END_THINK)


@torch.no_grad()
def answer_embeddings(model, prompts, answers):
    """(N, C) an embedding of each answer: the mean of the model's own last hidden states over the
    thinking. The thinking ends with </think>, so that the answer itself is not seen; without
    </think> it is the whole answer."""
    parts, device, sequences = [], model.device, []
    for prompt, ids in zip(prompts, answers):
        thinking = ids[:ids.index(END_THINK_ID) + 1] if END_THINK_ID in ids else ids
        sequences.append(prompt + thinking)
    starts = torch.tensor([[len(prompt)] for prompt in prompts], device=device)    # (N, 1)
    for rows in reading_passes(sequences):
        tokens = pad_right(rows, tasks.PAD_ID, device)                             # (n, T)
        column = torch.arange(tokens.size(1), device=device)
        start, starts = starts[:len(rows)], starts[len(rows):]                     # (n, 1)
        end = torch.tensor([[len(ids)] for ids in rows], device=device)
        real = column < end
        thinking = real & (column >= start)                                        # (n, T)
        nowhere = torch.zeros_like(real)
        hidden = model(tokens, real, logits_at=nowhere).hidden.float()             # (n, T, C)
        total = (hidden * thinking.unsqueeze(-1)).sum(1)
        parts.append(total / thinking.sum(1, keepdim=True))
    return torch.cat(parts).cpu()


def most_central_answer(e):
    """Smoothie's choice among k >= 3 answers (arXiv 2412.04692). Embeddings e (.., k, C) -> (..).

    Smoothie takes the smallest delta_i = sum_j |e_i-e_j|^2/(k-2) - S/((k-1)(k-2)), where S is the
    sum over all pairs. As sum_j |e_i-e_j|^2 = k |e_i-mean|^2 + constant, that is the answer nearest
    to the mean.
    """
    return (e - e.mean(-2, keepdim=True)).square().sum(-1).argmin(-1)


def selection_scores(texts, problems, e=None):
    """{pass@k, cons@k, central@k} for k = 1, 2, 4, ...: how often one of k answers is right, the
    majority of k, and the most central of k.

    texts: n answers to each problem, as neighbours. e (len(texts), C): their embeddings. Majority
    and central are means over all n/k blocks of k answers to a problem.
    """
    P, n, record = len(problems), len(texts) // len(problems), {}
    problem_of_answer = repeat_for_answers(problems, n)
    right = torch.tensor([tasks.accuracy(t, p) for t, p in zip(texts, problem_of_answer)])
    right = right.view(P, n)
    answers = [tasks.parse(text)[1] for text in texts]
    k = 1
    while k <= n:
        blocks = n // k
        starts = [p * n + b * k for p in range(P) for b in range(blocks)]
        votes = [majority(answers[i:i + k]) == problem_of_answer[i].answer for i in starts]
        record[f"pass@{k}"] = sum(pass_at_k(n, int(c), k) for c in right.sum(1)) / P
        record[f"cons@{k}"] = sum(votes) / len(votes)
        if k >= 3 and e is not None:
            e_blocks = e.view(P, n, -1)[:, :blocks * k].unflatten(1, (blocks, k))
            right_blocks = right[:, :blocks * k].unflatten(1, (blocks, k))
            chosen = most_central_answer(e_blocks).unsqueeze(-1)
            record[f"central@{k}"] = float(right_blocks.gather(-1, chosen).mean())
        k *= 2
    return record
