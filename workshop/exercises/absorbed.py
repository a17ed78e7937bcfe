"""Exercise: decode from the latents alone, without making any token's keys or values.

Check yourself: python workshop/check.py absorbed
"""


def attend(q, q_rope, latent, k_rope, w_uk, w_uv, scale):
    """Attention of one new token over S cached tokens. Returns (H, V): what each of H
    heads reads. DeepSeek-V2 section 2.1.2.

    q (H, D)           the content part of the query
    q_rope (H, R)      the rotated part of the query
    latent (S, C)      the cached latent of each token
    k_rope (S, R)      the cached rotated key of each token, which all heads share
    w_uk (H, D, C)     makes keys: token s has the key w_uk[h] @ latent[s] in head h
    w_uv (H, V, C)     makes values: its value is w_uv[h] @ latent[s]

    The weights are the softmax over the S tokens of (content + rotary) * scale. content
    is the product of q and the key, rotary is the product of q_rope and k_rope.

    Do not make the S x H keys and values. Apply w_uk to the query, and w_uv to the
    output.
    """
    raise NotImplementedError
