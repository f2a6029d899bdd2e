"""Which variant: before training from a model and a card, at the first step from what is left, and later."""
