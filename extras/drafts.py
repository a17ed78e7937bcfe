"""Speculative decoding with MTP's drafts: answers distributed as generate()'s, at temperature 0 the
same, in fewer passes."""
import torch

from grpo import draw, lay_out, pad_left, sampling_logprobs
from moe import UserError, make_cache


def guess_after(model, hidden, following, cache):
    """MTP's logits (N, T, V) for the token after `following` (N, T), at a cache's last T columns
    with hidden states (N, T, C)."""
    position, mask = cache.view(following.size(1))
    with model.precision():
        h, _ = model.mtp(hidden, model.embed(following), model.turns[position], None,
                         cache.latent[-1, :, :cache.length], mask)
    return model.head(h)


def judge(policy, guess, draft, number):
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
    device, N = model.head.weight.device, len(prompts)
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
    guessed = guess_after(model, output.hidden, torch.cat((fed[:, 1:], last), 1), cache)[:, -1]
    while alive.any():
        guess = sampling_logprobs(guessed, temperature, top_p)            # q (N, V)
        number = uniform[:, out.rows, out.count]                          # (3, N)
        draft = draw(guess, number[0])
        output = model(torch.cat((last, draft), 1), cache=cache)
        policy = sampling_logprobs(output.logits[:, 0], temperature, top_p)  # p (N, V)
        after = sampling_logprobs(output.logits[:, 1], temperature, top_p)
        taken, following = judge(policy, guess, draft, number[1:])
        drafted, accepted = drafted + int(alive.sum()), accepted + int((taken & alive).sum())
        alive = out.write(following, policy, alive, end_id)
        second = draw(after, uniform[0, out.rows, out.count])
        more = out.write(second, after, alive & taken, end_id)
        alive = torch.where(taken, more, alive)
        cache.real[:, cache.length - 1] = taken                           # a rejected guess: a hole
        guessed = guess_after(model, output.hidden, torch.cat((following, second), 1), cache)
        guessed = guessed[out.rows, taken.long()]                         # after the last token
        last = torch.where(taken.unsqueeze(1), second, following)
    model.train(training)
    samples = lay_out(prompts, out.ids, out.logp, end_id, pad_id)
    return samples, accepted / max(1, drafted)
