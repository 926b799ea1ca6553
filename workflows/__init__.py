"""The stages wired together, and the launch plans that schedule them."""
