"""Can a model think in hidden states instead of words?

The paper (Coconut, arXiv 2412.06769): a latent thought is the model's last hidden state, after
the final norm, fed back as its next input (section 3). It is learnt in stages: stage k replaces
the first k written steps by thoughts. Accuracy in percent (Table 1):

                              GSM8k   ProntoQA   ProsQA
    written reasoning          42.9       98.8     77.5
    no reasoning               16.5       93.8     76.7
    latent thoughts            34.1       99.8     97.0
    pauses as thoughts         24.1      100.0     96.6
    the stages alone           21.6       99.9     95.5

So feeding the hidden state back pays on GSM8k, and hardly on the two tasks of logic.

    python r1mini.py study coconut

All arms start from the same kept base. All but the last two learn sums with three operations:

    written   all steps are written
    none      the answer at once
    latent    the paper's stages: one thought for each step
    pause     the same stages, with a pause token in place of each thought
    stages    the same stages, with nothing in place of the steps
    graph     latent thoughts on another task: which of two nodes can be reached, in a graph
              of ten nodes? The nodes are two halves of the same shape, so a guess is right in
              half of all cases. After each number of thoughts, the study reads at which node
              the model's next step would begin
    graph_pause   the same task with pauses

All arms are trained on the same number of positions. A token is one position, and so is a
thought. Training on hidden states costs more: for each thought, the beginning of a document is
read once more. Each answer is the likeliest token at each place (temperature 0), as in the paper.

What differs from the paper: its model is GPT-2, its stages are counted in epochs, and it has
two thoughts for a step of GSM8k.
"""
import random
from collections import deque
from dataclasses import dataclass, replace
from functools import partial
from statistics import fmean

import torch
import torch.nn.functional as F
from tqdm import tqdm

import tasks
from engine.devices import copy_model
from engine.sampling import pad_left, pad_right, reading_passes
from moe import make_cache
from r1mini import count_targets, train
from tools.compare import compare
from tools.figures import Picture, arms_panel, lines_panel
from tools.study import load_kept
from tools.tables import cell, table

SEEDS = range(6)
SETTINGS = "dev1.documents=32", "dev1.lr=5e-3", "dev1.muon_lr=5e-3", "dev1.warmup=5"
STAGES = ()                 # nothing is kept: a stopped arm begins anew
SUMS, GRAPHS = ("written", "none", "latent", "pause", "stages"), ("graph", "graph_pause")
ARMS = dict.fromkeys((*SUMS, *GRAPHS), "")
DIFFERENCES = {f"latent_minus_{arm}.pass@1": ("latent.pass@1", f"{arm}.pass@1")
               for arm in ("pause", "none", "stages")}
DIFFERENCES["graph_minus_graph_pause.pass@1"] = "graph.pass@1", "graph_pause.pass@1"
OPERATIONS, DEPTH = 3, 3    # steps of a sum, and of a path in a graph
POSITIONS = 1_000_000       # that an arm is trained on
LAST_SHARE = 0.5            # of them in the last stage; the other stages divide the rest equally
MIXED = 0.3                 # graphs only: this share of documents comes from a random stage, so
                            # the model can go on after any number of thoughts
LIMIT = 80                  # tokens of an answer
FEEDS_BACK = "latent", "graph"

START, THOUGHT, END = (tasks.ENCODING.encode_single_token(token)
                       for token in (tasks.LATENT, tasks.PAUSE, tasks.END_LATENT))


# ------------------------------------------------------------------------------
# Latent thoughts


def _forward(model, tokens, inputs, **arguments):
    """The model's Output with these inputs (B, T, C) in place of the embeddings of tokens (B, T).
    A hook replaces what the embedding returns, so moe.py need not know of it."""
    hook = model.embed.register_forward_hook(lambda *_: inputs)
    try:
        return model(tokens, **arguments)
    finally:
        hook.remove()


def _think(model, tokens, real=None, logits_at=None):
    """model(tokens), where the input of each thought is the hidden state of the position before it
    (section 3).

    The i-th pass computes the input of the i-th thought of each row, from the inputs before it. So
    n thoughts take n + 1 passes, and gradients flow through all of them. tokens and real (B, T).
    """
    T = tokens.size(1)
    is_thought = tokens == THOUGHT                                        # (B, T)
    number = is_thought.cumsum(1) * is_thought                            # 1, 2, .. at thoughts
    inputs = model.embed(tokens)                                          # (B, T, C)
    for i in range(1, int(number.max()) + 1):
        t = int((number == i).any(0).nonzero().max())  # the last column with an i-th thought
        # Without a cache, `real` only tells what the experts' load counts. Only the last pass has
        # all inputs, so only that one counts.
        nowhere = torch.zeros_like(tokens[:, :t], dtype=torch.bool)
        hidden = _forward(model, tokens[:, :t], inputs[:, :t], real=nowhere,
                          logits_at=nowhere).hidden                       # (B, t, C)
        before = F.pad(hidden, (0, 0, 1, T - t - 1))                      # (B, T, C), one later
        inputs = torch.where((number == i).unsqueeze(-1), before, inputs)
    return _forward(model, tokens, inputs, real=real, logits_at=logits_at)


