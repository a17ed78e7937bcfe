"""A solution of exercises/kl.py. The project's own: grpo.kl_k3."""


def kl_k3(new, reference):
    log_ratio = reference - new  # log x
    return log_ratio.exp() - log_ratio - 1
