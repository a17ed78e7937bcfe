"""A solution of exercises/kimi.py. The project's own: grpo.kimi."""


def kimi(new, old, advantage, mask, tau):
    log_ratio = ((new - old) * mask).sum(1)  # (n,), of whole answers
    return (advantage * log_ratio - tau / 2 * log_ratio ** 2).mean()
