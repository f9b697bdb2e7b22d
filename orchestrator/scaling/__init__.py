"""Which size and how many tokens: laws of the loss, fitted to runs, and what they recommend. Torch-free."""
