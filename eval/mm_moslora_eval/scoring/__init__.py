"""From answers to numbers with error bars."""
