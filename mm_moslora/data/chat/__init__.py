"""Records, chat templates and labels."""
