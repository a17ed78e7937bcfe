"""The tests of engine, tools, studies and workshop, one file a module.

pytest runs two workers (`-n 2` in pyproject.toml). Models here are so small that a second thread
only costs time, so each worker and each program that it starts has one.
"""
import os
import signal

import torch

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"  # of programs that a test starts
    torch.set_num_threads(1)
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    # A shell starts a job in the background with Ctrl-C ignored. Here it is tested.
    signal.signal(signal.SIGINT, signal.default_int_handler)
