"""The linear probe: what a linear classifier of the frozen encoder's features answers."""
