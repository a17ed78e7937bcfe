"""A solution of exercises/bias.py. The project's own: moe.update_routing_bias."""
import torch


def update_bias(bias, load, speed):
    return bias + speed * torch.sign(load.mean() - load)  # sign(0) is 0
