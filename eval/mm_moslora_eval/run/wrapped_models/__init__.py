"""Models of the harness around another one: with stored answers, with a batch size that it finds."""
