"""Mathematics that several methods share; each fast path stands beside its definition."""
