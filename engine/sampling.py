"""Sampling: batches of answers written with the cache, and MTP's drafts in speculative decoding."""
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.devices import gather, gathered_weights, rank_and_size, share
from engine.errors import UserError
from moe import make_cache


def pad(sequences, value, device=None):
    """N token lists -> (N, T), padded on the right; of none a row, for a process without work."""
    rows = [torch.tensor(ids, dtype=torch.long) for ids in sequences or [[value] * 2]]
    return nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value).to(device)


@dataclass
class Samples:
    """N sampled answers, right-padded behind their prompts."""
    tokens: Tensor    # (N, T) prompt then answer, right-padded
    answer: Tensor    # (N, T) True at the answer's tokens, its end token included
    logprobs: Tensor  # (N, T) log-probability of each answer token as it was sampled, elsewhere 0
    finished: Tensor  # (N,) whether the answer ended by itself

    def answers(self):
        """The answers' token ids, N lists."""
        return [row[mask].tolist() for row, mask in zip(self.tokens, self.answer)]


def sampling_logprobs(logits, temperature, top_p):
    """Log-probabilities (N, V) of the sampling policy: logits over temperature, then the smallest
    set of tokens whose mass reaches top_p, renormalised. Temperature 0: the likeliest token."""
    if temperature == 0:
        return torch.full_like(logits, -math.inf).scatter(-1, logits.argmax(-1, keepdim=True), 0.0)
    logp = (logits / temperature if temperature != 1 else logits).log_softmax(-1)
    if top_p < 1:
        outside = math.log((1 - top_p) / logp.size(-1))    # all such together lack the mass
        ordered, order = logp.topk(int((logp > outside).sum(-1).max()))
        before = ordered.exp().cumsum(-1) - ordered.exp()  # mass of the likelier tokens
        kept = ordered.masked_fill(before >= top_p, -math.inf).log_softmax(-1)
        logp = torch.full_like(logp, -math.inf).scatter(-1, order, kept)
    return logp


def draw(logp, uniform):
    """A token (N, 1) for each row of log-probabilities (N, V), by its own number (N,) in [0, 1)."""
    mass = logp.exp().cumsum(-1)
    found = torch.searchsorted(mass, uniform.unsqueeze(-1) * mass[:, -1:], right=True)
    return found.clamp(max=logp.size(-1) - 1)


def pad_left(prompts, pad_id, device):
    """N token lists -> tokens (N, T) padded on the left, and where they are real."""
    longest = max(map(len, prompts))
    real = [[0] * (longest - len(p)) + [1] * len(p) for p in prompts]
    tokens = pad([[pad_id] * (longest - len(p)) + list(p) for p in prompts], pad_id, device)
    return tokens, torch.tensor(real, dtype=torch.bool, device=device)


def check_length(config, longest, max_new_tokens):
    """UserError if a prompt and its answer are longer than the model can read."""
    if longest + max_new_tokens > config.max_seq_len:
        raise UserError(f"a prompt of {longest} tokens and {max_new_tokens} new ones exceed the "
                        f"model's max_seq_len of {config.max_seq_len}")