@torch.no_grad()
def _read(model, prompts, thoughts, feeds_back, room):
    """Reads N prompts with the cache, then START, and has the model think: the same number of
    thoughts after each. Returns the cache, which has `room` for more tokens."""
    tokens, real = pad_left([[*ids, START] for ids in prompts], tasks.PAD_ID, model.device)
    N, T = tokens.size()
    cache = make_cache(model, N, T + thoughts + room)
    output = model(tokens, real, cache)
    thought = tokens.new_full((N, 1), THOUGHT)
    for _ in range(thoughts):
        inputs = output.hidden[:, -1:] if feeds_back else model.embed(thought)  # (N, 1, C)
        output = _forward(model, thought, inputs, cache=cache)
    return cache


@torch.no_grad()
def _answers(model, prompts, thoughts, feeds_back):
    """The token ids of an answer to each prompt, after some thoughts: the likeliest token at each
    place."""
    answers = []
    for part in reading_passes(prompts):
        cache = _read(model, part, thoughts, feeds_back, LIMIT + 1)
        fed = torch.full((len(part), 1), END, device=model.device)
        ids = []
        for _ in range(LIMIT):
            fed = model(fed, cache=cache).logits[:, -1].argmax(-1, keepdim=True)  # (N, 1)
            ids.append(fed)
            if (torch.cat(ids, 1) == tasks.END_ID).any(1).all():
                break
        for row in torch.cat(ids, 1).tolist():
            end = row.index(tasks.END_ID) + 1 if tasks.END_ID in row else len(row)
            answers.append(row[:end])
    return answers


# ------------------------------------------------------------------------------
# Graphs: which of two nodes can be reached


def _distances(edges, start):
    """{node: steps from the start} of all nodes that can be reached."""
    distance, queue = {start: 0}, deque([start])
    while queue:
        node = queue.popleft()
        for a, b in edges:
            if a == node and b not in distance:
                distance[b] = distance[node] + 1
                queue.append(b)
    return distance


def _half_of_graph(rng, nodes):
    """The edges between five nodes: a root, two nodes one step away from it, and a chain of two
    more. The chain begins at one of the two nodes, or at both."""
    root, a, b, c, d = nodes
    edges = [(root, a), (root, b), (c, d)]
    edges += [(parent, c) for parent in rng.sample((a, b), rng.choice((1, 1, 2)))]
    return edges + [(a, b)] * (rng.random() < 0.5)


def _make_graph(rng, part="train"):
    """(problem, the steps of a shortest path). The nodes are two halves of one shape, without an
    edge between them. The goals are the last nodes of both, and the question names the root of one.
    So nothing but the edges tells which goal is right."""
    while True:
        nodes = rng.sample(range(10), 10)
        edges = _half_of_graph(rng, nodes[:5]) + _half_of_graph(rng, nodes[5:])
        rng.shuffle(edges)
        text = ",".join(f"{a}>{b}" for a, b in edges)
        if tasks.part_of_problem(text) == part:
            break
    start, goals = nodes[0], [nodes[4], nodes[9]]
    distance, path = _distances(edges, start), [goals[0]]
    while path[0] != start:
        parents = [a for a, b in edges if b == path[0] and distance[a] < distance[b]]
        path.insert(0, rng.choice(parents))
    shown = rng.sample(goals, 2)
    question = f"Reach {shown[0]},{shown[1]}\nfrom {start}\n{text}"
    steps = [f"{a}>{b}" for a, b in zip(path, path[1:])]
    return tasks.Problem(question, str(goals[0]), "en", DEPTH, text), steps


def _make_sum(rng, part="train"):
    """(problem, its steps)."""
    problem = tasks.make_problem(rng, OPERATIONS, part)
    working, _ = tasks.write_working(problem, "steps", rng)
    return problem, working.split(tasks.WORDS[problem.language]["then"])


def _problems(make, part, n):
    """n problems of a part, the same in every run."""
    rng = random.Random(f"{part}/coconut")
    return [make(rng, part) for _ in range(n)]


# ------------------------------------------------------------------------------
# The curriculum


@dataclass(frozen=True)
class Example:
    """A document: question, thoughts, and what is written after them."""
    tokens: list[int]
    weight: list[int]  # in the loss: 1 for what is written; 0 for the question, for thoughts, and
                       # for START and END


