"""Other methods of PEFT by their names, and their starts from data."""
