"""Model files that tests edit, mutate and damage."""
