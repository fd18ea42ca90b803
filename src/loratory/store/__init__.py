"""Adapter files: our own format and PEFT's."""