@torch.no_grad()
def generate(model, prompts, max_new_tokens, end_id, pad_id, temperature=1.0, top_p=1.0, seed=0,
             watch=None):
    """Samples an answer to each of N prompts (token lists of any lengths). Returns Samples.

    Answer n, token t is drawn with its own uniform number, so the other prompts' fate does not
    touch it. A prompt that comes several times is read once. Ended rows leave the batch when more
    than a quarter of it is idle. Each process writes its share of the answers and all return all,
    so a group is compared whole. watch sees each round's tokens (rows, 1), of ended rows too.
    """
    device, config, longest = model.device, model.config, max(map(len, prompts))
    check_length(config, longest, max_new_tokens)
    training = model.training
    model.eval()
    uniform = torch.rand(len(prompts), max_new_tokens,
                         generator=torch.Generator().manual_seed(seed))
    shared = len(prompts) >= rank_and_size()[1]  # or all write all
    mine, uniform = (share(x) if shared else x for x in (prompts, uniform.to(device)))
    ids = torch.full(uniform.shape, pad_id, device=device)     # (len(mine), max_new_tokens)
    logp = torch.zeros_like(uniform)
    rows = torch.arange(len(ids), device=device)               # of ids: those still in the batch
    alive = torch.ones_like(rows, dtype=torch.bool)            # and of these, those not ended
    place = {p: i for i, p in enumerate(dict.fromkeys(map(tuple, mine)))}  # of distinct prompts
    fed, real = pad_left(list(place), pad_id, device)          # (prompts, the longest of mine)
    cache, last = make_cache(model, *fed.size()), F.pad(real[:, 1:] & False, (0, 1), value=True)
    # FSDP gathers before inference_mode begins
    with gathered_weights(model) as unfinished, torch.inference_mode():
        for t in range(max_new_tokens):
            if t == 0:
                read = torch.tensor([place[tuple(p)] for p in mine], device=device)
                logits = model(fed, real, cache, last).logits[read]
                cache = cache.keep_rows(read, max_new_tokens)
            else:
                logits = model(fed, cache=cache).logits[:, -1]
            policy = sampling_logprobs(logits, temperature, top_p)
            fed = draw(policy, uniform[:, t])                  # (rows, 1)
            if watch:
                watch(fed)
            ids[rows, t], logp[rows, t] = fed[:, 0], policy.gather(-1, fed)[:, 0]  # ended ones too
            alive = alive & (fed[:, 0] != end_id)
            count = int(alive.sum())
            if not unfinished(count > 0):
                break
            if 0 < count < 0.75 * len(rows):
                left = alive.nonzero().squeeze(1)
                cache, rows, alive = cache.keep_rows(left), rows[left], alive[left]
                fed, uniform = fed[left], uniform[left]
    model.train(training)
    return lay_out(prompts, *(gather(x) if shared else x for x in (ids, logp)), end_id, pad_id)


def lay_out(prompts, ids, logp, end_id, pad_id):
    """Samples of N prompts and their answers' ids and logp (N, max_new_tokens). An answer counts up
    to its first end_id and with it; what was drawn after that does not."""
    ended = ids == end_id
    finished = ended.any(1)
    length = torch.where(finished, ended.int().argmax(1) + 1, ids.size(1)).unsqueeze(1)  # (N, 1)
    begin = torch.tensor([[len(p)] for p in prompts], device=ids.device)
    width = int((begin + length).max())
    column = torch.arange(width, device=ids.device) - begin  # (N, width) which of ids
    answer, at = (0 <= column) & (column < length), column.clamp(0, ids.size(1) - 1)
    before = F.pad(pad(prompts, pad_id, ids.device), (0, width - int(begin.max())), value=pad_id)
    return Samples(torch.where(answer, ids.gather(1, at), before), answer,
                   torch.where(answer, logp.gather(1, at), 0.0), finished)


# -------------------------------------------------------------------------------------------------
# Drafts: speculative decoding


def draft_logits(model, hidden, following, cache):
    """MTP's logits (N, T, V) for the token after `following` (N, T), at a cache's last T columns
    with hidden states (N, T, C)."""
    position, mask = cache.view(following.size(1))
    with model.precision():
        h, _ = model.mtp(hidden, model.embed(following), model.rotations[position], None,
                         cache.latent[-1, :, :cache.length], mask)
    return model.head(h)


def judge_drafts(policy, guess, draft, number):
    """Whether each draft (N, 1), drawn from guess, is taken, and the token that follows in any case
    (N, 1), which is distributed as policy. guess, policy (N, V): log-probabilities. number (2, N):
    uniform, in [0, 1)."""
    odds = (policy - guess).gather(-1, draft).exp()[:, 0]       # p(d) / q(d)
    taken = number[0] < odds
    rest = (policy.exp() - guess.exp()).clamp(min=1e-30).log()  # max(p - q, 0)
    return taken, torch.where(taken.unsqueeze(1), draft, draw(rest, number[1]))