def _document(problem, steps, dropped, thoughts):
    """The Example in which the first `dropped` steps are replaced by thoughts."""
    given = tasks.encode_prompt(problem.question) + [START] + [THOUGHT] * thoughts + [END]
    written = tasks.WORDS[problem.language]["then"].join(steps[dropped:])
    response = tasks.encode_response(tasks.response(written, problem.answer))
    return Example(given + response, [0] * len(given) + [1] * len(response))


def _stages(arm, n_steps):
    """[(steps that are dropped, thoughts)] of the stages of an arm: in stage k the first k steps
    are dropped."""
    if arm == "written":
        return [(0, 0)]
    if arm == "none":
        return [(n_steps, 0)]
    return [(k, 0 if arm == "stages" else k) for k in range(n_steps + 1)]


def _loss(feeds_back):
    """The next-token loss, for train. With feeds_back thoughts are hidden states; otherwise they
    are pause tokens."""
    def loss(model, examples, step_examples):
        tokens = pad_right([x.tokens for x in examples], tasks.PAD_ID, model.device)  # (B, T)
        weight = pad_right([x.weight for x in examples], 0, model.device)
        real = pad_right([[1] * len(x.tokens) for x in examples], 0, model.device) > 0
        predicting = F.pad(weight[:, 1:] > 0, (0, 1))  # the logits at t predict token t + 1
        run = partial(_think, model) if feeds_back else model
        logits = run(tokens, real, logits_at=predicting).logits                 # (wanted, V)
        total = F.cross_entropy(logits, tokens[weight > 0], reduction="sum")
        value = total / count_targets(step_examples)
        return value, value.detach()
    return loss


def _task_of(arm):
    """(the function that makes a problem of an arm, the number of its steps)."""
    return (_make_graph, DEPTH) if arm in GRAPHS else (_make_sum, OPERATIONS)


def _train(arm, model, run):
    """A copy of a model after all stages of an arm. The optimizer starts anew at each stage, as in
    the paper."""
    make, n_steps = _task_of(arm)
    model, stages = copy_model(model), _stages(arm, n_steps)
    shares = [1.0]  # of the positions
    if len(stages) > 1:
        shares = [(1 - LAST_SHARE) / (len(stages) - 1)] * (len(stages) - 1) + [LAST_SHARE]
    for i, (stage, share) in enumerate(zip(stages, shares)):
        def draw(rng, stage=stage):
            if arm in GRAPHS and rng.random() < MIXED:
                stage = rng.choice(stages)
            return _document(*make(rng), *stage)

        rng = random.Random(0)
        length = fmean(len(draw(rng).tokens) for _ in range(200))  # of a document
        steps = max(1, round(share * POSITIONS / length / run.dev1.documents))
        # The rate falls at the end of the last stage only.
        s = replace(run.dev1, steps=steps, decay=run.dev1.decay * (i == len(stages) - 1))
        # Seeds are texts: with run.seed + i, stage 1 of seed 0 would repeat stage 0 of seed 1.
        updates = train(model, s, draw, f"{run.seed}/{i}", loss=_loss(arm in FEEDS_BACK))
        for _ in tqdm(updates, f"{arm}: stage {i}", total=steps):
            pass
    return model.eval()


# ------------------------------------------------------------------------------
# Tests


def _next_nodes(model, prompts, thoughts, feeds_back):
    """(N, 10) after some thoughts: the probability that the next written step begins at this node.
    """
    cache = _read(model, prompts, thoughts, feeds_back, 2)
    think_id = tasks.ENCODING.encode_single_token(tasks.THINK)
    fed = torch.tensor([[END, think_id]] * len(prompts), device=model.device)
    with torch.no_grad():
        logits = model(fed, cache=cache).logits[:, -1]
    digits = [tasks.ENCODING.encode_single_token(str(node)) for node in range(10)]
    return logits[:, digits].softmax(-1)


