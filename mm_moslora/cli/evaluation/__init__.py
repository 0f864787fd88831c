"""The verbs of `mm-moslora eval`. Parsing and printing only; heavy imports happen inside the verbs."""
