"""One file per change, oldest first; a file that was released is never edited."""
