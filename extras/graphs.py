"""graphs: sampling in fixed shapes, so that CUDA replays each token's kernels as one graph; `bench`
times it on CUDA, runs do not use it yet.

grpo.generate lets ended rows go and reads as many columns as are filled. So each token launches its
kernels anew, and small models on a GPU wait for that. Here no shape changes, and the host waits for
the device only to look, every LOOK tokens, whether all answers have ended. Without CUDA the same
steps run one by one, which is how they are tested; no GPU has run them yet. One process.
"""
import math

import torch

import grpo
from moe import Cache, make_cache

LOOK = 16  # tokens between looks whether all have ended
WARM = 3   # tokens before the graph is captured, as CUDA wants


def recordable(model):
    """Whether CUDA can record the model's steps: torch's grouped product looks at its counts on the
    host, and may not then, but in bfloat16 on compute capability 9.0 or later."""
    device = model.head.weight.device
    return device.type == "cuda" and model.compute_dtype == torch.bfloat16 and (
        torch.cuda.get_device_capability(device) >= (9, 0))


class Static(Cache):
    """A cache of fixed shape, for one token a row at a time.

    The model writes to the last column, as ever; settle() moves that to the token's own place."""

    def __init__(self, model, rows, size):
        made = make_cache(model, rows, size + 1)
        super().__init__(made.latent, torch.zeros_like(made.real))
        self.place = torch.zeros(1, dtype=torch.long, device=made.real.device)  # of the next token

    @property
    def length(self):
        """All columns, filled or not: what is not real is not seen."""
        return self.latent.size(2)

    @length.setter
    def length(self, _):
        """Stays as it is."""

    def view(self, T):
        """Positions (B, 1) of the newest tokens, and their mask (B, 1, 1, S + 1), 0 or -inf."""
        mask = torch.where(self.real[:, None, None], 0.0, -math.inf)
        return self.real[:, :-1].sum(1, keepdim=True), mask

    def take(self, cache):
        """Copies in what another cache of the same rows holds."""
        self.latent[:, :, :cache.length] = cache.latent[:, :, :cache.length]
        self.real[:, :cache.length] = cache.real[:, :cache.length]
        self.place.fill_(cache.length)

    def settle(self):
        """Puts the newest token's column in its place."""
        self.latent.index_copy_(2, self.place, self.latent[:, :, -1:])
        self.real.index_fill_(1, self.place, True)
        self.place += 1


@torch.no_grad()
def generate(model, prompts, max_new_tokens, end_id, pad_id, temperature=1.0, seed=0):
    """Samples as grpo.generate does, with the same uniform numbers; all rows stay to the end."""
    device, N, longest = model.head.weight.device, len(prompts), max(map(len, prompts))
    grpo.check_length(model.config, longest, max_new_tokens)
    training = model.training
    model.eval()
    uniform = torch.rand(N, max_new_tokens,
                         generator=torch.Generator().manual_seed(seed)).to(device)
    ids = torch.full((N, max_new_tokens), pad_id, device=device)
    logp = torch.zeros(ids.shape, device=device)
    finished = torch.zeros(N, 1, dtype=torch.bool, device=device)
    t, fed = torch.zeros(N, 1, dtype=torch.long, device=device), ids[:, :1].clone()
    cache, read = Static(model, N, longest + max_new_tokens), make_cache(model, N, longest)

    def choose(logits):  # everything in place: a graph knows addresses
        policy = grpo.sampling_logprobs(logits[:, -1], temperature, 1.0)
        fed.copy_(grpo.draw(policy, uniform.gather(1, t)[:, 0]))
        ids.scatter_(1, t, fed)
        logp.scatter_(1, t, policy.gather(-1, fed))
        finished.logical_or_(fed == end_id)
        t.add_(1)

    def step():
        logits = model(fed, None, cache).logits
        cache.settle()
        choose(logits)
    with torch.inference_mode():
        choose(model(*grpo.pad_left(prompts, pad_id, device), read).logits)
        cache.take(read)
        graph = None
        for i in range(1, max_new_tokens):
            if i % LOOK == 0 and bool(finished.all()):
                break
            if recordable(model) and i == WARM:
                torch.cuda.synchronize(device)
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph):
                    step()               # recorded, not run
            graph.replay() if graph else step()
    model.train(training)
    return grpo.lay_out(prompts, ids, logp, end_id, pad_id)
