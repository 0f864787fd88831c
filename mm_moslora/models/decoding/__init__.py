"""Generation and option scoring over a shared prefix cache."""
