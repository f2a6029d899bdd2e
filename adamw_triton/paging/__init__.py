"""Pages of state through a GPU: the schedule, the streams it runs on, and the link they share."""
