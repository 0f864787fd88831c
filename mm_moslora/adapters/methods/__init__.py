"""Other methods of PEFT by their names."""
