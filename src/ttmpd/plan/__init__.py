"""Which removals meet the budget with the least predicted harm."""
