"""What the four lesson files stand on: devices, checkpoints, optimizers, sampling, run folders."""
