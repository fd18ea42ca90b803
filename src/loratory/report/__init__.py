"""What reports are made of: pages that need no network, and plots inside them."""
