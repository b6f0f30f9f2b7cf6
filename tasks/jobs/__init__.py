"""Programs that run in a process of their own: they may import torch, which nothing else does."""
