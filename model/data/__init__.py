"""From documents to batches: tokenizer, mixture, packing and loader."""
