"""Data: records, images, labels, order and batches. Gets tokenizer and image transform as arguments."""
