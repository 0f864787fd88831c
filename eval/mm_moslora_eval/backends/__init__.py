"""What answers: own checkpoints, transformers, servers, stored answers."""
