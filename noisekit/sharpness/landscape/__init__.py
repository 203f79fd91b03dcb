"""The loss along lines, curves and planes through solutions."""
