"""Model backends: checkpoints of mm_moslora, transformers models, servers, stored answers."""
