"""A solution of exercises/absorbed.py. The project's own: moe.MLA.attend_absorbed."""
import torch


def attend(q, q_rope, latent, k_rope, w_uk, w_uv, scale):
    q_latent = torch.einsum("hd,hdc->hc", q, w_uk)     # (H, C), W_UK moved to the query
    scores = q_latent @ latent.T + q_rope @ k_rope.T   # (H, S)
    read = (scores * scale).softmax(1) @ latent        # (H, C)
    return torch.einsum("hvc,hc->hv", w_uv, read)      # W_UV moved to the output
