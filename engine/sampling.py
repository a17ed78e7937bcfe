"""Sampling: batches of answers, written with the cache; and MTP's drafts (speculative decoding)."""
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.devices import gather_from_processes, gathered_weights, process_share, rank_and_size
from engine.errors import UserError
from moe import Cache, make_cache

PASS_TOKENS = 2 ** 16  # a pass reads at most this many tokens, with padding: 0.3 GiB on nano
COLDEST = 1e-6         # a lower temperature counts as 0: rounding changes logits by about as much


@dataclass
class Samples:
    """N sampled answers behind their prompts."""
    tokens: Tensor    # (N, T) prompt then answer, padded on the right
    answer: Tensor    # (N, T) True at the tokens of the answer, its end token included
    logprobs: Tensor  # (N, T) log-probability of each answer token as it was sampled, elsewhere 0
    finished: Tensor  # (N,) whether the answer ended by itself

    def answers(self):
        """The token ids of the answers, N lists."""
        return [row[mask].tolist() for row, mask in zip(self.tokens, self.answer)]


def pad_right(sequences, value, device=None):
    """N token lists -> (N, T), padded on the right. Without sequences it is one dummy row, for a
    process that has no work in this pass."""
    rows = [torch.tensor(ids, dtype=torch.long) for ids in sequences or [[value] * 2]]
    return nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value).to(device)


def pad_left(prompts, pad_id, device):
    """N token lists -> tokens (N, T), padded on the left, and where they are real (N, T)."""
    longest = max(map(len, prompts))
    tokens, real = [], []
    for prompt in prompts:
        missing = longest - len(prompt)
        tokens.append([pad_id] * missing + list(prompt))
        real.append([False] * missing + [True] * len(prompt))
    return pad_right(tokens, pad_id, device), torch.tensor(real, device=device)


def reading_passes(sequences):
    """Cuts token lists, in their order, into passes of at most PASS_TOKENS tokens, padding
    included, or of a single list."""
    passes, longest = [], 0
    for ids in sequences:
        longest = max(longest, len(ids))
        if not passes or (len(passes[-1]) + 1) * longest > PASS_TOKENS:
            passes.append([])
            longest = len(ids)
        passes[-1].append(ids)
    return passes


def _check_length(config, longest, max_new_tokens):
    """UserError if a prompt and its answer are longer than the model can read."""
    if longest + max_new_tokens > config.max_seq_len:
        raise UserError(f"a prompt of {longest} tokens and {max_new_tokens} new ones exceed the "
                        f"model's max_seq_len of {config.max_seq_len}")


def sampling_logprobs(logits, temperature, top_p):
    """Log-probabilities (N, V) of the policy that is sampled: logits over temperature; then the
    smallest set of tokens whose probabilities add up to top_p, renormalised. At temperature 0, and
    below COLDEST, it is the likeliest token."""
    if temperature < COLDEST:
        return torch.full_like(logits, -math.inf).scatter(-1, logits.argmax(-1, keepdim=True), 0.0)
    logp = (logits / temperature if temperature != 1 else logits).log_softmax(-1)
    if top_p < 1:
        # All tokens below this add up to less than 1 - top_p, so none of them is in the set.
        threshold = math.log((1 - top_p) / logp.size(-1))
        # If top_p is nearly 0 and all tokens are equally likely, none is above the threshold.
        candidates = max(1, int((logp > threshold).sum(-1).max()))
        ordered, order = logp.topk(candidates)
        likelier = ordered.exp().cumsum(-1) - ordered.exp()  # probability of all likelier tokens
        kept = ordered.masked_fill(likelier >= top_p, -math.inf).log_softmax(-1)
        logp = torch.full_like(logp, -math.inf).scatter(-1, order, kept)
    return logp


def draw_token(logp, uniform):
    """A token (N, 1) for each row of log-probabilities (N, V), by the row's own number (N,) in
    [0, 1)."""
    cumulative = logp.exp().cumsum(-1)
    wanted = uniform.unsqueeze(-1) * cumulative[:, -1:]
    token = torch.searchsorted(cumulative, wanted, right=True)
    return token.clamp(max=logp.size(-1) - 1)


def _uniform_numbers(seed, n, length):
    """(n, length) random numbers in [0, 1). seed: a number, or a list with one for each row."""
    if isinstance(seed, int):
        return torch.rand(n, length, generator=torch.Generator().manual_seed(seed))
    return torch.cat([_uniform_numbers(row_seed, 1, length) for row_seed in seed])


