"""Two gloo processes on the CPU: what they train is what one process trains."""
