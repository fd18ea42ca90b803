"""The runtime: joins methods and sites inside the user's model."""
