"""Serving: many adapters behind one model."""
