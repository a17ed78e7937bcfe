"""R1-Zero in one file: a model comes to think, because thinking gives more right answers.

Run python workshop/zero.py [SEED]: three minutes on two CPU cores, and it needs only torch.
The base is pretrained on people's sums: most guess, some work step by step, many are wrong.
RL makes Zero from it. Nobody shows it a solution. A rule says which results are right.

GRPO, reinforcement learning (RL; DeepSeekMath, arXiv 2402.03300, Algorithm 1). Repeat:
    1 draw      P questions
    2 act       the policy, which is the model, writes G answers to each question
    3 score     a rule reads each answer and gives it a reward
    4 compare   advantage: how many standard deviations above the mean of the G rewards
    5 improve   make tokens likelier where the advantage is positive, rarer where negative

Five differences from R1-Zero (arXiv 2501.12948), and the file that has the real thing:
    moe.py      R1-Zero is a mixture of 671 billion weights. Ours: a transformer of 150,000.
    tasks.py    R1-Zero is asked mathematics and code. Ours: sums, < > for <think> </think>.
    grpo.py     R1-Zero has one ratio for each answer. Ours: for each token (DeepSeekMath).
    grpo.py     R1-Zero renews the reference every 400 updates. Ours stays the base.
    r1mini.py   The paper goes on to R1, in four stages. We stop at R1-Zero.
"""
import copy
import random
import re
import sys
import time

import torch
from torch import nn

CHARACTERS = " 0123456789+-=;<>."   # V tokens; the first is padding
STEPS, ROLLOUTS = 1000, 60          # of pretraining; rounds of steps 1 to 5 [R1-Zero: 650]
P, G, UPDATES = 24, 16, 4           # questions, answers, updates a rollout [512, 16, 16]
CLIP, BETA = 0.2, 0.01              # epsilon, weight of the KL penalty [0.001]

def draw_problem(operations, held_out=False):
    """A sum, such as "25-7+9=", and its numbers. All totals lie between 0 and 99."""
    while True:
        digits = random.sample(range(1, 10), operations)
        numbers = [random.randint(10, 99)] + [random.choice((-1, 1)) * d for d in digits]
        in_range = all(0 <= sum(numbers[:n]) <= 99 for n in range(2, operations + 2))
        question = "".join(f"{number:+d}" for number in numbers)[1:] + "="
        # One question in eight is kept for the test. Its characters decide, not the seed.
        if in_range and (sum(question.encode()) % 8 == 0) == held_out:
            return question, numbers

def slip(number, chance):  # people make mistakes
    error = random.choice((-10, -2, -1, 1, 2, 10))
    return max(0, number + error) if random.random() < chance else number

def write_document():
    """A question and one person's answer: <>27. or worked, <25-7=18;18+9=27>27."""
    question, (total, *others) = draw_problem(int(random.choice("111222333445")))
    if random.random() < 0.6:
        return question, f"<>{slip(total + sum(others), chance=0.3)}."
    steps = []
    for number in others:
        result = slip(total + number, chance=0.2)
        steps.append(f"{total}{number:+d}={result}")
        total = result  # a mistake is carried on
    return question, f"<{';'.join(steps)}>{total}."

def reward(answer, numbers):
    """0.1 for the form, 1 more for a right result in it. Length and steps earn nothing."""
    form = re.fullmatch(r"<[^<>]*>(\d+)\.", answer)
    right = form and form[1] == str(sum(numbers))
    return 1.1 if right else 0.1 if form else 0.0

def encode(texts):
    width = max(map(len, texts))
    return torch.tensor([list(map(CHARACTERS.index, text.ljust(width))) for text in texts])

