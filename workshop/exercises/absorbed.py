"""Exercise: decoding with the latents alone. No token's keys or values are ever made.

Check yourself: python workshop/check.py absorbed
"""


def attend(q, q_rope, latent, k_rope, w_uk, w_uv, scale):
    """What H heads read, (H, V), for the one token at hand, from the cache of S tokens.

    q (H, D) and q_rope (H, R)   the query's content and its rotated part
    latent (S, C)                all that is kept of each token's keys and values
    k_rope (S, R)                the rotated key, which all heads share
    w_uk (H, D, C), w_uv (H, V, C)   a token's key would be w_uk[h] @ latent[s], its value
                                 w_uv[h] @ latent[s]; but that makes S x H of each
    Move w_uk to the query and w_uv to the output. Weights: softmax over the S tokens of
    (content + rotary) * scale. V2 section 2.1.2.
    """
    raise NotImplementedError
