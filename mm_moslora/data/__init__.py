"""Data: records, images, labels, order and batches. Tokenizer and image transform are arguments."""