def _next_steps(model, problems, feeds_back):
    """What would show a breadth-first search. After k thoughts, the next written step begins at a
    node that is k steps away from the start.

        depth.k       probability of the nodes that are k steps away
        path.k        probability of those among them that lead to the goal
        chance.k      the same if all nodes that are k steps away had equal probabilities
        near.k        number of nodes that are k steps away
        considered.k  number of nodes that the model considers: e to the entropy
        steps.k       the probabilities of the first problem's nodes, as a text. Nodes that lead
                      to the goal have a star
    """
    prompts = [tasks.encode_prompt(problem.question) for problem in problems]
    numbers = {}
    for k in range(DEPTH):
        p = _next_nodes(model, prompts, k, feeds_back).cpu()                  # (N, 10)
        at_depth, on_path, chances, counts, first = [], [], [], [], None
        for row, problem in zip(p.tolist(), problems):
            edges = [tuple(map(int, edge.split(">"))) for edge in problem.expression.split(",")]
            start, goal = int(problem.question.split("\n")[1][-1]), int(problem.answer)
            distance = _distances(edges, start)
            near = [node for node in distance if distance[node] == k]
            right = [node for node in near if goal in _distances(edges, node)]
            at_depth.append(sum(row[node] for node in near))
            on_path.append(sum(row[node] for node in right))
            chances.append(len(right) / len(near))
            counts.append(len(near))
            if first is None:
                first = ", ".join(f"{node}{'*' * (node in right)}: {row[node]:.2f}"
                                  for node in sorted(near))
        entropy = -(p * p.clamp(min=1e-9).log()).sum(-1)                      # (N,)
        numbers |= {f"depth.{k}": fmean(at_depth), f"path.{k}": fmean(on_path),
                    f"chance.{k}": fmean(chances), f"near.{k}": fmean(counts),
                    f"considered.{k}": float(entropy.exp().mean()), f"steps.{k}": first}
    question = problems[0].question.replace("\n", " ")
    return numbers | {"question": f"{question} (it is {problems[0].answer})"}


def measure_arm(arm, folder, part="test"):
    """The numbers of an arm."""
    run = folder.run
    model = _train(arm, load_kept(folder, "base"), run)
    make, n_steps = _task_of(arm)
    problems = [problem for problem, _ in _problems(make, part, run.eval.problems)]
    _, thoughts = _stages(arm, n_steps)[-1]
    prompts = [tasks.encode_prompt(problem.question) for problem in problems]
    ids = _answers(model, prompts, thoughts, arm in FEEDS_BACK)
    length = fmean(map(len, ids))
    numbers = {"pass@1": fmean(tasks.accuracy(tasks.decode(x), problem)
                               for x, problem in zip(ids, problems)),
               "length": length, "passes": length + thoughts}
    if arm in GRAPHS:
        numbers |= _next_steps(model, problems, arm in FEEDS_BACK)
    return numbers


def combine(numbers):
    """Of each arm: pass@1, and the forward passes that an answer takes."""
    return {f"coconut.{arm}.{key}": numbers[f"{arm}.{key}"]
            for arm in ARMS for key in ("pass@1", "passes")}


NAMES = {"written": "written steps", "none": "no steps", "latent": "latent thoughts",
         "pause": "pauses as thoughts", "stages": "the stages alone", "graph": "graph, latent",
         "graph_pause": "graph, pauses"}


def picture(rows):
    """pass@1 of the arms on sums, and where the next step on a graph would begin."""
    points = 100 * (rows["latent.pass@1"]["mean"] - rows["pause.pass@1"]["mean"])
    graph = 100 * (rows["graph.pass@1"]["mean"] - rows["graph_pause.pass@1"]["mean"])
    of_sums, of_graphs = ({arm: NAMES[arm] for arm in arms} for arms in (SUMS, GRAPHS))
    return Picture([arms_panel(f"Latent minus pauses:\n{points:+.1f} points on sums,", rows,
                               of_sums, "pass@1", "correct answers"),
                    lines_panel(f"{graph:+.1f}\non graphs", rows, of_graphs, "path", "thoughts",
                                "next step leads to the goal")],
                   "test problems, temperature 0; a dot is a seed, a line the mean")


def page(rows, notes):
    """The lines of the report: the arms, latent thoughts against the others, and the graph."""
    columns = {"pass@1": "pass@1", "length": "tokens", "passes": "forward passes for an answer"}
    body = [[name, *(cell(rows, f"{arm}.{key}") for key in columns)]
            for arm, name in NAMES.items()]
    lines = [*table(["arm", *columns.values()], body), ""]
    for other, arm in (("pause", "latent"), ("stages", "latent"), ("none", "latent"),
                       ("graph_pause", "graph")):
        comparison = compare(rows, f"{other}.pass@1", f"{arm}.pass@1")
        if comparison:
            lines.append(f"- {NAMES[arm]} minus {NAMES[other]}: {comparison.text(points=True)}")
    columns = {"near": "nodes at this distance", "considered": "nodes that the model considers",
               "depth": "probability of nodes at this distance",
               "path": "probability of those that lead to the goal", "chance": "by chance"}
    for arm in GRAPHS:
        body = [[str(k), *(cell(rows, f"{arm}.{key}.{k}") for key in columns)]
                for k in range(DEPTH)]
        lines += ["", *table([f"{NAMES[arm]}: thoughts", *columns.values()], body), ""]
    for seed, question in notes.get("graph.question", {}).items():
        lines.append(f"- seed {seed}: {question}")
        lines += [f"    after {k} thoughts: {notes[f'graph.steps.{k}'][seed]}"
                  for k in range(DEPTH)]
    return lines
