"""Adapter files: what goes in comes out, and nothing damaged or foreign is taken."""
