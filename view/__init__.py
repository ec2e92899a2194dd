"""Watching a text appear: in the terminal (terminal.py) and as a page (page.py); nothing here changes a text."""