class Transformer(nn.Module):
    def __init__(self, C=64):
        super().__init__()
        self.embedding = nn.Embedding(len(CHARACTERS), C)
        self.blocks = nn.ModuleList()
        for _ in range(3):
            qkv = nn.Sequential(nn.RMSNorm(C), nn.Linear(C, 3 * C, bias=False))
            mlp = nn.Sequential(nn.RMSNorm(C), nn.Linear(C, 4 * C, bias=False), nn.SiLU(),
                                nn.Linear(4 * C, C, bias=False))
            self.blocks.append(nn.ModuleList((qkv, nn.Linear(C, C, bias=False), mlp)))
        self.head = nn.Sequential(nn.RMSNorm(C), nn.Linear(C, len(CHARACTERS), bias=False))
        for weight in self.parameters():
            if weight.dim() == 2:
                nn.init.normal_(weight, std=0.05)

    def forward(self, tokens, caches, start=0):
        """tokens (B, T), the first at place `start` -> logits of the next (B, T, V)."""
        x, (B, T) = self.embedding(tokens), tokens.shape        # (B, T, C)
        angle = torch.outer(torch.arange(start, start + T), 1e4 ** -torch.arange(0, 1, 1/8))
        rotation = torch.polar(torch.ones_like(angle), angle)   # RoPE: turn channels
        for (qkv, out, mlp), cache in zip(self.blocks, caches):
            qk, v = qkv(x).view(B, T, 12, 16).transpose(1, 2).split((8, 4), 1)  # four heads
            pairs = torch.view_as_complex(qk.unflatten(-1, (8, 2)).contiguous())
            q, k = torch.view_as_real(pairs * rotation).flatten(-2).chunk(2, 1)
            if cache:  # the keys and values of all tokens before these
                k, v = torch.cat((cache[0], k), 2), torch.cat((cache[1], v), 2)
            cache[:] = k, v
            heads = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=T > 1)
            x = x + out(heads.transpose(1, 2).reshape(x.shape))
            x = x + mlp(x)
        return self.head(x)

def update(model, optimizers, loss, factor):  # {optimizer: its highest learning rate}
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimizer, rate in optimizers.items():
        optimizer.param_groups[0]["lr"] = rate * factor
        optimizer.step()
        optimizer.zero_grad()

def pretrain(model):
    """The base: a model that predicts the next character, mistakes included."""
    matrices = [weight for weight in model.blocks.parameters() if weight.dim() == 2]
    others = [weight for weight in model.parameters() if weight not in set(matrices)]
    optimizers = {torch.optim.Muon(matrices, weight_decay=0): 0.02,
                  torch.optim.AdamW(others, betas=(0.9, 0.95), weight_decay=0): 3e-3}
    for step in range(STEPS):
        documents = [write_document() for _ in range(96)]
        tokens = encode([question + answer for question, answer in documents])
        # Questions are random. There is nothing in them to learn, so they are no targets.
        targets = encode([" " * len(question) + answer for question, answer in documents])
        logits = model(tokens[:, :-1], [[], [], []]).flatten(0, 1)
        loss = nn.functional.cross_entropy(logits, targets[:, 1:].flatten(), ignore_index=0)
        update(model, optimizers, loss, min(1, (step + 1) / 20, (1 - step / STEPS) / 0.4))
        if step == 0 or step % 200 == 199:
            print(f"pretraining, step {step + 1}: loss {loss:.2f}", flush=True)

@torch.no_grad()
def sample(model, questions):
    """N answers at temperature 1: texts, token ids with the question's (N, Q + T), their
    log-probabilities (N, T), and a mask (N, T), False behind the full stop of an answer."""
    tokens = new = encode(questions)                            # (N, Q)
    logprobs, caches = [], [[], [], []]
    while len(logprobs) < 70 and not (tokens == encode(".")).any(1).all():  # [T 32,768]
        logprob = model(new, caches, tokens.size(1) - new.size(1))[:, -1].log_softmax(-1)
        new = torch.multinomial(logprob.exp(), 1)               # (N, 1)
        tokens = torch.cat((tokens, new), 1)
        logprobs.append(logprob.gather(1, new))
    T = len(logprobs)
    texts = ["".join(CHARACTERS[i] for i in ids) for ids in tokens[:, -T:].tolist()]
    texts = [text[:text.find(".") + 1] or text for text in texts]   # some have no full stop
    mask = torch.arange(T) < torch.tensor([[len(text)] for text in texts])
    return texts, tokens, torch.cat(logprobs, 1), mask

def answer_logprobs(model, tokens, T):
    """Log-probability of each of the last T tokens, given all tokens before it (N, T)."""
    logprob = model(tokens[:, :-1], caches=[[], [], []])[:, -T:].log_softmax(-1)
    return logprob.gather(2, tokens[:, -T:, None]).squeeze(2)