def _prompt_passes(N, T, cache):
    """Cuts the reading of prompts (N, T) into passes. Yields the rows of each pass and a view of
    their part of an empty cache."""
    n_rows = max(1, PASS_TOKENS // T)
    for begin in range(0, N, n_rows):
        rows = slice(begin, begin + n_rows)
        yield rows, Cache(cache.latent[:, rows], cache.real[rows])


def read_prompts(model, tokens, real, cache, goes_on):
    """Reads prompts (N, T), padded on the left, into an empty cache. Returns the logits (N, V)
    after their last tokens. goes_on: the function that gathered_weights() yields."""
    N, T = tokens.size()
    last = torch.zeros_like(real)
    last[:, -1] = True  # logits are needed only there
    passes, logits = list(_prompt_passes(N, T, cache)), []
    while goes_on(bool(passes)):
        if passes:
            rows, part = passes.pop(0)
            logits.append(model(tokens[rows], real[rows], part, last[rows]).logits)
        else:  # other processes still read, and need the experts of this one
            model(tokens[:1], real[:1], make_cache(model, 1, T), last[:1])
    cache.length = T
    return torch.cat(logits)


@torch.no_grad()
def generate(model, prompts, max_new_tokens, end_id, pad_id, temperature=1.0, top_p=1.0, seed=0,
             watch=None):
    """Samples an answer to each of N prompts (token lists of any lengths). Returns Samples.
    seed: a number, or a list with one for each prompt.

    Token t of answer n is drawn with its own uniform number, so it does not depend on the other
    prompts in the batch. A prompt that comes several times is read once, and prompts are read in
    passes of at most PASS_TOKENS tokens. Ended rows leave the batch when more than a quarter of it
    is idle. Each process writes its share of the answers, and all of them return all answers. watch
    is called with each round's tokens (rows, 1), which are also of ended rows.
    """
    device, longest = model.device, max(map(len, prompts))
    _check_length(model.config, longest, max_new_tokens)
    was_training = model.training
    model.eval()
    uniform = _uniform_numbers(seed, len(prompts), max_new_tokens).to(device)
    deal_out = len(prompts) >= rank_and_size()[1]  # otherwise every process writes all answers
    here = process_share(prompts) if deal_out else prompts
    uniform = process_share(uniform) if deal_out else uniform

    ids = torch.full(uniform.shape, pad_id, device=device)   # (answers written here, tokens)
    logp = torch.zeros_like(uniform)
    rows = torch.arange(len(ids), device=device)             # numbers of the rows in the batch
    alive = torch.ones_like(rows, dtype=torch.bool)          # of these, whether they go on

    distinct = list(dict.fromkeys(map(tuple, here)))
    number_of = {prompt: i for i, prompt in enumerate(distinct)}
    prompt_of_answer = torch.tensor([number_of[tuple(p)] for p in here], device=device)
    fed, real = pad_left(distinct, pad_id, device)           # (distinct prompts, T)
    cache = make_cache(model, *fed.size())
    # FSDP gathers its weights before inference_mode begins.
    with gathered_weights(model) as goes_on, torch.inference_mode():
        for t in range(max_new_tokens):
            if t == 0:
                logits = read_prompts(model, fed, real, cache, goes_on)[prompt_of_answer]
                cache = cache.keep_rows(prompt_of_answer, max_new_tokens)
            else:
                logits = model(fed, cache=cache).logits[:, -1]
            policy = sampling_logprobs(logits, temperature, top_p)
            fed = draw_token(policy, uniform[:, t])          # (rows, 1)
            if watch:
                watch(fed)
            ids[rows, t] = fed[:, 0]                         # lay_out ignores what follows an end
            logp[rows, t] = policy.gather(-1, fed)[:, 0]
            alive = alive & (fed[:, 0] != end_id)
            count = int(alive.sum())
            if not goes_on(count > 0):
                break
            if 0 < count < 0.75 * len(rows):
                left = alive.nonzero().squeeze(1)
                cache, rows, alive = cache.keep_rows(left), rows[left], alive[left]
                fed, uniform = fed[left], uniform[left]
    model.train(was_training)
    if deal_out:
        ids, logp = gather_from_processes(ids), gather_from_processes(logp)
    return lay_out_samples(prompts, ids, logp, end_id, pad_id)


def lay_out_samples(prompts, ids, logp, end_id, pad_id):
    """Samples of N prompts and the ids and logp (N, max_new_tokens) of their answers. An answer
    goes up to its first end_id, which is part of it. What was drawn after that is dropped."""
    is_end = ids == end_id
    finished = is_end.any(1)
    length = torch.where(finished, is_end.int().argmax(1) + 1, ids.size(1)).unsqueeze(1)  # (N, 1)
    begin = torch.tensor([[len(p)] for p in prompts], device=ids.device)                  # (N, 1)
    T = int((begin + length).max())
    index = torch.arange(T, device=ids.device) - begin   # (N, T) index into ids of each column
    answer = (index >= 0) & (index < length)
    index = index.clamp(0, ids.size(1) - 1)
    prompt = pad_right(prompts, pad_id, ids.device)
    prompt = F.pad(prompt, (0, T - prompt.size(1)), value=pad_id)
    return Samples(tokens=torch.where(answer, ids.gather(1, index), prompt), answer=answer,
                   logprobs=torch.where(answer, logp.gather(1, index), 0.0), finished=finished)


# -------------------------------------------------------------------------------------------
# Drafts


def _draft_logits(model, hidden, next_tokens, cache):
    """MTP's logits (N, T, V) for the token after next_tokens (N, T). hidden (N, T, C) are the
    model's hidden states at the last T columns of the cache."""
    position, mask = cache.positions_and_mask(next_tokens.size(1))
    with model.precision():
        h, _ = model.mtp(hidden, model.embed(next_tokens), model.rotations[position], None,
                         cache.latent[-1, :, :cache.length], mask)
    return model.head(h)


def _judge_drafts(policy, guess, draft, uniform):
    """Accepts each draft (N, 1), which was drawn from guess, or replaces it. Returns (accepted
    (N,), the token that follows (N, 1)). That token is distributed as policy.

    policy and guess (N, V) are log-probabilities; uniform (2, N) is in [0, 1).
    """
    ratio = (policy - guess).gather(-1, draft).exp()[:, 0]               # p(d) / q(d)
    accepted = uniform[0] < ratio
    remainder = (policy.exp() - guess.exp()).clamp(min=1e-30).log()      # max(p - q, 0)
    replacement = draw_token(remainder, uniform[1])
    return accepted, torch.where(accepted.unsqueeze(1), draft, replacement)


class Answers:
    """Answers to N prompts that grow at their own pace."""

    def __init__(self, N, max_new_tokens, device):
        self.rows = torch.arange(N, device=device)
        self.count = torch.zeros(N, device=device).long()  # tokens written so far
        self.ids = torch.zeros(N, max_new_tokens, dtype=torch.long, device=device)
        self.logp = torch.zeros(N, max_new_tokens, device=device)

    def write(self, token, policy, writing, end_id):
        """Appends a token (N, 1) to the answers for which `writing` (N,) is True. Returns for which
        of these the answer goes on."""
        row = self.rows[writing]
        column = self.count[row]
        self.ids[row, column] = token[writing, 0]
        self.logp[row, column] = policy.gather(-1, token)[writing, 0]
        self.count[row] += 1
        return writing & (token[:, 0] != end_id) & (self.count < self.ids.size(1))


@torch.no_grad()
def speculate(model, prompts, max_new_tokens, end_id, pad_id, temperature=1.0, top_p=1.0, seed=0):
    """generate() with drafts (V3 section 5.4.3). Returns (Samples, share of accepted drafts).

    MTP guesses the token after the next one. The pass that reads the next token also judges the
    guess. A guess d that is drawn from q is accepted with probability min(1, p(d) / q(d)), and
    otherwise replaced by a draw from max(p - q, 0). So answers are distributed as the model's,
    whatever q is (Leviathan et al. 2023). At temperature 0 they are the same answers.
    """
    if model.mtp is None:
        raise UserError("no drafts: this model has no MTP layer")
    device, N = model.device, len(prompts)
    columns = max(map(len, prompts)) + 2 * max_new_tokens  # if every draft is rejected
    if columns > model.config.max_seq_len:
        raise UserError(f"prompts and drafts need {columns} columns, more than max_seq_len")
    was_training = model.training
    model.eval()
    cache = make_cache(model, N, columns, drafts=True)
    out = Answers(N, max_new_tokens, device)
    uniform = torch.rand(3, N, max_new_tokens + 1, generator=torch.Generator().manual_seed(seed))
    uniform = uniform.to(device)
    drafted = accepted = 0

    tokens, real = pad_left(prompts, pad_id, device)                         # (N, T)
    parts = []
    for rows, part in _prompt_passes(*tokens.size(), cache):
        output = model(tokens[rows], real[rows], part)
        policy = sampling_logprobs(output.logits[:, -1], temperature, top_p)
        last = draw_token(policy, uniform[0, rows, 0])
        next_tokens = torch.cat((tokens[rows, 1:], last), 1)
        guess_logits = _draft_logits(model, output.hidden, next_tokens, part)[:, -1]
        parts.append((last, policy, guess_logits))
    cache.length = tokens.size(1)
    last, policy, guess_logits = map(torch.cat, zip(*parts))                 # (N, 1), 2 x (N, V)
    alive = out.write(last, policy, out.count == 0, end_id)
    while alive.any():
        guess = sampling_logprobs(guess_logits, temperature, top_p)          # q (N, V)
        number = uniform[:, out.rows, out.count]                             # (3, N)
        draft = draw_token(guess, number[0])

        output = model(torch.cat((last, draft), 1), cache=cache)             # reads both tokens
        policy = sampling_logprobs(output.logits[:, 0], temperature, top_p)  # p (N, V)
        after_draft = sampling_logprobs(output.logits[:, 1], temperature, top_p)
        taken, first = _judge_drafts(policy, guess, draft, number[1:])
        drafted += int(alive.sum())
        accepted += int((taken & alive).sum())

        alive = out.write(first, policy, alive, end_id)
        second = draw_token(after_draft, uniform[0, out.rows, out.count])
        goes_on = out.write(second, after_draft, alive & taken, end_id)
        alive = torch.where(taken, goes_on, alive)

        cache.real[:, cache.length - 1] = taken      # a rejected draft must not be seen again
        guess_logits = _draft_logits(model, output.hidden, torch.cat((first, second), 1), cache)
        guess_logits = guess_logits[out.rows, taken.long()]
        last = torch.where(taken.unsqueeze(1), second, first)
    model.train(was_training)
    samples = lay_out_samples(prompts, out.ids, out.logp, end_id, pad_id)
    return samples, accepted / max(1, drafted)
