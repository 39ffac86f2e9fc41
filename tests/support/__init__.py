"""What several test modules share. Imported by tests and by the child processes that they start."""
