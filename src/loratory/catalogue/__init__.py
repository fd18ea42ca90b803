"""The papers' claims, and what came of checking them."""
