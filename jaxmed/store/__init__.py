"""What lasts of a run: its folder, where and when it was made."""
