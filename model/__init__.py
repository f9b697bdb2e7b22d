"""What every rank computes: everything that touches tensors.

`config`, `layout`, `cost` and `data.config` are pure: no torch.
"""
