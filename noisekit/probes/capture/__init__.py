"""What a loop's own forward and backward passes leave behind, caught by hooks."""