def advantages(rewards):
    """DeepSeekMath 4.1.2: A = (r - mean(r)) / std(r) in each group of rewards (P, G). PPO
    trains a value network to predict rewards. GRPO takes the mean of a group instead."""
    mean, std = rewards.mean(1, keepdim=True), rewards.std(1, keepdim=True)     # (P, 1)
    # If all G rewards are equal, there is nothing to compare, and nothing is learnt.
    return torch.where(std > 1e-4, (rewards - mean) / std, 0.0)

def grpo_loss(new, old, reference, A, mask):
    """Minus the objective, DeepSeekMath eq 3. Log-probabilities (N, T): new, of the policy
    in training; old, of that which wrote the answers; reference, of the base. A (N, 1)."""
    # The policy moves with each update. The ratio weighs a token by how likely it is now.
    ratio = (new - old).exp()                                   # (N, T)
    # The clip stops a token that has moved far enough for answers of an older policy. Once
    # its ratio is above 1 + CLIP (A > 0) or below 1 - CLIP (A < 0), the gradient is 0.
    gain = torch.minimum(ratio * A, ratio.clamp(1 - CLIP, 1 + CLIP) * A)        # (N, T)
    # The KL penalty, eq 4: 0 at the base, else positive. It keeps the policy near the base.
    kl = (reference - new).exp() - (reference - new) - 1        # (N, T)
    # Mean over the tokens of each answer, then over answers: long answers weigh no more.
    return -(((gain - BETA * kl) * mask).sum(1) / mask.sum(1)).mean()

def reinforce(model):
    """The box at the top of this file, line by line."""
    reference = copy.deepcopy(model).requires_grad_(False)      # the base
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0)
    for rollout in range(ROLLOUTS):
        operations = random.choice((3, 4, 5))
        problems = [draw_problem(operations) for _ in range(P)]                 # 1 draw
        questions, numbers = zip(*(problem for problem in problems for _ in range(G)))
        texts, tokens, old, mask = sample(model, questions)                     # 2 act
        rewards = torch.tensor(list(map(reward, texts, numbers)))               # 3 score
        A = advantages(rewards.view(P, G)).view(P * G, 1)                       # 4 compare
        # A wrong answer teaches too: if others of its group are right, its A is negative.
        base = answer_logprobs(reference, tokens, mask.size(1))                 # 5 improve
        for part in torch.randperm(P * G).chunk(UPDATES):
            new = answer_logprobs(model, tokens[part], mask.size(1))
            loss = grpo_loss(new, old[part], base[part], A[part], mask[part])
            factor = min(1, (rollout + 1) / 4, (1 - rollout / ROLLOUTS) / 0.6)
            update(model, {optimizer: 1e-3}, loss, factor)      # [3e-6]
        if rollout % 5 == 4:
            measure(f"rollout {rollout + 1}, {operations} operations", texts, numbers)

def measure(name, texts, numbers):
    right = sum(reward(*pair) > 1 for pair in zip(texts, numbers)) / len(texts)
    length = sum(map(len, texts)) / len(texts)
    print(f"{name}: {right:.0%} right, {length:.0f} characters an answer", flush=True)
    return right, length

def main(seed=0):
    began = time.time()
    torch.set_default_device("cuda" if torch.cuda.is_available() else "cpu")
    random.seed(0)                                              # one test for all seeds
    questions, numbers = zip(*(draw_problem(4, held_out=True) for _ in range(500)))
    random.seed(seed)
    torch.manual_seed(seed)
    model = Transformer()
    pretrain(model)
    base = sample(model, questions)[0]
    reinforce(model)
    zero = sample(model, questions)[0]
    for i in range(3):
        print(f"\n{questions[i]}\n    base {base[i]}\n    zero {zero[i]}")
    right, length = measure("\nbase", base, numbers)
    zero_right, zero_length = measure("zero", zero, numbers)
    print(f"Paid for results, it now thinks: answers {zero_length / length:.1f} times "
          f"as long, and {zero_right:.0%} of them right, where the base had {right:.0%}.")
    return {"base.pass@1": right, "zero.pass@1": zero_right,
            "length_ratio": zero_length / length, "seconds": time.time() - began}

if __name__ == "__main__":
    print(main(*map(int, sys.argv[1:])))
