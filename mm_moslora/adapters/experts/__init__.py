"""Experts that a module holds as stacked parameters: which are adapted, and whether the installed PEFT can."""