class Answers:
    """What is written to N prompts, each row at its own pace."""

    def __init__(self, N, most, device):
        self.rows, self.count = torch.arange(N, device=device), torch.zeros(N, device=device).long()
        self.ids = torch.zeros(N, most, dtype=torch.long, device=device)
        self.logp = torch.zeros(N, most, device=device)

    def write(self, token, policy, writing, end_id):
        """Appends a token (N, 1) to the answers of some rows, a mask; returns those that go on."""
        row = self.rows[writing]
        at = row, self.count[row]
        self.ids[at], self.logp[at] = token[writing, 0], policy.gather(-1, token)[writing, 0]
        self.count[row] += 1
        return writing & (token[:, 0] != end_id) & (self.count < self.ids.size(1))


@torch.no_grad()
def speculate(model, prompts, max_new_tokens, end_id, pad_id, temperature=1.0, top_p=1.0, seed=0):
    """generate() with drafts: MTP guesses the token after the next, and the model judges the guess
    in the pass that reads the next (V3 section 5.4.3). Returns (Samples, share of drafts accepted).

    A guess d drawn from q is accepted with probability min(1, p(d) / q(d)), else replaced by a
    draw from max(p - q, 0): what comes out is distributed as p, whatever q (Leviathan et al. 2023).
    """
    if model.mtp is None:
        raise UserError("no drafts: this model has no MTP layer")
    device, N = model.device, len(prompts)
    room = max(map(len, prompts)) + 2 * max_new_tokens  # columns, if every draft were rejected
    if room > model.config.max_seq_len:
        raise UserError(f"prompts and drafts need {room} columns, more than max_seq_len")
    cache = make_cache(model, N, room, drafts=True)
    out = Answers(N, max_new_tokens, device)
    uniform = torch.rand(3, N, max_new_tokens + 1, generator=torch.Generator().manual_seed(seed))
    uniform = uniform.to(device)
    drafted = accepted = 0
    training = model.training
    model.eval()
    fed, real = pad_left(prompts, pad_id, device)
    output = model(fed, real, cache)
    policy = sampling_logprobs(output.logits[:, -1], temperature, top_p)
    last = draw(policy, uniform[0, :, 0])
    alive = out.write(last, policy, out.count == 0, end_id)
    guessed = draft_logits(model, output.hidden, torch.cat((fed[:, 1:], last), 1), cache)[:, -1]
    while alive.any():
        guess = sampling_logprobs(guessed, temperature, top_p)            # q (N, V)
        number = uniform[:, out.rows, out.count]                          # (3, N)
        draft = draw(guess, number[0])
        output = model(torch.cat((last, draft), 1), cache=cache)
        policy = sampling_logprobs(output.logits[:, 0], temperature, top_p)  # p (N, V)
        after = sampling_logprobs(output.logits[:, 1], temperature, top_p)
        taken, following = judge_drafts(policy, guess, draft, number[1:])
        drafted, accepted = drafted + int(alive.sum()), accepted + int((taken & alive).sum())
        alive = out.write(following, policy, alive, end_id)
        second = draw(after, uniform[0, out.rows, out.count])
        more = out.write(second, after, alive & taken, end_id)
        alive = torch.where(taken, more, alive)
        cache.real[:, cache.length - 1] = taken                           # a rejected guess: a hole
        guessed = draft_logits(model, output.hidden, torch.cat((following, second), 1), cache)
        guessed = guessed[out.rows, taken.long()]                         # after the last token
        last = torch.where(taken.unsqueeze(1), second, following)
    model.train(training)
    samples = lay_out(prompts, out.ids, out.logp, end_id, pad_id)
    return samples, accepted / max(1, drafted)
