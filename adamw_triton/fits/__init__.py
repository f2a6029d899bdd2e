"""What `adamw-triton plan` does: what a run takes on a card, and what would fit where nothing does."""
