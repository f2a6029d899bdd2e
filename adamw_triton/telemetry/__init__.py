"""What steps did: the numbers that updates have left, what they mean, and what stands out in them."""
